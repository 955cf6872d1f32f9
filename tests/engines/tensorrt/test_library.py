"""The commands that fix a missing or broken TensorRT, on Jetson and elsewhere."""

from __future__ import annotations

import sys

import pytest

from hipa_deploy.engines.tensorrt import cuda
from hipa_deploy.engines.tensorrt.library import load_tensorrt, missing
from hipa_deploy.errors import HipaError
from tests.engines.machine_samples import imitate_files

JETPACK_6 = "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic"
JETPACK_7 = "# R38 (release), REVISION: 2.0, GCID: 41844464, BOARD: generic"


@pytest.fixture
def on_release(monkeypatch):
    def set_release(text):
        imitate_files(monkeypatch, lambda path: text if path == "/etc/nv_tegra_release" else None)

    return set_release


@pytest.mark.parametrize(
    ("release", "library", "extra"),
    [
        (JETPACK_6, "tensorrt", "jetson6"),
        (JETPACK_7, "tensorrt", "jetson7"),
        (JETPACK_7, "rtx", "rtx"),
        (None, "tensorrt", "tensorrt"),
    ],
)
def test_the_extra_is_the_machines_own(on_release, release, library, extra):
    on_release(release)
    assert str(missing("polygraphy", library)).endswith(f"pip install 'hipa-deploy[{extra}]'")


def test_jetson_has_tensorrt_from_its_system(on_release, monkeypatch):
    on_release(JETPACK_6)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(HipaError, match=r"python3-libnvinfer.*--system-site-packages"):
        load_tensorrt("tensorrt")


def test_jetson_repairs_a_broken_tensorrt_with_apt(on_release, monkeypatch):
    def fail(name):
        raise OSError("libnvinfer.so.10: cannot open shared object file")

    on_release(JETPACK_7)
    monkeypatch.setattr("importlib.import_module", fail)
    with pytest.raises(
        HipaError, match=r"does not load .*apt install --reinstall python3-libnvinfer"
    ):
        load_tensorrt("tensorrt")


def test_jetson_has_a_cuda_python_of_its_own(on_release, monkeypatch):
    on_release(JETPACK_6)
    monkeypatch.setattr(cuda, "_MODULES", ("no_such_module",))
    with pytest.raises(
        HipaError, match=r"cuda-python is not installed. Run: pip install 'hipa-deploy\[jetson6\]'"
    ):
        cuda.load_cudart("tensorrt")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            OSError("libnvinfer.so.10: cannot open"),
            "does not load .*libnvinfer.*--force-reinstall tensorrt",
        ),
        (
            ModuleNotFoundError("No module named 'tensorrt_libs'", name="tensorrt_libs"),
            "incomplete .*tensorrt_libs",
        ),
    ],
)
def test_a_package_that_does_not_load_is_an_error(monkeypatch, error, expected):
    def fail(name):
        raise error

    monkeypatch.setattr("importlib.import_module", fail)
    with pytest.raises(HipaError, match=expected):
        load_tensorrt("tensorrt")

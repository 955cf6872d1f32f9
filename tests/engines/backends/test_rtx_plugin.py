"""NVIDIA's ONNX Runtime plugin: the real package, as far as a machine without a GPU can go."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from hipa_deploy.engines.backends import onnxruntime_runner, rtx_plugin
from hipa_deploy.engines.backends.bound_session import BoundSession
from hipa_deploy.engines.backends.onnxruntime_runner import OnnxRuntimeRunner, engine_cache
from hipa_deploy.engines.tensorrt.gpu import Gpu, find_gpu
from hipa_deploy.errors import HipaError
from hipa_deploy.generate.open_stages import open_runner
from tests.engines.engine_samples import SHAPE, conv_spec, save_conv
from tests.engines.machine_samples import imitate_files

RTX_4090 = Gpu(
    name="NVIDIA GeForce RTX 4090", sm=89, memory_mib=24564, integrated=False, driver="580.1",
    cuda="13.0",
)  # fmt: skip
H100 = RTX_4090.model_copy(update={"name": "NVIDIA H100", "sm": 90})


def package_folder() -> Path:
    """The folder of the installed plugin, found without importing it; a skip without one."""
    version = rtx_plugin.installed_version()
    if version is None:
        pytest.skip("onnxruntime-ep-nv-tensorrt-rtx is not installed")
    if rtx_plugin._number(onnxruntime.__version__) < (1, 24):
        pytest.skip("the plugin needs ONNX Runtime 1.24")
    for cuda in ("cu13", "cu12"):
        try:
            files = importlib.metadata.files(f"onnxruntime-ep-nv-tensorrt-rtx-{cuda}")
        except importlib.metadata.PackageNotFoundError:
            continue
        for file in files or ():
            if file.name == "tensorrt_rtx_provider_options.h":
                return Path(file.locate()).parent
    pytest.fail("the package has no header of its options")


def test_the_gpus_that_it_takes_are_those_of_the_packages_own_header():
    header = (package_folder() / "tensorrt_rtx_provider_options.h").read_text()
    named = re.search(r"kTargetSMValues\[\] = \{(.*?)\}", header).group(1)
    for sm in re.findall(r"sm(\d+)", named):
        assert rtx_plugin.runs_on(int(sm))
    assert "compute_capability >= 120" in header
    for sm in (75, 80, 87, 90, 100, 110):
        assert f'"sm{sm}"' not in named
        assert not rtx_plugin.runs_on(sm)


def test_every_option_that_we_set_is_in_the_packages_own_header():
    header = (package_folder() / "tensorrt_rtx_provider_options.h").read_text()
    for name in (
        "enable_cuda_graph", "nv_runtime_cache_path", "nv_profile_min_shapes",
        "nv_profile_opt_shapes", "nv_profile_max_shapes",
    ):  # fmt: skip
        assert f'"{name}"' in header


@pytest.mark.parametrize(
    ("onnxruntime_version", "installed", "gpu", "expected"),
    [
        ("1.32.0", "0.5.0", RTX_4090, None),
        ("1.24.1", "0.5.0", RTX_4090, None),
        ("1.23.2", "0.5.0", RTX_4090, "pip install 'onnxruntime>=1.24'"),
        (None, "0.5.0", RTX_4090, "pip install 'onnxruntime>=1.24'"),
        ("1.32.0", None, RTX_4090, "tensorrt-rtx-cu13"),
        ("1.32.0", None, RTX_4090.model_copy(update={"cuda": "12.8"}), "tensorrt-rtx-cu12"),
        ("1.32.0", None, None, "tensorrt-rtx-cu13"),
        ("1.32.0", "0.5.0", None, "No NVIDIA GPU"),
        ("1.32.0", "0.5.0", H100, r"does not take NVIDIA H100 \(SM90\)"),
    ],
)
def test_why_it_cannot_run_here(monkeypatch, onnxruntime_version, installed, gpu, expected):
    monkeypatch.setattr(rtx_plugin, "installed_version", lambda: installed)
    monkeypatch.setattr(rtx_plugin.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(rtx_plugin, "_LEAST_PYTHON", (3, 10))
    found = rtx_plugin.why_not_here(onnxruntime_version, gpu)
    if expected is None:
        assert found is None
    else:
        assert re.search(expected, found)


def test_a_python_without_that_onnxruntime_is_named(monkeypatch):
    """No command of pip helps there."""
    monkeypatch.setattr(rtx_plugin, "_LEAST_PYTHON", (9, 0))
    found = rtx_plugin.why_not_here("1.23.2", RTX_4090)
    assert "needs Python 3.11 or newer. This is Python 3." in found
    assert "pip install" not in found


def test_it_is_not_for_jetson_nor_for_other_arm_machines(monkeypatch):
    monkeypatch.setattr(rtx_plugin, "installed_version", lambda: None)
    monkeypatch.setattr(rtx_plugin.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(rtx_plugin.sys, "platform", "linux")
    assert "no package of the plugin" in rtx_plugin.why_not_here("1.32.0", None)
    imitate_files(monkeypatch, lambda path: "NVIDIA Jetson AGX Orin" if "model" in path else None)
    monkeypatch.setattr(rtx_plugin, "jetson_model", lambda: "NVIDIA Jetson AGX Orin")
    assert rtx_plugin.why_not_here("1.32.0", None) == (
        "The plugin is not for Jetson. Use --backend tensorrt."
    )


OPEN = """
import json, os, sys
from pathlib import Path
from hipa_deploy.bundle.manifest import StageSpec
from hipa_deploy.engines.backends.onnxruntime_runner import OnnxRuntimeRunner
from hipa_deploy.errors import HipaError
spec = StageSpec.model_validate_json(sys.argv[2])
before = os.environ.get("LD_LIBRARY_PATH")
for attempt in range(2):
    try:
        OnnxRuntimeRunner(Path(sys.argv[1]), spec, "onnxruntime-rtx")
    except HipaError as error:
        print(json.dumps(str(error)))
assert os.environ.get("LD_LIBRARY_PATH") == before
"""


def open_in_a_child(path: Path, **environment: str) -> list[str]:
    """The errors of two attempts to open a stage; a child, since the plugin loads 300 MB."""
    done = subprocess.run(
        [sys.executable, "-c", OPEN, str(path), conv_spec("unet").model_dump_json()],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **environment},
        timeout=120,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def model(tmp_path):
    save_conv(tmp_path / "model.onnx", np.float32)
    return tmp_path / "model.onnx"


@pytest.mark.skipif(find_gpu() is not None, reason="there is a GPU")
def test_without_a_driver_the_real_plugin_does_not_load_and_nothing_takes_its_place(model):
    package_folder()
    errors = open_in_a_child(model)
    assert len(errors) == 2
    for error in errors:
        assert "\n" not in error
        assert error.startswith("backend onnxruntime-rtx: the plugin ")
        assert "No NVIDIA GPU with a driver answers on this machine." in error
    # Where the driver's libraries are installed without a GPU, it loads and offers no device.
    if not find_library("libcuda.so.1"):
        assert "libcuda.so.1" in errors[0]


def find_library(name: str) -> bool:
    """Whether this machine's loader finds a library."""
    code = f"import ctypes; ctypes.CDLL({name!r})"
    return subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@pytest.mark.skipif(find_gpu() is not None, reason="there is a GPU")
@pytest.mark.skipif(not (shutil.which("gcc") and shutil.which("nm")), reason="no gcc")
def test_the_real_plugin_registers_and_offers_no_device_where_the_driver_has_none(model, tmp_path):
    """With libraries in the driver's place that know no GPU, like the stubs of a CUDA toolkit."""
    library = package_folder() / "libonnxruntime_providers_nv_tensorrt_rtx.so"
    wanted = subprocess.run(
        ["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True
    ).stdout.split()
    for soname, pattern in (("libcuda.so.1", r"cu[A-Z]\w+"), ("libnvidia-ml.so.1", r"nvml\w+")):
        names = [name for name in wanted if re.fullmatch(pattern, name)]
        assert names
        # 100 is CUDA_ERROR_NO_DEVICE.
        source = tmp_path / "stub.c"
        source.write_text("\n".join(f"int {name}(void) {{ return 100; }}" for name in names))
        subprocess.run(
            ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{soname}", "-o", tmp_path / soname, source],
            check=True,
        )
    errors = open_in_a_child(model, LD_LIBRARY_PATH=str(tmp_path))
    expected = (
        "backend onnxruntime-rtx: the plugin offers no device. "
        "No NVIDIA GPU with a driver answers on this machine."
    )
    assert errors == [expected, expected]


def test_an_absent_package_gives_the_pip_command(model, monkeypatch):
    def absent():
        raise ModuleNotFoundError("No module named 'onnxruntime_ep_nv_tensorrt_rtx'")

    monkeypatch.setattr(rtx_plugin, "_REGISTERED", set())
    monkeypatch.setattr(rtx_plugin, "_load_package", absent)
    monkeypatch.setattr(rtx_plugin, "installed_version", lambda: None)
    monkeypatch.setattr(rtx_plugin, "_LEAST_PYTHON", (3, 10))
    monkeypatch.setattr(rtx_plugin.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(onnxruntime, "__version__", "1.32.0")
    with pytest.raises(HipaError, match=r"is not installed\. Run: pip install onnxruntime-ep"):
        OnnxRuntimeRunner(model, conv_spec("unet"), "onnxruntime-rtx")
    monkeypatch.setattr(onnxruntime, "__version__", "1.23.0")
    with pytest.raises(HipaError, match=r"pip install 'onnxruntime>=1\.24'"):
        OnnxRuntimeRunner(model, conv_spec("unet"), "onnxruntime-rtx")


@pytest.mark.skipif(
    not hasattr(onnxruntime.InferenceSession, "get_provider_graph_assignment_info"),
    reason="ONNX Runtime before 1.24 does not say where nodes run",
)
def test_a_node_that_runs_elsewhere_is_an_error(model):
    """A real session, whose nodes are all on the CPU."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    with pytest.raises(HipaError, match=r"unet: 3 nodes do not run on NvTensorRTRTX.*Conv on CPU"):
        rtx_plugin.check_assignment(session, "unet")


def test_what_it_compiles_is_kept_by_weights_device_and_versions(make_bundle, monkeypatch):
    bundle = make_bundle(stages=("unet",))
    monkeypatch.setattr(rtx_plugin, "installed_version", lambda: "0.5.0")
    here = engine_cache(bundle, "unet", "onnxruntime-rtx")
    assert here.parent == bundle.root / "engines/onnxruntime-rtx"
    monkeypatch.setattr(rtx_plugin, "installed_version", lambda: "0.6.0")
    assert engine_cache(bundle, "unet", "onnxruntime-rtx") != here
    assert engine_cache(bundle, "unet", "onnxruntime-cuda") is None


@pytest.mark.gpu
@pytest.mark.skipif(find_gpu() is None, reason="no NVIDIA GPU with a driver")
def test_it_agrees_with_the_cpu_and_runs_every_node(make_bundle):
    reason = rtx_plugin.why_not_here(onnxruntime.__version__, find_gpu())
    if reason:
        pytest.skip(reason)
    bundle = make_bundle(stages=("unet",))
    x = np.random.default_rng(1).standard_normal(SHAPE).astype(np.float32)
    with (
        open_runner(bundle, "unet", "onnxruntime-rtx") as ours,
        open_runner(bundle, "unet", "onnxruntime") as reference,
    ):
        for value in (x, -x, x, -x):  # the first runs are plain, later ones the graph
            np.testing.assert_allclose(
                ours(x=value)["y"], reference(x=value)["y"], rtol=1e-2, atol=2e-2
            )
    assert list((bundle.root / "engines/onnxruntime-rtx").iterdir()), "the kernels are kept"


NO_PLUGINS = pytest.mark.skipif(
    not hasattr(onnxruntime.InferenceSession, "get_provider_graph_assignment_info"),
    reason="ONNX Runtime before 1.24 has no such plugins",
)


@pytest.fixture
def cpu_device(monkeypatch):
    """ONNX Runtime's own device for the CPU, in the place of the plugin's."""
    (cpu,) = [d for d in onnxruntime.get_ep_devices() if d.ep_name == "CPUExecutionProvider"]
    monkeypatch.setattr(rtx_plugin, "plugin_device", lambda module: cpu)
    return cpu


@NO_PLUGINS
def test_a_session_on_the_cpu_is_refused_by_onnxruntime_and_by_us(model, cpu_device, monkeypatch):
    """Real sessions: one with our options, one with options that let the CPU take over."""
    with pytest.raises(HipaError, match="disabled fallback to the CPU"):
        OnnxRuntimeRunner(model, conv_spec("unet"), "onnxruntime-rtx")
    plain = onnxruntime.SessionOptions
    monkeypatch.setattr(onnxruntime_runner, "_session_options", lambda *arguments: plain())
    monkeypatch.setattr(onnxruntime_runner, "provider_options", lambda *arguments: {})
    with pytest.raises(HipaError, match="did not start, only CPUExecutionProvider") as caught:
        OnnxRuntimeRunner(model, conv_spec("unet"), "onnxruntime-rtx")
    assert "nvidia-smi" in str(caught.value)


@NO_PLUGINS
def test_the_way_through_a_device_gives_what_a_provider_gives(model, cpu_device, monkeypatch):
    """The same calls as on a GPU, with the device of the CPU and its memory."""

    def options(*arguments):
        made = onnxruntime.SessionOptions()
        made.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        return made

    def on_the_host(module, session, spec, device, vendor):
        assert (device, vendor) == ("gpu", 0x10DE)
        return BoundSession(module, session, spec, "cpu")

    name = "CPUExecutionProvider"
    monkeypatch.setattr(rtx_plugin, "PROVIDER", name)
    monkeypatch.setitem(onnxruntime_runner.PROVIDERS, "onnxruntime-rtx", name)
    monkeypatch.setattr(onnxruntime_runner, "_session_options", options)
    monkeypatch.setattr(onnxruntime_runner, "provider_options", lambda *arguments: {})
    monkeypatch.setattr(onnxruntime_runner, "BoundSession", on_the_host)
    x = np.random.default_rng(1).standard_normal(SHAPE).astype(np.float32)
    with (
        OnnxRuntimeRunner(model, conv_spec("unet"), "onnxruntime-rtx") as ours,
        OnnxRuntimeRunner(model, conv_spec("unet"), "onnxruntime") as reference,
    ):
        np.testing.assert_array_equal(ours(x=x)["y"], reference(x=x)["y"])

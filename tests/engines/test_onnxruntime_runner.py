from __future__ import annotations

import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
from engine_samples import SHAPE, conv_spec, save_conv

from hipa_deploy.engines.onnxruntime_runner import OnnxRuntimeRunner
from hipa_deploy.errors import HipaError


@pytest.fixture
def path(tmp_path):
    save_conv(tmp_path / "model.onnx", np.float32)
    return tmp_path / "model.onnx"


def test_runs_and_is_deterministic(path):
    x = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    with OnnxRuntimeRunner(path, conv_spec("unet"), "onnxruntime") as runner:
        first, second = runner(x=x)["y"], runner(x=x)["y"]
    assert first.dtype == np.float32
    assert first.shape == SHAPE
    assert np.array_equal(first, second)
    assert not np.array_equal(first, x)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"x": np.zeros(SHAPE)}, r"input x is float64 .*expected float32"),
        ({"x": np.zeros((2, 4, 8, 8), np.float32)}, r"is float32 \[2, 4, 8, 8\], expected float32 \[1, 4, 8, 8\]"),
        ({"z": np.zeros(SHAPE, np.float32)}, r"got inputs \['z'\], expected \['x'\]"),
    ],
)
def test_wrong_inputs_are_one_line(path, inputs, message):
    with OnnxRuntimeRunner(path, conv_spec("unet"), "onnxruntime") as runner, pytest.raises(HipaError, match=message):
        runner(**inputs)


def test_a_closed_runner_says_so(path):
    runner = OnnxRuntimeRunner(path, conv_spec("unet"), "onnxruntime")
    runner.close()
    runner.close()
    with pytest.raises(HipaError, match="closed"):
        runner(x=np.zeros(SHAPE, np.float32))


@pytest.mark.parametrize("keep", [0, 10, -20])
def test_a_truncated_file_is_one_line(path, keep, capfd):
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(HipaError, match=r"model\.onnx: ONNX Runtime cannot load it") as caught:
        OnnxRuntimeRunner(path, conv_spec("unet"), "onnxruntime")
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_other_tensors_than_the_manifest_says(path):
    spec = conv_spec("unet").model_copy(update={"inputs": ()})
    with pytest.raises(HipaError, match=r"has inputs \['x'\], the manifest says \[\]"):
        OnnxRuntimeRunner(path, spec, "onnxruntime")


@pytest.mark.parametrize("backend", ["onnxruntime-cuda", "onnxruntime-tensorrt"])
def test_an_absent_provider_gives_the_pip_command(path, backend):
    if len(onnxruntime.get_available_providers()) > 2:
        pytest.skip("onnxruntime-gpu is installed")
    with pytest.raises(HipaError, match=rf"{backend} is not in .*pip install onnxruntime-gpu"):
        OnnxRuntimeRunner(path, conv_spec("unet"), backend)


def test_an_unknown_backend(path):
    with pytest.raises(HipaError, match="'onnxruntime-rocm' is not ONNX Runtime's"):
        OnnxRuntimeRunner(path, conv_spec("unet"), "onnxruntime-rocm")


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_provider_that_does_not_start_is_an_error(path, monkeypatch):
    """onnxruntime-gpu without CUDA lists the provider, then quietly runs on the CPU."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    with pytest.raises(HipaError, match="CUDAExecutionProvider"):
        OnnxRuntimeRunner(path, conv_spec("unet"), "onnxruntime-cuda")


def test_the_runtime_path_imports_nothing_heavy():
    code = (
        "import sys, hipa_deploy.engines.onnxruntime_runner, hipa_deploy.engines.engine, hipa_deploy.engines.runtime\n"
    )
    code += "import hipa_deploy.engines.profile, hipa_deploy.engines.device\n"
    code += "hipa_deploy.engines.device.describe_device()\n"
    code += "heavy = ('torch', 'onnx', 'diffusers', 'transformers', 'polygraphy')\n"
    code += "sys.exit(', '.join(name for name in heavy if name in sys.modules) or None)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")

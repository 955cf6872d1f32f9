from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.bundle.manifest import Axis, StageSpec, TensorSpec
from hipa_deploy.engines.backends import onnxruntime_runner
from hipa_deploy.engines.backends.available import PROVIDERS
from hipa_deploy.engines.backends.onnxruntime_runner import (
    OnnxRuntimeRunner,
    engine_cache,
    provider_options,
)
from hipa_deploy.engines.tensorrt.gpu import find_gpu
from hipa_deploy.errors import HipaError
from hipa_deploy.generate.open_stages import open_runner
from tests.engines.engine_samples import ORIN, SHAPE, conv_spec, save_conv


@pytest.fixture
def path(tmp_path):
    save_conv(tmp_path / "model.onnx", np.float32)
    return tmp_path / "model.onnx"


def test_runs_and_is_deterministic(path):
    x = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    with OnnxRuntimeRunner(path, conv_spec("unet"), "onnxruntime") as runner:
        first = runner(x=x)["y"]
        second = runner(x=x)["y"]
    assert first.dtype == np.float32
    assert first.shape == SHAPE
    assert np.array_equal(first, second)
    assert not np.array_equal(first, x)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"x": np.zeros(SHAPE)}, r"input x is float64 .*expected float32"),
        (
            {"x": np.zeros((2, 4, 8, 8), np.float32)},
            r"is float32 \[2, 4, 8, 8\], expected float32 \[1, 4, 8, 8\]",
        ),
        ({"z": np.zeros(SHAPE, np.float32)}, r"got inputs \['z'\], expected \['x'\]"),
    ],
)
def test_wrong_inputs_are_one_line(path, inputs, message):
    with (
        OnnxRuntimeRunner(path, conv_spec("unet"), "onnxruntime") as runner,
        pytest.raises(HipaError, match=message),
    ):
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
    with pytest.raises(HipaError, match=rf"{backend} is not in .*pip install 'onnxruntime-gpu"):
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


def test_cuda_of_nvidias_packages_is_loaded_before_the_provider(path, monkeypatch, capfd):
    """Without ``preload_dlls`` onnxruntime-gpu finds none of its packages' libraries."""
    loaded = []

    def preload_dlls(directory=None):
        print("Failed to load libcudnn.so.9")  # as the real one does
        loaded.append(directory)

    def session(*given, **options):
        assert loaded, "the provider is asked for before its libraries are there"
        raise RuntimeError("out of memory")

    monkeypatch.setattr(onnxruntime, "preload_dlls", preload_dlls)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    onnxruntime_runner._preload_cuda.cache_clear()
    try:
        for _ in range(2):
            with pytest.raises(HipaError, match="out of memory"):
                OnnxRuntimeRunner(path, conv_spec("unet"), "onnxruntime-cuda")
    finally:
        onnxruntime_runner._preload_cuda.cache_clear()
    assert loaded == [""]
    assert capfd.readouterr().out == ""


DYNAMIC = StageSpec(
    name="unet",
    inputs=(TensorSpec(name="x", dtype="float32", shape=("batch", 3)),),
    outputs=(TensorSpec(name="y", dtype="float32", shape=("batch", 3)),),
    axes={"batch": Axis(min=1, opt=2, max=4)},
)


@pytest.mark.parametrize(
    ("backend", "spec", "expected"),
    [
        ("onnxruntime", conv_spec("unet"), {}),
        ("onnxruntime-cuda", conv_spec("unet"), {"use_tf32": "0", "enable_cuda_graph": "1"}),
        ("onnxruntime-cuda", DYNAMIC, {"use_tf32": "0"}),
        (
            "onnxruntime-tensorrt",
            conv_spec("unet"),
            {
                "trt_engine_cache_enable": "1", "trt_engine_cache_path": "/c",
                "trt_cuda_graph_enable": "1",
            },
        ),
        (
            "onnxruntime-tensorrt",
            DYNAMIC,
            {
                "trt_engine_cache_enable": "1", "trt_engine_cache_path": "/c",
                "trt_profile_min_shapes": "x:1x3", "trt_profile_opt_shapes": "x:2x3",
                "trt_profile_max_shapes": "x:4x3",
            },
        ),
        (
            "onnxruntime-rtx",
            conv_spec("unet"),
            {"nv_runtime_cache_path": "/c", "enable_cuda_graph": "1"},
        ),
        (
            "onnxruntime-rtx",
            DYNAMIC,
            {
                "nv_runtime_cache_path": "/c", "nv_profile_min_shapes": "x:1x3",
                "nv_profile_opt_shapes": "x:2x3", "nv_profile_max_shapes": "x:4x3",
            },
        ),
    ],
)  # fmt: skip
def test_provider_options(backend, spec, expected):
    assert provider_options(backend, spec, Path("/c")) == expected
    assert not {"trt_engine_cache_path", "nv_runtime_cache_path"} & set(
        provider_options(backend, spec, None)
    )


class Refusing:
    """An onnxruntime-gpu that cannot capture: it opens a real session on the CPU instead."""

    def __init__(self, words: str) -> None:
        self.words = words
        self.settings = []
        self.real = onnxruntime.InferenceSession

    def __call__(self, path, options, providers, **others):
        name, settings = providers[0]
        self.settings.append(settings)
        if "enable_cuda_graph" in settings:
            raise RuntimeError(self.words)
        session = self.real(path, providers=["CPUExecutionProvider"])
        session.get_providers = lambda: [name]
        return session


def test_without_a_graph_that_onnxruntime_refuses_the_stage_runs_with_a_warning(path, monkeypatch):
    refusing = Refusing(
        "This session cannot use the graph capture feature as requested by the user as …"
    )
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", refusing)
    with pytest.warns(
        RuntimeWarning, match="unet: no CUDA graph .*cannot use the graph capture feature"
    ):
        runner = OnnxRuntimeRunner(path, conv_spec("unet"), "onnxruntime-cuda", optimise=False)
    assert "graph capture" in runner.graph_problem
    assert refusing.settings == [{"use_tf32": "0", "enable_cuda_graph": "1"}, {"use_tf32": "0"}]


def test_another_refusal_is_an_error(path, monkeypatch):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", Refusing("out of memory"))
    with pytest.raises(HipaError, match="cannot load it on CUDAExecutionProvider: out of memory"):
        OnnxRuntimeRunner(path, conv_spec("unet"), "onnxruntime-cuda")


def test_the_engine_cache_is_named_after_weights_device_and_version(make_bundle, monkeypatch):
    bundle = make_bundle(stages=("unet",))
    here = engine_cache(bundle, "unet", "onnxruntime-tensorrt")
    assert here.parent == bundle.root / "engines/onnxruntime-tensorrt"
    assert not here.exists(), "only a provider that is there makes it"
    monkeypatch.setattr(onnxruntime_runner, "find_gpu", lambda: ORIN)
    orin = engine_cache(bundle, "unet", "onnxruntime-tensorrt")
    monkeypatch.setattr(onnxruntime, "__version__", "9.9")
    newer = engine_cache(bundle, "unet", "onnxruntime-tensorrt")
    files = {**bundle.manifest.files, "unet/model.onnx": "0" * 64}
    changed = Bundle(bundle.root, bundle.manifest.model_copy(update={"files": files}))
    other = engine_cache(changed, "unet", "onnxruntime-tensorrt")
    assert len({here, orin, newer, other}) == 4
    assert engine_cache(bundle, "unet", "onnxruntime") is None


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(RuntimeWarning, match="cannot be written .*anew at every start"):
        assert onnxruntime_runner._writable(tmp_path / "file" / "cache") is None


# The plugin has tests of its own (test_rtx_plugin.py).
GPU_PROVIDERS = ["onnxruntime-cuda", "onnxruntime-tensorrt"]


@pytest.mark.gpu
@pytest.mark.skipif(find_gpu() is None, reason="no NVIDIA GPU with a driver")
@pytest.mark.parametrize("backend", GPU_PROVIDERS)
def test_a_gpu_provider_agrees_with_the_cpu(make_bundle, backend):
    if PROVIDERS[backend] not in onnxruntime.get_available_providers():
        pytest.skip(f"{PROVIDERS[backend]} is not in the installed onnxruntime")
    bundle = make_bundle(stages=("unet",))
    x = np.random.default_rng(1).standard_normal(SHAPE).astype(np.float32)
    with (
        open_runner(bundle, "unet", backend) as ours,
        open_runner(bundle, "unet", "onnxruntime") as reference,
    ):
        for value in (x, -x, x, -x):  # the first runs are plain, later ones the graph
            np.testing.assert_allclose(
                ours(x=value)["y"], reference(x=value)["y"], rtol=1e-2, atol=2e-2
            )


def test_the_runtime_path_imports_nothing_heavy():
    code = """
import sys
import hipa_deploy.engines.backends.onnxruntime_runner
import hipa_deploy.engines.latency.measure
import hipa_deploy.engines.store.select
import hipa_deploy.engines.tensorrt.tensorrt_runner
from hipa_deploy.engines.backends.available import describe_device
describe_device()
heavy = ("torch", "onnx", "diffusers", "transformers", "polygraphy")
sys.exit(", ".join(name for name in heavy if name in sys.modules) or None)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")

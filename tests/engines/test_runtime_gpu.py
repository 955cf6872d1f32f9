"""The runtime for real: engines built and run on the GPU that is here. Skipped without one."""

from __future__ import annotations

import io
import shutil

import numpy as np
import pytest
from rich.console import Console

from hipa_deploy import OneStepPipeline, embedded
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.doctor.self_check import check_pipeline
from hipa_deploy.engines.build.build_bundle import build_bundle
from hipa_deploy.engines.store.sidecar import engine_path, find_sidecars
from hipa_deploy.engines.tensorrt.cuda import load_cudart
from hipa_deploy.engines.tensorrt.gpu import find_gpu
from hipa_deploy.engines.tensorrt.tensorrt_runner import TensorRTRunner
from hipa_deploy.generate.open_stages import open_runner

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(find_gpu() is None, reason="no NVIDIA GPU with a driver"),
    pytest.mark.parametrize("library", ["tensorrt", "rtx"]),
]


@pytest.fixture
def built(make_bundle):
    """Builds an engine of the sample convolution; gives the bundle."""

    def build(library: str):
        pytest.importorskip({"tensorrt": "tensorrt", "rtx": "tensorrt_rtx"}[library])
        bundle = make_bundle(stages=("unet",))
        build_bundle(bundle, backend=library, console=Console(file=io.StringIO()))
        return bundle

    return build


X = np.random.default_rng(1).standard_normal((1, 4, 8, 8)).astype(np.float32)


def test_an_engine_agrees_with_onnxruntime_and_again_from_the_graph(built, library):
    bundle = built(library)
    with (
        open_runner(bundle, "unet", library) as engine,
        open_runner(bundle, "unet", "onnxruntime") as reference,
    ):
        for x in (X, -X):  # captured, then launched
            np.testing.assert_allclose(engine(x=x)["y"], reference(x=x)["y"], rtol=1e-2, atol=2e-2)
        assert engine.graph_problem is None
        assert 0 < engine.device_ms < 1000
        assert engine.device_memory_mib is not None


def test_graph_and_no_graph_agree_to_the_bit(built, library):
    bundle = built(library)
    path = engine_path(next(iter(find_sidecars(bundle, "unet", library))))
    spec = bundle.stages["unet"].spec
    with (
        TensorRTRunner([(spec, path)], library) as graph,
        TensorRTRunner([(spec, path)], library, graph=False) as plain,
    ):
        np.testing.assert_array_equal(graph(x=X)["y"], plain(x=X)["y"])


def test_layers_and_device_arrays(built, library):
    with open_runner(built(library), "unet", library) as engine:
        layers = engine.profile_layers(x=X)
        assert layers
        assert all(ms >= 0 for _, ms in layers)
        expected = engine(x=X)["y"]
        array = engine.run_on_device({"x": X})["y"]
        array.wait()
        got = np.empty_like(expected)
        cudart = load_cudart(library)
        pointer, read_only = array.__cuda_array_interface__["data"]
        (error,) = cudart.cudaMemcpy(
            got.ctypes.data, pointer, got.nbytes, cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
        )
        assert (int(error), read_only) == (0, False)
        np.testing.assert_array_equal(got, expected)


def test_the_embedded_bundle_as_one_graph_passes_its_self_check(tmp_path, library):
    pytest.importorskip({"tensorrt": "tensorrt", "rtx": "tensorrt_rtx"}[library])
    bundle = Bundle.open(
        shutil.copytree(
            embedded.BUNDLE, tmp_path / "bundle", ignore=shutil.ignore_patterns("engines")
        )
    )
    build_bundle(bundle, backend=library, console=Console(file=io.StringIO()))
    with OneStepPipeline.load(bundle.root, library) as pipe:
        assert check_pipeline(pipe).problems == ()
        assert pipe.stages.graph_problem is None
        twice = [
            pipe("3d emoji of a red apple", seed=0).images_BHWC for _ in range(2)
        ]  # text encoded, then cached
        np.testing.assert_array_equal(*twice)

"""Refitting an engine: against a fake, against TensorRT-RTX's parser, and on a GPU if there is one.

The fake (tests/engines/fake_refit.py) refuses what TensorRT refuses.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from hipa_deploy.bundle.adaptor_swap import refittable_weights
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.embedded import BUNDLE
from hipa_deploy.engines.backends.onnxruntime_runner import OnnxRuntimeRunner
from hipa_deploy.engines.tensorrt import refit
from hipa_deploy.engines.tensorrt.gpu import find_gpu
from hipa_deploy.engines.tensorrt.library import (
    TENSORRT_LIBRARIES,
    recording_logger,
    set_compute_capabilities,
)
from hipa_deploy.engines.tensorrt.refit import RefitFailedError, refit_engine, refuse_faulty
from hipa_deploy.engines.tensorrt.tensorrt_runner import TensorRTRunner
from hipa_deploy.errors import HipaError
from tests.engines.fake_refit import FakeEngine, FakeRefitter, assert_weights, fake_trt
from tests.network_samples import network_weights, parse
from tests.swap_samples import scaled_weights

UNET = BUNDLE / "unet/model.onnx"
REMEDY = "Run: hipa-build emoji --backend rtx --refit"


def refit_fake(
    engine: FakeEngine, changed: dict[str, np.ndarray], version: str = "10.16.1"
) -> None:
    refit_engine(fake_trt(version), engine, UNET, changed, "tensorrt", REMEDY)


def test_there_from_one_to_another_and_back() -> None:
    """The fault of NVIDIA/TensorRT#3628: weights of the first adaptor remain under the second."""
    bundle = Bundle.open(BUNDLE)
    engine = FakeEngine(UNET)
    night = scaled_weights(bundle, 0.5, 6)
    day = scaled_weights(bundle, 1.5, 2)
    for changed in (night, day, {}):
        refit_fake(engine, changed)
        assert_weights(engine, UNET, changed)


def test_an_engine_whose_own_weights_stay() -> None:
    engine = FakeEngine(UNET, inner=("(Unnamed Layer* 5) [Constant]",))
    refit_fake(engine, scaled_weights(Bundle.open(BUNDLE), 0.5))
    np.testing.assert_array_equal(engine.weights["(Unnamed Layer* 5) [Constant]"], [1, 1])


def test_not_built_for_it() -> None:
    with pytest.raises(
        HipaError, match=r"not built to take another adaptor. Run: hipa-build .* --refit"
    ):
        refit_fake(FakeEngine(UNET, refittable=False), {})


def test_a_weight_that_was_not_marked() -> None:
    changed = scaled_weights(Bundle.open(BUNDLE), 0.5)
    first = next(iter(changed))
    engine = FakeEngine(UNET, fixed=[first])
    with pytest.raises(HipaError, match=rf"holds 1 of the adaptor's weights fixed \({first}\)"):
        refit_fake(engine, changed)
    assert_weights(engine, UNET, {})


def test_an_engine_of_another_graph() -> None:
    engine = FakeEngine(UNET)
    name = next(iter(scaled_weights(Bundle.open(BUNDLE), 0.5)))
    engine.weights[name] = engine.weights[name].astype(np.float32)
    with pytest.raises(
        HipaError, match=rf"weight {name} is \d+ of float32 in the engine, \d+ of float16"
    ):
        refit_fake(engine, {})


def test_a_weight_that_tensorrt_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        FakeRefitter, "set_named_weights", lambda self, *_: self.logger.log(1, "bad weight.\n")
    )
    with pytest.raises(HipaError, match=r"TensorRT refuses weight .*: bad weight"):
        refit_fake(FakeEngine(UNET), {})


def test_weights_that_are_missing() -> None:
    with pytest.raises(HipaError, match="asks for weights inner as well"):
        refit_fake(FakeEngine(UNET, wants=("inner",)), {})


def test_a_refit_that_fails_half_way() -> None:
    with pytest.raises(
        RefitFailedError,
        match=r"refitting 307 weights failed: out of memory. Load the bundle again",
    ):
        refit_fake(FakeEngine(UNET, fail=True), {})


@pytest.mark.parametrize("version", ["11.30.1", "11.4.0", "10.3.0"])
def test_versions_without_a_known_fault(version: str) -> None:
    refit_fake(FakeEngine(UNET), {}, version)


@pytest.mark.parametrize("version", ["11.3.0", "11.3.0.12"])
def test_versions_with_a_known_fault(version: str) -> None:
    with pytest.raises(
        HipaError, match=rf"tensorrt {version} cannot swap adaptors: .*bias.*release notes"
    ):
        refit_fake(FakeEngine(UNET), {}, version)


def test_the_other_library_has_its_own_versions() -> None:
    refuse_faulty("rtx", "11.3.0")
    assert refit.FAULTS.keys() == set(TENSORRT_LIBRARIES)


# The real TensorRT-RTX from here on.


@pytest.mark.parametrize("stage", ["text_encoder", "unet", "vae_decoder"])
def test_every_weight_of_the_network_is_an_initializer(stage: str) -> None:
    path = BUNDLE / stage / "model.onnx"
    trt, network, _alive = parse(path)
    model = onnx.load(path)
    found = network_weights(trt, network, model)
    own = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    floats = {name for name, value in own.items() if value.dtype.kind == "f"}
    assert floats - found.keys() == settings(model)
    for name, value in found.items():
        np.testing.assert_array_equal(np.asarray(value).reshape(-1), own[name].reshape(-1))
        assert network.mark_weights_refittable(name)


def settings(model) -> set[str]:
    """Scales of a Resize, limits of a Clip: the parser makes settings of a layer of them."""
    nodes = [node for node in model.graph.node if node.op_type in ("Resize", "Clip")]
    return {name for node in nodes for name in node.input[1:] if name}


def build_refittable(bundle: Bundle) -> bytes:
    """An engine of the UNet for this GPU, with just the ``refittable_weights`` marked.

    Without a driver TensorRT-RTX 1.7.1 compiles none as soon as one weight is marked.
    """
    trt, network, (builder, _parser) = parse(bundle.stage_path("unet"))
    assert all(network.mark_weights_refittable(name) for name in refittable_weights(bundle, "unet"))
    config = builder.create_builder_config()
    config.set_flag(trt.BuilderFlag.REFIT_INDIVIDUAL)
    gpu = find_gpu()
    assert gpu is not None
    set_compute_capabilities(trt, config, (gpu.sm,))
    engine = builder.build_serialized_network(network, config)
    assert engine is not None, recording_logger(trt).last
    return bytes(engine)


def test_every_name_that_refitting_uses_exists() -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    names = {
        trt.Refitter: [
            "get_all_weights", "get_weights_prototype", "set_named_weights", "get_missing_weights",
            "refit_cuda_engine",
        ],
        trt.ICudaEngine: ["refittable"],
        trt.Weights: ["size", "dtype"],
        trt.INetworkDefinition: ["mark_weights_refittable"],
        trt.BuilderFlag: ["REFIT", "REFIT_INDIVIDUAL"],
    }  # fmt: skip
    for owner, used in names.items():
        assert [name for name in used if not hasattr(owner, name)] == []


@pytest.mark.gpu
@pytest.mark.skipif(find_gpu() is None, reason="no NVIDIA GPU with a driver")
def test_on_a_gpu_there_and_back(tmp_path: Path) -> None:
    """Refit to scaled weights and back.

    The scaled output is ONNX Runtime's, and the last is the first to the bit.
    """
    bundle = Bundle.open(BUNDLE)
    changed = scaled_weights(bundle, 0.9, 6)
    with np.load(bundle.path("reference/tensors.npz")) as tensors:
        feed = {"noise": tensors["noise"], "context": tensors["context"].astype(np.float16)}
    path = tmp_path / "unet.engine"
    path.write_bytes(build_refittable(bundle))
    spec = bundle.stages["unet"].spec
    outputs = []
    with TensorRTRunner([(spec, path)], "rtx") as runner:
        for values in ({}, changed, {}):
            change = partial(refit_engine, onnx=UNET, changed=values, library="rtx", remedy=REMEDY)
            runner.change_engine(change)
            outputs.append(runner(**feed)["latents"])
    with OnnxRuntimeRunner(UNET, spec, "onnxruntime", weights=changed) as reference:
        np.testing.assert_allclose(outputs[1], reference(**feed)["latents"], rtol=0.05, atol=0.1)
    np.testing.assert_array_equal(outputs[0], outputs[2])

"""Refitting: against a fake that refuses what TensorRT refuses, against TensorRT-RTX's parser for real, and on a GPU
where there is one.

The fake is a fake: its engine is a dictionary of weights. It refuses, as the documentation of IRefitter says, a name
that is not refittable, another type or size, and a refit with weights missing.
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from hipa_deploy import OneStepPipeline
from hipa_deploy.bundle.adaptor_swap import (
    FOLDER,
    MANIFEST,
    REFERENCE,
    SwapManifest,
    refittable_weights,
)
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.bundle.onnx_weights import read_initializers
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
from hipa_deploy.generate.stages import HostStages
from hipa_deploy.hashing import file_sha256
from tests.network_samples import network_weights, parse
from tests.swap_samples import scaled_weights, write_swap

UNET = BUNDLE / "unet/model.onnx"
REMEDY = "Run: hipa-build emoji --backend rtx --refit"


class FakeEngine:
    """Weights by name; those in ``fixed`` were not marked, those in ``inner`` are TensorRT's own."""

    def __init__(
        self, onnx_path: Path, refittable=True, fixed=(), inner=(), fail=False, wants=()
    ) -> None:
        self.refittable, self.fail, self.wants = refittable, fail, wants
        own = {
            n: w.read().reshape(-1)
            for n, w in read_initializers(onnx_path).items()
            if w.dtype.startswith("float")
        }
        self.weights = {n: w for n, w in own.items() if n not in fixed} | {
            n: np.ones(2, np.float32) for n in inner
        }


class FakeRefitter:
    def __init__(self, engine: FakeEngine, logger) -> None:
        self.engine, self.logger, self.given = engine, logger, {}

    def get_all_weights(self):
        return list(self.engine.weights)

    def get_weights_prototype(self, name):
        weight = self.engine.weights.get(name)
        return SimpleNamespace(size=-1 if weight is None else weight.size, dtype=str(weight.dtype))

    def set_named_weights(self, name, array):
        known = self.engine.weights.get(name)
        if (
            known is None
            or array.dtype != known.dtype
            or array.size != known.size
            or array.ndim != 1
        ):
            self.logger.log(1, f"{name} rejected")
            return False
        self.given[name] = array
        return True

    def get_missing_weights(self):
        return [name for name in self.engine.wants if name not in self.given]

    def refit_cuda_engine(self):
        if self.engine.fail:
            self.logger.log(1, "out of memory")
            return False
        self.engine.weights |= {name: array.copy() for name, array in self.given.items()}
        return True


class FakeILogger:
    """Nothing of TensorRT's logger but its place in the class tree."""


def fake_trt(version: str = "10.16.1") -> ModuleType:
    trt = ModuleType("fake_tensorrt")
    trt.__version__, trt.Refitter, trt.ILogger = version, FakeRefitter, FakeILogger
    trt.nptype = np.dtype
    trt.Logger = SimpleNamespace(ERROR=1, INTERNAL_ERROR=0)
    return trt


def refit_fake(
    engine: FakeEngine, changed: dict[str, np.ndarray], version: str = "10.16.1"
) -> None:
    refit_engine(fake_trt(version), engine, UNET, changed, "tensorrt", REMEDY)


def assert_weights(engine: FakeEngine, changed: dict[str, np.ndarray]) -> None:
    own = read_initializers(UNET)
    for name, value in engine.weights.items():
        np.testing.assert_array_equal(
            value, (changed[name] if name in changed else own[name].read()).reshape(-1)
        )


def test_there_from_one_to_another_and_back() -> None:
    """The fault of NVIDIA/TensorRT#3628: weights of the first under the second. Every weight is set each time."""
    bundle, engine = Bundle.open(BUNDLE), FakeEngine(UNET)
    night, day = scaled_weights(bundle, 0.5, 6), scaled_weights(bundle, 1.5, 2)
    for changed in (night, day, {}):
        refit_fake(engine, changed)
        assert_weights(engine, changed)


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
    engine = FakeEngine(UNET, fixed=[next(iter(changed))])
    with pytest.raises(
        HipaError, match=rf"holds 1 of the adaptor's weights fixed \({next(iter(changed))}\)"
    ):
        refit_fake(engine, changed)
    assert_weights(engine, {})


def test_an_engine_of_another_graph() -> None:
    engine, (name, _) = (
        FakeEngine(UNET),
        next(iter(scaled_weights(Bundle.open(BUNDLE), 0.5).items())),
    )
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


@pytest.mark.parametrize(("version", "faulty"), [("11.3.0", True), ("11.3.0.12", True), ("11.30.1", False),
                                                 ("11.4.0", False), ("10.3.0", False)])  # fmt: skip
def test_versions_with_a_known_fault(version: str, faulty: bool) -> None:
    if not faulty:
        return refit_fake(FakeEngine(UNET), {}, version)
    with pytest.raises(
        HipaError, match=rf"tensorrt {version} cannot swap adaptors: .*bias.*release notes"
    ):
        refit_fake(FakeEngine(UNET), {}, version)
    return None


def test_the_other_library_has_its_own_versions() -> None:
    refuse_faulty("rtx", "11.3.0")
    assert refit.FAULTS.keys() == set(TENSORRT_LIBRARIES)


class FakeRunner:
    """A runner of a fake engine that gives ``output``, whatever its weights."""

    def __init__(self, spec, engine: FakeEngine, output: np.ndarray) -> None:
        self.spec, self.engine, self.output, self.closed = spec, engine, output, False

    def change_engine(self, change) -> None:
        change(fake_trt(), self.engine)

    def __call__(self, **inputs):
        assert [inputs[tensor.name].dtype for tensor in self.spec.inputs] == [
            t.dtype for t in self.spec.inputs
        ]
        return {self.spec.outputs[0].name: self.output}

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def engine_pipe(tmp_path: Path) -> OneStepPipeline:
    """A pipeline on fake engines of the embedded bundle, which has an adaptor 'night' that changes no output."""
    bundle = Bundle.open(Path(shutil.copytree(BUNDLE, tmp_path / "bundle")))
    with np.load(bundle.path("reference/tensors.npz")) as tensors:
        latents = tensors["latents"]
    night = write_swap(bundle, bundle.root / FOLDER / "night", scaled_weights(bundle, 0.5))
    np.save(night / REFERENCE, latents)
    manifest = SwapManifest.model_validate_json((night / MANIFEST).read_text())
    files = manifest.files | {REFERENCE: file_sha256(night / REFERENCE)}
    (night / MANIFEST).write_text(manifest.model_copy(update={"files": files}).model_dump_json())
    runner = FakeRunner(bundle.stages["unet"].spec, FakeEngine(UNET), latents)
    return OneStepPipeline(bundle, "tensorrt", HostStages("tensorrt", {"unet": runner}))


def test_a_pipeline_on_engines_there_and_back(engine_pipe: OneStepPipeline) -> None:
    runner = engine_pipe.runners["unet"]
    engine_pipe.swap_adaptor("night")
    assert_weights(runner.engine, scaled_weights(engine_pipe.bundle, 0.5))
    engine_pipe.swap_adaptor(None)
    assert_weights(runner.engine, {})
    assert engine_pipe.swapped is None
    assert not runner.closed


def test_an_engine_that_computes_wrongly_afterwards_is_closed(engine_pipe: OneStepPipeline) -> None:
    runner = engine_pipe.runners["unet"]
    runner.output = runner.output + np.random.default_rng(0).normal(size=runner.output.shape)
    with pytest.raises(RefitFailedError, match=r"unet after the swap is .* dB from PyTorch"):
        engine_pipe.swap_adaptor("night")
    assert runner.closed
    assert engine_pipe.swapped is None


def test_an_engine_that_cannot_take_it_stays_open(engine_pipe: OneStepPipeline) -> None:
    runner = engine_pipe.runners["unet"]
    runner.engine.refittable = False
    with pytest.raises(HipaError, match="--backend tensorrt --refit"):
        engine_pipe.swap_adaptor("night")
    assert not runner.closed


@pytest.mark.parametrize("backend", ["openvino", "openvino-bf16"])
def test_openvino_does_not_swap(engine_pipe: OneStepPipeline, backend: str) -> None:
    engine_pipe.backend = backend
    with pytest.raises(
        HipaError, match=rf"{backend} does not swap adaptors\. Use --backend onnxruntime"
    ):
        engine_pipe.swap_adaptor("night")


# For real: TensorRT-RTX from here on.


@pytest.mark.parametrize("stage", ["text_encoder", "unet", "vae_decoder"])
def test_every_weight_of_the_network_is_an_initializer(stage: str) -> None:
    path = BUNDLE / stage / "model.onnx"
    trt, network, _alive = parse(path)
    model = onnx.load(path)
    found = network_weights(trt, network, model)
    own = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    assert {
        name for name, value in own.items() if value.dtype.kind == "f"
    } - found.keys() == settings(model)
    for name, value in found.items():
        np.testing.assert_array_equal(np.asarray(value).reshape(-1), own[name].reshape(-1))
        assert network.mark_weights_refittable(name)


def settings(model) -> set[str]:
    """Scales of a Resize, limits of a Clip: the parser makes settings of a layer of them."""
    nodes = [node for node in model.graph.node if node.op_type in ("Resize", "Clip")]
    return {name for node in nodes for name in node.input[1:] if name}


def build_refittable(bundle: Bundle) -> bytes:
    """An engine of the UNet for this GPU whose weights ``refittable_weights`` are marked, and no other.

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
        trt.Refitter: ["get_all_weights", "get_weights_prototype", "set_named_weights", "get_missing_weights",
                       "refit_cuda_engine"],
        trt.ICudaEngine: ["refittable"],
        trt.Weights: ["size", "dtype"],
        trt.INetworkDefinition: ["mark_weights_refittable"],
        trt.BuilderFlag: ["REFIT", "REFIT_INDIVIDUAL"],
    }  # fmt: skip
    assert [
        name for owner, wanted in names.items() for name in wanted if not hasattr(owner, name)
    ] == []


@pytest.mark.gpu
@pytest.mark.skipif(find_gpu() is None, reason="no NVIDIA GPU with a driver")
def test_on_a_gpu_there_and_back(tmp_path: Path) -> None:
    """Refit to scaled weights and back: the scaled output is ONNX Runtime's, the last is the first to the bit."""
    bundle = Bundle.open(BUNDLE)
    changed = scaled_weights(bundle, 0.9, 6)
    with np.load(bundle.path("reference/tensors.npz")) as tensors:
        feed = {"noise": tensors["noise"], "context": tensors["context"].astype(np.float16)}
    path = tmp_path / "unet.engine"
    path.write_bytes(build_refittable(bundle))
    spec, outputs = bundle.stages["unet"].spec, []
    with TensorRTRunner([(spec, path)], "rtx") as runner:
        for values in ({}, changed, {}):
            change = partial(refit_engine, onnx=UNET, changed=values, library="rtx", remedy=REMEDY)
            runner.change_engine(change)
            outputs.append(runner(**feed)["latents"])
    with OnnxRuntimeRunner(UNET, spec, "onnxruntime", weights=changed) as reference:
        np.testing.assert_allclose(outputs[1], reference(**feed)["latents"], rtol=0.05, atol=0.1)
    np.testing.assert_array_equal(outputs[0], outputs[2])

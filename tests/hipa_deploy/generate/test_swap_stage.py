"""Swapping the adaptor of a loaded pipeline, on a fake engine (tests/engines/fake_refit.py)."""

from __future__ import annotations

import shutil
import threading
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hipa_deploy import OneStepPipeline
from hipa_deploy.bundle.adaptor_swap import FOLDER, MANIFEST, REFERENCE, SwapManifest
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.disk.hashing import file_sha256
from hipa_deploy.embedded import BUNDLE
from hipa_deploy.engines.tensorrt.refit import RefitFailedError
from hipa_deploy.errors import HipaError
from hipa_deploy.generate import swap_stage
from hipa_deploy.generate.runner import ClosesAtExit
from hipa_deploy.generate.stages import HostStages
from tests.engines.fake_refit import FakeEngine, assert_weights, fake_trt
from tests.swap_samples import scaled_weights, write_swap

UNET = BUNDLE / "unet/model.onnx"


class FakeRunner:
    """A runner of a fake engine that gives ``output``, whatever its weights."""

    def __init__(self, spec, engine: FakeEngine, output: np.ndarray) -> None:
        self.spec = spec
        self.engine = engine
        self.output = output
        self.closed = False
        self.changes = 0

    def change_engine(self, change) -> None:
        self.changes += 1
        change(fake_trt(), self.engine)

    def look_at_engine(self, look) -> None:
        look(fake_trt(), self.engine)

    def __call__(self, **inputs):
        for tensor in self.spec.inputs:
            assert inputs[tensor.name].dtype == tensor.dtype
        return {self.spec.outputs[0].name: self.output}

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def engine_pipe(tmp_path: Path) -> OneStepPipeline:
    """A pipeline on fake engines of the embedded bundle.

    The bundle has an adaptor 'night' that changes no output.
    """
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
    assert_weights(runner.engine, UNET, scaled_weights(engine_pipe.bundle, 0.5))
    engine_pipe.swap_adaptor(None)
    assert_weights(runner.engine, UNET, {})
    assert engine_pipe.swapped is None
    assert not runner.closed


def test_an_engine_that_computes_wrongly_afterwards_is_closed(engine_pipe: OneStepPipeline) -> None:
    runner = engine_pipe.runners["unet"]
    runner.output = runner.output + np.random.default_rng(0).normal(size=runner.output.shape)
    with pytest.raises(RefitFailedError, match=r"unet after the swap is .* dB from PyTorch"):
        engine_pipe.swap_adaptor("night")
    assert runner.closed
    assert engine_pipe.swapped is None


def test_a_damaged_adaptor_changes_nothing(engine_pipe: OneStepPipeline) -> None:
    runner = engine_pipe.runners["unet"]
    night = engine_pipe.bundle.root / FOLDER / "night"
    (night / REFERENCE).write_bytes(b"no array")
    manifest = SwapManifest.model_validate_json((night / MANIFEST).read_text())
    files = manifest.files | {REFERENCE: file_sha256(night / REFERENCE)}
    (night / MANIFEST).write_text(manifest.model_copy(update={"files": files}).model_dump_json())
    with pytest.raises(HipaError, match="is not an array that can be read"):
        engine_pipe.swap_adaptor("night")
    assert_weights(runner.engine, UNET, {})
    assert not runner.closed


def test_an_engine_that_fails_with_its_new_weights_is_closed(
    engine_pipe: OneStepPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its images would name the adaptor that it had before."""
    runner = engine_pipe.runners["unet"]

    def fail(self: FakeRunner, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        raise HipaError("no memory is left on the GPU.")

    monkeypatch.setattr(FakeRunner, "__call__", fail)
    with pytest.raises(HipaError, match="no memory"):
        engine_pipe.swap_adaptor("night")
    assert runner.closed


def test_an_engine_that_cannot_take_it_stays_open(engine_pipe: OneStepPipeline) -> None:
    runner = engine_pipe.runners["unet"]
    runner.engine.refittable = False
    with pytest.raises(HipaError, match="--backend tensorrt --refit"):
        engine_pipe.swap_adaptor("night")
    assert not runner.closed


@pytest.mark.parametrize("refittable", [True, False])
def test_a_check_whether_swaps_are_possible_changes_no_engine(
    engine_pipe: OneStepPipeline, refittable: bool
) -> None:
    runner = engine_pipe.runners["unet"]
    runner.engine.refittable = refittable
    if refittable:
        engine_pipe.check_swaps()
    else:
        with pytest.raises(HipaError, match="--backend tensorrt --refit"):
            engine_pipe.check_swaps()
    assert runner.changes == 0
    assert not runner.closed


@pytest.mark.parametrize("backend", ["openvino", "openvino-bf16"])
def test_openvino_does_not_swap(engine_pipe: OneStepPipeline, backend: str) -> None:
    pipe = OneStepPipeline(engine_pipe.bundle, backend, engine_pipe.stages)
    with pytest.raises(
        HipaError, match=rf"{backend} does not swap adaptors\. Use --backend onnxruntime"
    ):
        pipe.swap_adaptor("night")


@pytest.mark.parametrize("low_memory", [False, True])
def test_a_closed_pipeline_says_so_and_loads_nothing(low_memory: bool) -> None:
    pipe = OneStepPipeline.load(BUNDLE, "onnxruntime", low_memory=low_memory)
    pipe.close()
    for call in (lambda: pipe("a red apple"), lambda: pipe.swap_adaptor(None)):
        with pytest.raises(HipaError, match=r"the pipeline is closed\. Load the bundle again"):
            call()
    pipe.close()


def test_what_a_swap_loaded_in_vain_is_released(
    engine_pipe: OneStepPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = engine_pipe.bundle.stages["text_encoder"].spec
    text = OpenRunner(spec, FakeEngine(UNET), np.zeros(1))
    monkeypatch.setattr(swap_stage, "swap_text_encoder", lambda *_: text)
    monkeypatch.setattr(swap_stage, "swap_stage", refuse)
    styled: Any = SimpleNamespace(manifest=SimpleNamespace(texts=("text_encoder",)))
    with pytest.raises(HipaError, match="it does not fit"):
        engine_pipe._loaded.swap(styled)
    assert text.closed
    assert engine_pipe.swapped is None


def test_a_swap_inside_a_call_does_not_wait_for_another_swap(tmp_path: Path) -> None:
    bundle = Bundle.open(Path(shutil.copytree(BUNDLE, tmp_path / "bundle")))
    night = write_swap(bundle, bundle.root / FOLDER / "night", scaled_weights(bundle, 0.5))
    pipe = OneStepPipeline.load(bundle.root, "onnxruntime")
    other = threading.Thread(target=pipe.swap_adaptor, args=(night,), daemon=True)
    errors: list[str] = []

    def timer(stage: str) -> AbstractContextManager[object]:
        if stage == "unet":
            other.start()
            while not pipe._loaded._use._change_wanted:  # it has loaded, and waits for this call
                time.sleep(0.01)
            with pytest.raises(HipaError, match="from inside one of its own calls") as error:
                pipe.swap_adaptor("night")
            errors.append(str(error.value))
        return nullcontext()

    call = threading.Thread(target=pipe, args=("a cat",), kwargs={"timer": timer}, daemon=True)
    call.start()
    call.join(20)
    other.join(20)
    assert len(errors) == 1
    assert pipe.swapped is not None
    pipe.close()


class OpenRunner(FakeRunner, ClosesAtExit):
    """As the session of ONNX Runtime, a context manager."""


def refuse(*_: object) -> None:
    raise HipaError("it does not fit")

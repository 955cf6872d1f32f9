"""The time of each layer, from real and fake profilers."""

from __future__ import annotations

import io
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from hipa_deploy.engines.latency.layer_times import (
    LayerTime,
    by_op,
    node_times,
    profile_layers,
    render_layers,
    stage_inputs,
)
from hipa_deploy.errors import HipaError
from hipa_deploy.generate.pipeline import OneStepPipeline
from hipa_deploy.generate.stages import HostStages
from tests.sdxl_samples import sdxl_bundle

PROMPT = "3d emoji of a red apple"


@pytest.fixture(scope="module")
def pipeline():
    with OneStepPipeline.load("emoji", "onnxruntime") as pipe:
        yield pipe


def test_onnxruntime_times_its_own_nodes(pipeline):
    """The real profiler on the embedded bundle."""
    found = profile_layers(pipeline, PROMPT)
    assert list(found) == ["text_encoder", "unet", "vae_decoder"]
    for layers in found.values():
        assert sum(layer.percent for layer in layers) == pytest.approx(100)
        times = [layer.ms for layer in layers]
        assert times == sorted(times, reverse=True)
        assert all(layer.op for layer in layers)
    assert "Conv" in by_op(found["vae_decoder"])
    assert "Conv" not in by_op(found["text_encoder"])
    # The pipeline is still open.
    pipeline(PROMPT, seed=0)


def test_the_feeds_are_those_of_the_pipeline(pipeline):
    inputs = stage_inputs(pipeline, PROMPT)
    assert inputs["text_encoder"]["tokens"].shape == (1, 77)
    latents = pipeline.runners["unet"](**inputs["unet"])["latents"]
    assert np.array_equal(latents, inputs["vae_decoder"]["latents"])


def test_the_feeds_of_a_batch_of_sdxl(tmp_path):
    """Of several images the pipeline encodes each prompt by itself, without the whole batch."""
    with OneStepPipeline.load(sdxl_bundle(tmp_path).root, "onnxruntime") as pipe:
        for prompt in (PROMPT, "a (red:1.3) apple"):
            inputs = stage_inputs(pipe, prompt)
            assert {value.shape for value in inputs["text_encoder"].values()} == {(2, 77)}
            assert list(inputs["text_encoder"]) == ["tokens", "tokens_2"]
            made = pipe.runners["text_encoder"](**inputs["text_encoder"])
            conditioning = inputs["unet"]["conditioning"]
            np.testing.assert_allclose(made["conditioning"], conditioning, atol=1e-2)


def test_a_runner_that_can_profile_itself_does(pipeline):
    """A fake of TensorRT's runner: its first call is slow, and two layers share a name."""

    class Profiling:
        def __init__(self, runner) -> None:
            self.spec = runner.spec
            self.calls = 0
            self._runner = runner

        def __call__(self, **inputs):
            return self._runner(**inputs)

        def profile_layers(self, **inputs) -> list[tuple[str, float]]:
            assert set(inputs) == {tensor.name for tensor in self.spec.inputs}
            self.calls += 1
            return [("conv", 100.0 if self.calls == 1 else 1.0), ("conv", 3.0)]

    runners = {name: Profiling(runner) for name, runner in pipeline.runners.items()}
    profiled = OneStepPipeline(pipeline.bundle, "rtx", HostStages("rtx", runners))
    found = profile_layers(profiled, PROMPT)
    assert found["unet"] == (
        LayerTime(name="conv", op=None, ms=3.0, percent=75.0),
        LayerTime(name="conv", op=None, ms=1.0, percent=25.0),
    )


def test_a_backend_whose_profiler_times_the_host_is_refused():
    pipeline = SimpleNamespace(backend="onnxruntime-cuda", runners={"unet": object()})
    message = "onnxruntime-cuda has no profiler of layers that times the device"
    with pytest.raises(HipaError, match=message):
        profile_layers(pipeline, PROMPT)


def test_the_first_run_of_a_node_does_not_count():
    def event(name: str, dur: int, **more) -> dict:
        return {"cat": "Node", "name": name, "dur": dur, "args": {"op_name": "Conv"}, **more}

    events = [
        event("a_kernel_time", 9000),
        event("a_kernel_time", 1000),
        event("a_kernel_time", 3000),
        event("a_fence_before", 7000),
        event("once_kernel_time", 5000),
        {"cat": "Session", "name": "model_run", "dur": 1},
    ]
    assert node_times(events) == [("a", "Conv", 2.0)]


def test_the_table_has_the_slowest_layers_and_one_row_for_all_others():
    layers = []
    for number in range(10):
        op = "Conv" if number < 2 else None
        layers.append(LayerTime(name=f"node{number}", op=op, ms=1.0, percent=10.0))
    console = Console(file=io.StringIO(), width=100)
    console.print(render_layers("unet", layers, rows=3))
    text = console.file.getvalue()
    for part in ("Layers of unet", "node2", "7 more", "7.000", "70.0", "Conv 20 %"):
        assert part in text
    assert "node3" not in text

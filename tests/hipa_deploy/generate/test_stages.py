"""Stages as one thing to run: which of them run, under which names, and who times them."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest

from hipa_deploy.bundle.manifest import OneStep, StageSpec, TensorSpec
from hipa_deploy.errors import HipaError
from hipa_deploy.generate.stages import HostStages, name_along_path, output_names, stage_feed
from hipa_deploy.generate.x0 import predict_x0

STEP = OneStep(
    prediction_type="epsilon",
    timestep=999,
    alpha_bar=0.0046601,
    scaling_factor=0.18215,
    latent_shape=(4, 2, 2),
    height=16,
    width=16,
)


def tensor(name: str, dtype: str = "float32", shape: tuple = (1,)) -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=shape)


class Scaling:
    """A runner whose every output is its first input times a factor; it keeps what it was fed."""

    def __init__(self, name: str, inputs: list[TensorSpec], output: str, factor: float) -> None:
        self.spec = StageSpec(name=name, inputs=tuple(inputs), outputs=(tensor(output),))
        self.factor = factor
        self.fed: list[dict[str, np.ndarray]] = []
        self.closed = 0

    def __call__(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        self.fed.append(inputs)
        first = inputs[self.spec.inputs[0].name]
        return {self.spec.outputs[0].name: first * first.dtype.type(self.factor)}

    def close(self) -> None:
        self.closed += 1


def onestep() -> dict[str, Scaling]:
    return {
        "text_encoder": Scaling("text_encoder", [tensor("tokens")], "context", 2),
        "unet": Scaling("unet", [tensor("noise"), tensor("context")], "latents", 3),
        "vae_decoder": Scaling("vae_decoder", [tensor("latents")], "images", 5),
    }


def generic(dtype: str = "float32") -> dict[str, Scaling]:
    sample = tensor("sample", dtype)
    states = tensor("encoder_hidden_states", dtype)
    unet_inputs = [sample, tensor("timestep", "int64"), states]
    latent = tensor("latent_sample", dtype)
    text = Scaling("text_encoder", [tensor("input_ids", "int64")], "last_hidden_state", 2)
    return {
        "text_encoder": text,
        "unet": Scaling("unet", unet_inputs, "out_sample", 0.5),
        "vae_decoder": Scaling("vae_decoder", [latent], "sample", 0.01),
    }


def test_a_stage_takes_what_the_one_before_gave() -> None:
    stages = HostStages("onnxruntime", onestep())
    feed = {"tokens": np.ones(1, np.float32), "noise": np.full(1, 7, np.float32)}
    made = stages.run(feed, ("images", "context"))
    assert list(made) == ["images", "context"]
    assert made["images"] == 7 * 3 * 5
    assert made["context"] == 2


def test_a_stage_whose_outputs_are_known_does_not_run() -> None:
    runners = onestep()
    seen: list[str] = []
    feed = {"context": np.ones(1, np.float32), "noise": np.ones(1, np.float32)}
    HostStages("onnxruntime", runners).run(
        feed, ("images",), lambda name: nullcontext(seen.append(name))
    )
    assert runners["text_encoder"].fed == []
    assert seen == ["unet", "vae_decoder"]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_generic_layout_leaves_timestep_x0_and_pixels_to_numpy(dtype: str) -> None:
    runners = generic(dtype)
    seen: list[str] = []
    noise = np.linspace(-1, 1, 12, dtype=np.float32).reshape(1, 3, 2, 2)
    made = HostStages("onnxruntime", runners, STEP).run(
        {"tokens": np.ones(1, np.int64), "noise": noise},
        ("output", "latents", "sample", "images"),
        lambda name: nullcontext(seen.append(name)),
    )
    assert seen == ["text_encoder", "unet", "vae_decoder"]

    (fed,) = runners["unet"].fed
    assert fed["timestep"].tolist() == [999]
    assert fed["timestep"].dtype == np.int64
    assert fed["sample"].dtype == dtype

    output = made["output"]
    expected = predict_x0(noise, output, STEP.alpha_bar, "epsilon") / STEP.scaling_factor
    np.testing.assert_array_equal(made["latents"], expected)
    assert runners["vae_decoder"].fed[0]["latent_sample"].dtype == dtype

    # By hand: pixels in [-1, 1] with channels first -> levels of 0 to 255 with channels last.
    sample = made["sample"].astype(np.float32)
    level = round((min(1.0, max(-1.0, float(sample[0, 2, 1, 0]))) + 1) * 127.5)
    assert made["images"].shape == (1, 2, 2, 3)
    assert made["images"].dtype == np.uint8
    assert made["images"][0, 1, 0, 2] == level


def test_names_along_the_path() -> None:
    unet = generic()["unet"].spec
    decoder = generic()["vae_decoder"].spec
    assert name_along_path(unet, "sample", "generic") == "noise"
    assert name_along_path(decoder, "sample", "generic") == "sample"
    assert name_along_path(unet, "sample", "onestep") == "sample"
    assert output_names(unet, "generic") == ("output",)
    assert output_names(decoder, "generic") == ("sample",)


def test_the_onestep_layout_changes_no_type() -> None:
    spec = onestep()["unet"].spec
    tensors = {"noise": np.ones(1, np.float16), "context": np.ones(1, np.float32)}
    assert stage_feed(spec, tensors, "onestep")["noise"].dtype == np.float16


def test_host_stages_keep_nothing_on_a_device() -> None:
    with pytest.raises(HipaError, match=r"gives host arrays\. Use tensorrt or rtx"):
        HostStages("onnxruntime", onestep()).run_on_device({})


def test_closing_closes_every_stage() -> None:
    runners = onestep()
    HostStages("onnxruntime", runners).close()
    assert [runner.closed for runner in runners.values()] == [1, 1, 1]

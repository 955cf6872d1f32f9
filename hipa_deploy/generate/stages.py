"""A bundle's stages as one thing to run: a feed goes in, the tensors that were asked for come out.

Tensors are called along the path by these names, whatever the ONNX files call them:

========= ======================= ============================================================
name      shape, dtype            what it is
========= ======================= ============================================================
tokens    [B, L] int64            token ids of the prompts
tokens_2  [B, L] int64            the same as the second tokenizer of SDXL reads them
sizes     [B, 6] int64            the size, of a bundle of SDXL for images of several sizes
context   [B, L, D]               what the text encoder makes of them
conditioning [B, S, K]            what else SDXL's UNet takes of the prompt, at S starts of the step
pooled    [B, P]                  what SDXL's base UNet takes in its place, in a bundle that refines
noise     [B, C, h, w] float32    standard normal noise, one stream a seed (``bundle_noise``)
image     [B, H, W, 3] uint8      the source image of an edit, an inpainting or an upscaling
source    [B, C, h, w]            its latents
mask      [B, 1, h, w] float32    what to repaint: 1, what to keep: 0
step      [1] int64               which of an edit's strengths
timestep  [1] int64               the step's, an input of a generic UNet
time_ids  [B, 6]                  the size of the images, an input of SDXL's generic UNet
context_1 [B, L, D1]              the first text encoder's part of the context (SDXL, generic)
context_2 [B, L, D2]              the second one's
pooled    [B, P]                  the second one's pooled vector (SDXL, generic)
output    [B, C, h, w]            what a generic UNet predicts (the generic layout only)
latents   [B, C, h, w]            x0, as the decoder takes it
sample    [B, 3, H, W]            pixels in [-1, 1] (the generic layout only)
images    [B, H, W, 3] uint8      the result
========= ======================= ============================================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from hipa_deploy.bundle.adaptor_swap import TEXT_STAGE, TEXT_STAGE_2
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.bundle.manifest import Layout, OneStep, StageSpec
from hipa_deploy.errors import HipaError
from hipa_deploy.generate.runner import Runner
from hipa_deploy.generate.x0 import predict_x0
from hipa_deploy.tasks import size_numbers

Tensors = dict[str, np.ndarray]
Timer = Callable[[str], AbstractContextManager[object]]
"""Called with a stage's name, it gives a context that is entered while the stage runs."""

# What the generic layout, which is optimum's, calls the tensors of the path.
GENERIC_NAMES = {
    "input_ids": "tokens",
    "last_hidden_state": "context",
    "encoder_hidden_states": "context",
    "out_sample": "output",
    "latent_sample": "latents",
    "text_embeds": "pooled",
}
# SDXL's two text encoders in the generic layout. Each gives all of its hidden states, because
# optimum asks for all. The path takes the last of them, HIDDEN_STATE and the highest number.
HIDDEN_STATE = "hidden_states."
CONTEXT_PARTS = {TEXT_STAGE: "context_1", TEXT_STAGE_2: "context_2"}


def name_along_path(spec: StageSpec, name: str, layout: Layout) -> str | None:
    """What the path calls the tensor ``name`` of a stage; None for one that it does not take."""
    if layout == "onestep":
        return name
    # optimum's 'sample' is the noise where it goes in and the image where it comes out.
    if name == "sample":
        return "noise" if spec.name == "unet" else "sample"
    if name == "input_ids" and spec.name == TEXT_STAGE_2:
        return "tokens_2"
    if is_of_text_pair(spec) and name.startswith((HIDDEN_STATE, "last_hidden_state")):
        return CONTEXT_PARTS[spec.name] if name == spec.outputs[-1].name else None
    return GENERIC_NAMES.get(name, name)


def is_of_text_pair(spec: StageSpec) -> bool:
    """Whether a stage is one of SDXL's two text encoders in the generic layout."""
    return spec.name in CONTEXT_PARTS and spec.outputs[-1].name.startswith(HIDDEN_STATE)


def stage_feed(spec: StageSpec, tensors: Mapping[str, np.ndarray], layout: Layout) -> Tensors:
    """What a stage is fed, by the names of its file, from the tensors of the path.

    Raises:
        KeyError: a tensor that the stage takes is not among ``tensors``.

    """
    feed = {}
    for tensor, name in zip(spec.inputs, input_names(spec, layout), strict=True):
        value = tensors[name]
        # Only the generic layout changes a type here: noise and x0 are float32, and its graphs may
        # be float16. A stage of the onestep layout takes what it is given, or refuses it.
        feed[tensor.name] = value.astype(tensor.dtype, copy=False) if layout == "generic" else value
    return feed


def along_path(spec: StageSpec, made: Mapping[str, np.ndarray], layout: Layout) -> Tensors:
    """What a stage gave, as the path calls it. What the path does not take is left out."""
    tensors = {}
    for own, value in made.items():
        name = name_along_path(spec, own, layout)
        if name is not None:
            tensors[name] = value
    return tensors


def output_names(spec: StageSpec, layout: Layout) -> tuple[str, ...]:
    """What the path calls the outputs of a stage that it takes."""
    names = [name_along_path(spec, tensor.name, layout) for tensor in spec.outputs]
    return tuple(name for name in names if name is not None)


def input_names(spec: StageSpec, layout: Layout) -> tuple[str, ...]:
    """What the path calls the inputs of a stage."""
    names = [name_along_path(spec, tensor.name, layout) for tensor in spec.inputs]
    return tuple(name for name in names if name is not None)


def spared_by(spec: StageSpec, layout: Layout) -> set[str]:
    """What makes a run of a stage needless once it is known: its outputs.

    Of SDXL's two text encoders it is the whole context: a prompt that is remembered has no parts.
    """
    names = set(output_names(spec, layout))
    if layout == "generic" and is_of_text_pair(spec):
        return names - {CONTEXT_PARTS[spec.name]} | {"context"}
    return names


def taken_names(spec: StageSpec, layout: Layout) -> tuple[str, ...]:
    """What a stage takes from the path, with what numpy needs of it right after the stage."""
    names = input_names(spec, layout)
    if layout == "generic" and spec.name == TEXT_STAGE_2:
        return (*names, CONTEXT_PARTS[TEXT_STAGE])
    return names


def computed_names(bundle: Bundle, stage: str) -> list[str]:
    """What the path calls all that is known once ``stage`` has run.

    In the generic layout numpy adds to the stages what their graphs leave out.
    """
    layout = bundle.manifest.layout
    names = list(output_names(bundle.stages[stage].spec, layout))
    added = {"unet": "latents", "vae_decoder": "images", TEXT_STAGE_2: "context"}
    if layout == "generic" and stage in added:
        names.append(added[stage])
    return names


def join_context(tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    """The context [B, L, D1 + D2] of SDXL: both text encoders' parts side by side."""
    return np.concatenate([tensors[name] for name in CONTEXT_PARTS.values()], axis=-1)


def split_context(context_BLD: np.ndarray, widths: Sequence[int]) -> Tensors:
    """The parts that ``join_context`` joined, of these widths."""
    parts = np.split(context_BLD, [widths[0]], axis=-1)
    return dict(zip(CONTEXT_PARTS.values(), parts, strict=True))


class Stages(Protocol):
    """Every stage of a bundle, loaded on one backend.

    The caller never asks which backend it is: host stages hand tensors over in host memory,
    TensorRT's run as one CUDA graph.
    """

    runners: dict[str, Runner]
    """Each stage by itself, in the order in which they run: to swap, check or time one alone."""

    def run(
        self, feed: Mapping[str, np.ndarray], outputs: Sequence[str], timer: Timer = nullcontext
    ) -> Tensors:
        """Run what is needed and return the tensors named ``outputs``.

        A stage whose outputs are all in ``feed`` does not run: a context that is known saves the
        text encoder.

        Raises:
            HipaError: a tensor that is not what a stage takes, or a backend that fails.

        """

    def run_on_device(self, feed: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """The last stage's outputs as ``DeviceArray``, valid until the next run.

        Raises:
            HipaError: this backend gives host arrays.

        """

    def close(self) -> None:
        """Release every stage. Calling it twice is harmless."""


class HostStages:
    """Stages that hand their tensors over in host memory, one after the other.

    Args:
        backend: the backend's name, for messages.
        runners: the bundle's stages, in the order in which they run.
        one_step: the constants of the step, where the layout is generic: its timestep is an input,
            and x0 and the conversion to uint8 are left to numpy. None for the onestep layout.

    """

    def __init__(
        self, backend: str, runners: dict[str, Runner], one_step: OneStep | None = None
    ) -> None:
        self.runners = runners
        self._backend = backend
        self._one_step = one_step

    def run(
        self, feed: Mapping[str, np.ndarray], outputs: Sequence[str], timer: Timer = nullcontext
    ) -> Tensors:
        """One loop over the stages; see ``Stages.run``."""
        tensors = dict(feed)
        for stage in self._in_order():
            if stage.outputs <= tensors.keys():
                continue
            with stage.timed(timer):
                tensors |= stage.compute(tensors)
        return {name: tensors[name] for name in outputs}

    def _in_order(self) -> list[_RunnerStage | _NumpyStage]:
        """The runners, and the arithmetic that the generic layout leaves between them."""
        layout: Layout = "generic" if self._one_step else "onestep"
        stages: list[_RunnerStage | _NumpyStage] = []
        for name, runner in self.runners.items():
            if self._one_step and name == "unet":
                stages.append(_timestep_stage(self._one_step))
                if "time_ids" in input_names(runner.spec, layout):
                    stages.append(_size_stage(self._one_step))
            stages.append(_RunnerStage(name, runner, layout))
            if self._one_step and name == TEXT_STAGE_2:
                stages.append(_join_stage())
            if self._one_step and name == "unet":
                stages.append(_x0_stage(self._one_step))
            if self._one_step and name == "vae_decoder":
                stages.append(_uint8_stage())
        return stages

    def run_on_device(self, feed: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Always a HipaError: nothing here stays on a device."""
        raise HipaError(
            f"backend {self._backend} gives host arrays. "
            "Use tensorrt or rtx, and the onestep layout."
        )

    def close(self) -> None:
        """Release every stage."""
        for runner in self.runners.values():
            runner.close()


@dataclass(frozen=True)
class _RunnerStage:
    """A runner whose tensors are called as the path calls them."""

    name: str
    runner: Runner
    layout: Layout

    @property
    def outputs(self) -> set[str]:
        return spared_by(self.runner.spec, self.layout)

    def compute(self, tensors: Tensors) -> Tensors:
        made = self.runner(**stage_feed(self.runner.spec, tensors, self.layout))
        return along_path(self.runner.spec, made, self.layout)

    def timed(self, timer: Timer) -> AbstractContextManager[object]:
        return timer(self.name)


@dataclass(frozen=True)
class _NumpyStage:
    """Arithmetic between two stages, which takes microseconds: it is not timed as a stage."""

    outputs: set[str]
    compute: Callable[[Tensors], Tensors] = field(repr=False)

    def timed(self, timer: Timer) -> AbstractContextManager[object]:
        return nullcontext()


def _timestep_stage(step: OneStep) -> _NumpyStage:
    """timestep int64 [1], the same at every call."""
    return _NumpyStage({"timestep"}, lambda _: {"timestep": np.asarray([step.timestep], np.int64)})


def _size_stage(step: OneStep) -> _NumpyStage:
    """time_ids float32 [B, 6]: what SDXL's UNet is told of the size."""

    def compute(tensors: Tensors) -> Tensors:
        numbers_6 = np.asarray(size_numbers(step.height, step.width), np.float32)
        return {"time_ids": np.tile(numbers_6, (len(tensors["noise"]), 1))}

    return _NumpyStage({"time_ids"}, compute)


def _join_stage() -> _NumpyStage:
    """context_1, context_2 -> context."""
    return _NumpyStage({"context"}, lambda tensors: {"context": join_context(tensors)})


def _x0_stage(step: OneStep) -> _NumpyStage:
    """noise, output -> latents, unscaled: what the VAE's decoder takes."""

    def compute(tensors: Tensors) -> Tensors:
        x0_BCHW = predict_x0(
            tensors["noise"],
            tensors["output"],
            step.alpha_bar,
            step.prediction_type,
            step.method,
        )
        return {"latents": x0_BCHW / step.scaling_factor}

    return _NumpyStage({"latents"}, compute)


def _uint8_stage() -> _NumpyStage:
    """sample [B, 3, H, W] in [-1, 1] -> images uint8 [B, H, W, 3]."""

    def compute(tensors: Tensors) -> Tensors:
        levels = np.round((tensors["sample"].astype(np.float32).clip(-1, 1) + 1) * 127.5)
        return {"images": levels.astype(np.uint8).transpose(0, 2, 3, 1)}

    return _NumpyStage({"images"}, compute)


def host_stages(bundle: Bundle, backend: str, runners: dict[str, Runner]) -> HostStages:
    """The stages of ``bundle``, each on its runner, as one thing to run."""
    generic = bundle.manifest.layout == "generic"
    return HostStages(backend, runners, bundle.manifest.one_step if generic else None)

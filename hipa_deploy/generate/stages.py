"""A bundle's stages as one thing to run: a feed goes in, the tensors that were asked for come out.

Tensors are called along the path by these names, whatever the ONNX files call them:

========= ======================= ============================================================
name      shape, dtype            what it is
========= ======================= ============================================================
tokens    [B, L] int64            token ids of the prompts
tokens_2  [B, L] int64            the same as the second tokenizer of SDXL reads them
context   [B, L, D]               what the text encoder makes of them
conditioning [B, S, K]            what else SDXL's UNet takes of the prompt, at S starts of the step
pooled    [B, P]                  what SDXL's base UNet takes in its place, in a bundle that refines
noise     [B, C, h, w] float32    standard normal noise, one stream a seed (``bundle_noise``)
image     [B, H, W, 3] uint8      the source image of an edit, an inpainting or an upscaling
source    [B, C, h, w]            its latents
mask      [B, 1, h, w] float32    what to repaint: 1, what to keep: 0
step      [1] int64               which of an edit's strengths
timestep  [1] int64               the step's, an input of a generic UNet
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

from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.bundle.manifest import Layout, OneStep, StageSpec
from hipa_deploy.errors import HipaError
from hipa_deploy.generate.runner import Runner
from hipa_deploy.generate.x0 import predict_x0

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
}


def name_along_path(spec: StageSpec, name: str, layout: Layout) -> str:
    """What the path calls the tensor ``name`` of a stage."""
    if layout == "onestep":
        return name
    # optimum's 'sample' is the noise where it goes in and the image where it comes out.
    if name == "sample":
        return "noise" if spec.name == "unet" else "sample"
    return GENERIC_NAMES.get(name, name)


def stage_feed(spec: StageSpec, tensors: Mapping[str, np.ndarray], layout: Layout) -> Tensors:
    """What a stage is fed, by the names of its file, from the tensors of the path.

    Raises:
        KeyError: a tensor that the stage takes is not among ``tensors``.

    """
    feed = {}
    for tensor in spec.inputs:
        value = tensors[name_along_path(spec, tensor.name, layout)]
        # Only the generic layout changes a type here: noise and x0 are float32, and its graphs may
        # be float16. A stage of the onestep layout takes what it is given, or refuses it.
        feed[tensor.name] = value.astype(tensor.dtype, copy=False) if layout == "generic" else value
    return feed


def output_names(spec: StageSpec, layout: Layout) -> tuple[str, ...]:
    """What the path calls the outputs of a stage."""
    return tuple(name_along_path(spec, tensor.name, layout) for tensor in spec.outputs)


def input_names(spec: StageSpec, layout: Layout) -> tuple[str, ...]:
    """What the path calls the inputs of a stage."""
    return tuple(name_along_path(spec, tensor.name, layout) for tensor in spec.inputs)


def computed_names(bundle: Bundle, stage: str) -> list[str]:
    """What the path calls all that is known once ``stage`` has run.

    In the generic layout numpy adds to the UNet and to the decoder what their graphs leave out.
    """
    layout = bundle.manifest.layout
    names = list(output_names(bundle.stages[stage].spec, layout))
    added = {"unet": "latents", "vae_decoder": "images"}
    if layout == "generic" and stage in added:
        names.append(added[stage])
    return names


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
            stages.append(_RunnerStage(name, runner, layout))
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
        return set(output_names(self.runner.spec, self.layout))

    def compute(self, tensors: Tensors) -> Tensors:
        made = self.runner(**stage_feed(self.runner.spec, tensors, self.layout))
        return {name_along_path(self.runner.spec, n, self.layout): v for n, v in made.items()}

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

"""The tasks: where the one step starts, and what of the source image remains after it.

The tasks share everything else.

With e noise, z0 the latents of a source image (the mean of the VAE's posterior, scaled), m a mask
(1: repaint), and a = sqrt(alpha_bar), s = sqrt(1 - alpha_bar) at the step's timestep:

    generate   z = e
    edit       z = a z0 + s e             at a timestep for each strength (SDEdit, Meng et al. 2022)
    inpaint    z = m e + (1 - m) z0       and afterwards x0 = m x0 + (1 - m) z0
    upscale    z = z0                     of the enlarged image, no noise (OSEDiff, Wu et al. 2024)

A UNet made for inpainting starts from z = e and sees [z, m, z0], nine channels (Rombach et al.
2022). HiPA's own recipes of these tasks are not public: inpainting from clean latents around the
hole is this project's choice.

The formulas are plain arithmetic: training and export give them torch tensors, the runtime numpy
arrays.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

Task = Literal["generate", "edit", "inpaint", "upscale"]

# What a step takes beside the text context, in the order of the UNet stage's inputs.
STEP_INPUTS: dict[Task, tuple[str, ...]] = {
    "generate": ("noise",),
    "edit": ("noise", "source"),
    "inpaint": ("noise", "source", "mask"),
    "upscale": ("source",),
}


def unet_inputs(task: Task, strengths: int = 1) -> tuple[str, ...]:
    """Names of a UNet stage's inputs, in order.

    'step' is the number of the strength, where an edit has several ``strengths``.
    """
    return (*STEP_INPUTS[task], *(("step",) if strengths > 1 else ()), "context")


def is_inpainting_unet(in_channels: int, latent_channels: int) -> bool:
    """Whether a UNet was made for inpainting: it sees [z, mask, source], 2 C + 1 channels.

    Example:
        >>> is_inpainting_unet(9, 4)
        True

    """
    return in_channels == 2 * latent_channels + 1


def start_latents(
    task: Task, given: Mapping[str, Any], alpha_bar: Any, *, concatenates: bool = False
) -> Any:
    """Where the step starts, [B, C, h, w], from the ``STEP_INPUTS`` of ``task``.

    Noise and source are [B, C, h, w], the mask [B, 1, h, w] in [0, 1]; ``alpha_bar`` is a number or
    [B, 1, 1, 1]. ``concatenates``: the UNet sees mask and source as channels of their own.
    """
    if task == "edit":
        return alpha_bar**0.5 * given["source"] + (1 - alpha_bar) ** 0.5 * given["noise"]
    if task == "inpaint" and not concatenates:
        return given["mask"] * given["noise"] + (1 - given["mask"]) * given["source"]
    return given["source"] if task == "upscale" else given["noise"]


def finish_latents(task: Task, x0_BCHW: Any, given: Mapping[str, Any]) -> Any:
    """The latents to decode: inpainting keeps the source's outside the mask."""
    if task == "inpaint":
        return given["mask"] * x0_BCHW + (1 - given["mask"]) * given["source"]
    return x0_BCHW


def strength_timestep(strength: float, train_timesteps: int = 1000) -> int:
    """The timestep at which an edit of ``strength``, in (0, 1], starts: 999 for 1, 499 for 0.5."""
    return max(0, round(strength * train_timesteps) - 1)

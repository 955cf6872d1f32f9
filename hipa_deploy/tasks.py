"""The tasks: what the one step starts from, and what it keeps of a source image.

Notation: e is noise; z0 the latents of a source image (the mean of the VAE's posterior, scaled); m
a mask, 1 where the image is repainted; a = sqrt(alpha_bar) and s = sqrt(1 - alpha_bar) at the
step's timestep.

    generate   z = e                      of some methods of others z = n e, with a factor n
    edit       z = a z0 + s e             at a timestep for each strength (SDEdit, Meng et al. 2022)
    inpaint    z = m e + (1 - m) z0       and afterwards x0 = m x0 + (1 - m) z0
    upscale    z = z0                     of the enlarged image, no noise (OSEDiff, Wu et al. 2024)
    control    z = n e                    as generate; a ControlNet sees a control image beside it
                                          (Zhang et al. 2023)

A UNet made for inpainting starts from z = e and sees [z, m, z0], nine channels (Rombach et al.
2022). HiPA's own recipes of these tasks are not public: inpainting from clean latents around the
hole is this project's choice.

The formulas are plain arithmetic, so they take torch tensors (in training and export) and numpy
arrays (at run time).

Shapes: B batch; C latent channels; h, w height and width of the latent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

Task = Literal["generate", "edit", "inpaint", "upscale", "control"]
# Those that an adaptor is trained for. Under a ControlNet runs one that was trained to generate.
TrainedTask = Literal["generate", "edit", "inpaint", "upscale"]

# What a step takes besides the text context, in the order of the UNet stage's inputs.
STEP_INPUTS: dict[Task, tuple[str, ...]] = {
    "generate": ("noise",),
    "edit": ("noise", "source"),
    "inpaint": ("noise", "source", "mask"),
    "upscale": ("source",),
    "control": ("noise", "control", "control_scale"),
}


def takes_source(task: Task) -> bool:
    """Whether a task starts from the latents of a source image, which the VAE encodes.

    The others start from noise alone, and run any method's step.

    Example:
        >>> takes_source("edit"), takes_source("control")
        (True, False)

    """
    return "source" in STEP_INPUTS[task]


def unet_inputs(task: Task, strengths: int = 1, *, conditioned: bool = False) -> tuple[str, ...]:
    """Return the names of a UNet stage's inputs, in order.

    Args:
        task: what the stage is for.
        strengths: number of strengths of an edit. With several, the input 'step' is the index of
            one.
        conditioned: whether the UNet takes what else depends on the prompt, as SDXL's does.

    Example:
        >>> unet_inputs("edit", strengths=3)
        ('noise', 'source', 'step', 'context')

    """
    names = list(STEP_INPUTS[task])
    if strengths > 1:
        names.append("step")
    names.append("context")
    if conditioned:
        names.append("conditioning")
    return tuple(names)


def size_numbers(height: int, width: int) -> tuple[int, int, int, int, int, int]:
    """What SDXL's UNet is told of an image of this size that was not cropped.

    The six numbers are the original height and width, the crop's top and left, the target height
    and width: what StableDiffusionXLPipeline takes by default (``_get_add_time_ids`` of diffusers'
    pipeline_stable_diffusion_xl.py).

    Example:
        >>> size_numbers(1024, 768)
        (1024, 768, 0, 0, 1024, 768)

    """
    return (height, width, 0, 0, height, width)


def is_inpainting_unet(in_channels: int, latent_channels: int) -> bool:
    """Whether a UNet was made for inpainting: it sees [z, mask, source], 2 C + 1 channels.

    Example:
        >>> is_inpainting_unet(9, 4)
        True

    """
    return in_channels == 2 * latent_channels + 1


def start_latents(
    task: Task,
    inputs: Mapping[str, Any],
    alpha_bar: Any,
    *,
    concatenates: bool = False,
    noise_scale: float = 1.0,
) -> Any:
    """Return the latents that the one step starts from, [B, C, h, w].

    Args:
        task: decides the formula; see the module's docstring.
        inputs: those of ``STEP_INPUTS`` for the task: 'noise' and 'source' [B, C, h, w], 'mask'
            [B, 1, h, w] in [0, 1].
        alpha_bar: cumulative signal power at the step's timestep: a number, or [B, 1, 1, 1].
        concatenates: whether the UNet takes mask and source as channels of their own.
        noise_scale: of the tasks generate and control, what the noise is multiplied by.

    """
    if not takes_source(task) and noise_scale != 1:
        return noise_scale * inputs["noise"]
    if task == "edit":
        return alpha_bar**0.5 * inputs["source"] + (1 - alpha_bar) ** 0.5 * inputs["noise"]
    if task == "inpaint" and not concatenates:
        return inputs["mask"] * inputs["noise"] + (1 - inputs["mask"]) * inputs["source"]
    if task == "upscale":
        return inputs["source"]
    return inputs["noise"]


def finish_latents(task: Task, x0_BCHW: Any, inputs: Mapping[str, Any]) -> Any:
    """Return the latents to decode, [B, C, h, w]: inpainting keeps the source's outside the mask.

    Args:
        task: what the latents were made for.
        x0_BCHW: the result of the one step.
        inputs: as for ``start_latents``.

    """
    if task == "inpaint":
        return inputs["mask"] * x0_BCHW + (1 - inputs["mask"]) * inputs["source"]
    return x0_BCHW


def strength_timestep(strength: float, train_timesteps: int = 1000) -> int:
    """Return the timestep at which an edit starts.

    Args:
        strength: in (0, 1].
        train_timesteps: number of timesteps of the noise schedule.

    Example:
        >>> strength_timestep(1), strength_timestep(0.5)
        (999, 499)

    """
    return max(0, round(strength * train_timesteps) - 1)

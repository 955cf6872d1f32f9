"""One diffusion step in torch: from where a task starts straight to x0 latents.

The same formulas as hipa_deploy.generate.noise (numpy), differentiable, always combined in float32: an eps error grows by
s / a = 14.6 in x0 at t = 999 of the Stable Diffusion schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from hipa_deploy.errors import HipaError
from hipa_deploy.tasks import Task, finish_latents, start_latents


def predict_x0(
    noise_BCHW: Tensor, output_BCHW: Tensor, alpha_bar: float | Tensor, prediction_type: str
) -> Tensor:
    """x0 in float32 from the UNet's output, with a = sqrt(alpha_bar) and s = sqrt(1 - alpha_bar).

    ``alpha_bar`` is a number, or a tensor [B, 1, 1, 1].

    epsilon: (z - s eps) / a (Ho et al. 2020, equation 15); v_prediction: a z - s v (Salimans & Ho 2022); sample: x0.
    """
    noise_BCHW, output_BCHW = noise_BCHW.float(), output_BCHW.float()
    a, s = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
    if prediction_type == "epsilon":
        return (noise_BCHW - s * output_BCHW) / a
    if prediction_type == "v_prediction":
        return a * noise_BCHW - s * output_BCHW
    if prediction_type == "sample":
        return output_BCHW
    raise HipaError(
        f"prediction type {prediction_type!r} is unknown. Expected epsilon, v_prediction or sample."
    )


def one_step_latents(
    unet: Callable[..., Any],
    noise_BCHW: Tensor,
    context_BLD: Tensor,
    *,
    timestep: int,
    alpha_bar: float,
    prediction_type: str,
) -> Tensor:
    """Text to image: one UNet call without guidance, float32 x0 latents [B, C, H, W], scaled as the VAE's are."""
    return task_latents(
        unet,
        "generate",
        {"noise": noise_BCHW},
        context_BLD,
        timestep_B=torch.full((len(noise_BCHW),), timestep, device=noise_BCHW.device),
        alpha_bar=alpha_bar,
        prediction_type=prediction_type,
    )


def task_latents(
    unet: Callable[..., Any],
    task: Task,
    given: Mapping[str, Tensor],
    context_BLD: Tensor,
    *,
    timestep_B: Tensor,
    alpha_bar: float | Tensor,
    prediction_type: str,
    concatenates: bool = False,
) -> Tensor:
    """The same of any task: ``given`` holds its ``STEP_INPUTS``, ``alpha_bar`` may differ by row, [B, 1, 1, 1].

    ``concatenates``: the UNet was made for inpainting, and sees mask and source as channels after the noise.
    """
    start_BCHW = start_latents(task, given, alpha_bar, concatenates=concatenates)
    sample = (
        torch.cat([start_BCHW, given["mask"], given["source"]], dim=1)
        if concatenates
        else start_BCHW
    )
    output_BCHW = unet(sample, timestep_B, context_BLD, return_dict=False)[0]
    return finish_latents(
        task, predict_x0(start_BCHW, output_BCHW, alpha_bar, prediction_type), given
    )

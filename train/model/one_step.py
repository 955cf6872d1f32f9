"""One diffusion step in torch: from where a task starts straight to x0 latents.

Differentiable, and always combined in float32 (hipa_deploy.generate.x0 has the formulas, and why).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from hipa_deploy.generate.x0 import predict_x0
from hipa_deploy.tasks import Task, finish_latents, start_latents


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
    x0_BCHW = predict_x0(start_BCHW, output_BCHW, alpha_bar, prediction_type)
    return finish_latents(task, x0_BCHW, given)

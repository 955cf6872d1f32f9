"""One diffusion step in torch: from noise at the trained timestep straight to x0 latents.

The same formulas as hipa_deploy.one_step (numpy), differentiable, always combined in float32: an eps error grows by
s / a = 14.6 in x0 at t = 999 of the Stable Diffusion schedule.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hipa_deploy.errors import HipaError


def predict_x0(noise_BCHW: Tensor, output_BCHW: Tensor, alpha_bar: float, prediction_type: str) -> Tensor:
    """x0 in float32 from the UNet's output, with a = sqrt(alpha_bar) and s = sqrt(1 - alpha_bar).

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
    raise HipaError(f"prediction type {prediction_type!r} is unknown. Expected epsilon, v_prediction or sample.")


def one_step_latents(
    unet: Callable[..., Any],
    noise_BCHW: Tensor,
    context_BLD: Tensor,
    *,
    timestep: int,
    alpha_bar: float,
    prediction_type: str,
) -> Tensor:
    """One UNet call without guidance: float32 x0 latents [B, C, H, W], scaled as the VAE's configuration says."""
    steps_B = torch.full((len(noise_BCHW),), timestep, device=noise_BCHW.device)
    output_BCHW = unet(noise_BCHW, steps_B, context_BLD, return_dict=False)[0]
    return predict_x0(noise_BCHW, output_BCHW, alpha_bar, prediction_type)

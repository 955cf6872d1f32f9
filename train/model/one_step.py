"""One diffusion step in torch: from where a task starts straight to x0 latents.

Differentiable, and always combined in float32; hipa_deploy.generate.x0 has the formulas and the
reason.

Shape suffixes: B batch, C latent channels, H W latent size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from hipa_deploy.bundle.manifest import StepMethod
from hipa_deploy.generate.x0 import predict_x0
from hipa_deploy.tasks import Task, finish_latents, start_latents
from hipa_deploy.train.model.conditions import Conditions, predict


def one_step_latents(
    unet: Callable[..., Any],
    noise_BCHW: Tensor,
    conditions: Conditions,
    *,
    timestep: int,
    alpha_bar: float,
    prediction_type: str,
    method: StepMethod | None = None,
) -> Tensor:
    """Text to image in one UNet call, without guidance.

    Args:
        unet: diffusers' UNet2DConditionModel, or a function that is called like one.
        noise_BCHW: Standard normal, float32 [B, C, H, W].
        conditions: Of the B prompts.
        timestep: Where the step starts, 999 for pure noise.
        alpha_bar: Cumulative signal power at ``timestep``, in (0, 1).
        prediction_type: What the UNet predicts: epsilon, v_prediction or sample.
        method: The numbers of a one-step method of others; None is x0.

    Returns:
        x0 latents, float32 [B, C, H, W], scaled as the VAE's are.

    Example:
        >>> one_step_latents(
        ...     model.unet, model.noise([0, 1]), model.conditions(["a cat", "a dog"]),
        ...     timestep=999, alpha_bar=0.0046601, prediction_type="epsilon",
        ... ).shape
        torch.Size([2, 4, 64, 64])

    """
    return task_latents(
        unet,
        "generate",
        {"noise": noise_BCHW},
        conditions,
        timestep_B=torch.full((len(noise_BCHW),), timestep, device=noise_BCHW.device),
        alpha_bar=alpha_bar,
        prediction_type=prediction_type,
        method=method,
    )


def task_latents(
    unet: Callable[..., Any],
    task: Task,
    step_inputs: Mapping[str, Tensor],
    conditions: Conditions,
    *,
    timestep_B: Tensor,
    alpha_bar: float | Tensor,
    prediction_type: str,
    concatenates: bool = False,
    method: StepMethod | None = None,
) -> Tensor:
    """One step of any task; see ``one_step_latents`` for what is not named here.

    Args:
        unet: As there.
        task: The task, which decides where the step starts.
        step_inputs: The tensors that hipa_deploy.tasks.STEP_INPUTS names for ``task``: noise and
            source [B, C, H, W], mask [B, 1, H, W].
        conditions: As there.
        timestep_B: Timestep of each row, int64 [B].
        alpha_bar: Of each row, [B, 1, 1, 1], or one number for all rows.
        prediction_type: As there.
        concatenates: Whether the UNet was made for inpainting, and sees mask and source as channels
            after the noise.
        method: As there; of the task generate.

    Returns:
        x0 latents, float32 [B, C, H, W]; for inpainting they are the source's outside the mask.

    """
    # An inpainting UNet was trained to see mask and source in this order, after the noise. They are
    # conditions: the step itself starts from ``start_BCHW`` alone.
    noise_scale = method.noise_scale if method else 1.0
    start_BCHW = start_latents(
        task, step_inputs, alpha_bar, concatenates=concatenates, noise_scale=noise_scale
    )
    unet_input = start_BCHW
    if concatenates:
        channels = [start_BCHW, step_inputs["mask"], step_inputs["source"]]
        unet_input = torch.cat(channels, dim=1)  # [B, 2 C + 1, H, W]

    # predict_x0 combines them in float32, even if the UNet ran in half precision.
    output_BCHW = predict(unet, unet_input, timestep_B, conditions)
    x0_BCHW = predict_x0(start_BCHW, output_BCHW, alpha_bar, prediction_type, method)
    return finish_latents(task, x0_BCHW, step_inputs)

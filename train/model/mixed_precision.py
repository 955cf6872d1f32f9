"""Mixed precision: autocast around the UNet and the decoder, and the loss scale of fp16 gradients.

Everything between the networks, x0 and the losses, stays in float32: at t = 999 of Stable
Diffusion's schedule an error of the predicted noise is 14.6 times as large in x0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.amp import GradScaler

from hipa_deploy.errors import HipaError
from hipa_deploy.models.model_config import ModelConfig
from hipa_deploy.train.recipes.recipe import MixedPrecision, Recipe

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
Function = TypeVar("Function", bound=Callable[..., Any])


def use_tensor_cores(device: torch.device) -> None:
    """Let float32 matrix products and convolutions run as TF32 on a GPU that has it.

    TF32 rounds the factors to 10 bits of mantissa and accumulates in float32. PyTorch has it on for
    convolutions and off for matrix products. A GPU without it, and a CPU, compute as before.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")


def in_precision(function: Function, precision: MixedPrecision, device: torch.device) -> Function:
    """``function`` under autocast: convolutions and matrix products in ``precision``.

    Its weights stay in float32. With 'no' it is ``function`` itself.

    Example:
        >>> unet = in_precision(model.unet, "bf16", model.device)
        >>> unet(latents_BCHW, timestep_B, context_BLD).sample.dtype
        torch.bfloat16

    """
    if precision == "no":
        return function

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device.type, DTYPES[precision]):
            return function(*args, **kwargs)

    return call  # type: ignore[return-value]  # a TypeVar cannot say 'called in the same way'


def decoder_precision(recipe: Recipe, config: ModelConfig) -> MixedPrecision:
    """The precision in which a training decodes latents.

    Raises:
        HipaError: it is fp16, in which SDXL's published VAE gives NaN. Its configuration says so
            (``force_upcast``); the one that was mended for fp16 says false.

    """
    precision = recipe.vae_precision or recipe.mixed_precision
    if precision == "fp16" and config.has_text_pair and config.vae["force_upcast"]:
        raise HipaError(
            f"{config.folder}: its VAE overflows fp16 (force_upcast in vae/config.json). "
            'Set vae_precision = "bf16" or "no" in the recipe, or use a VAE that was made for fp16.'
        )
    return precision


def grad_scaler(precision: MixedPrecision, device: torch.device) -> GradScaler:
    """Dynamic loss scaling for fp16 (Micikevicius et al. 2018, section 3.2); disabled otherwise.

    bf16 has the range of float32 and needs none.
    """
    return GradScaler(device.type, enabled=precision == "fp16")

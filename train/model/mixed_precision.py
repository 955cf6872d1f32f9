"""Mixed precision: autocast around the UNet and the decoder, and the loss scale of fp16 gradients.

Everything between the networks, x0 and the losses, stays in float32: at t = 999 of Stable
Diffusion's schedule an error of the predicted noise is 14.6 times as large in x0.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch.amp import GradScaler

from hipa_deploy.errors import HipaError
from hipa_deploy.models.model_config import ModelConfig
from hipa_deploy.train.recipes.recipe import MixedPrecision, Recipe

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
NAMES = {"bf16": "bfloat16", "fp16": "float16"}
X86 = ("x86_64", "AMD64")
Function = TypeVar("Function", bound=Callable[..., Any])


def use_tensor_cores(device: torch.device) -> None:
    """Let float32 matrix products and convolutions run as TF32 on a GPU that has it.

    TF32 rounds the factors to 10 bits of mantissa and accumulates in float32. PyTorch has it on for
    convolutions and off for matrix products. A GPU without it, and a CPU, compute as before.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")


def computed_precision(precision: MixedPrecision, device: torch.device) -> MixedPrecision:
    """The precision in which a device computes what is asked for: that one, or float32.

    A CPU without instructions for bfloat16 or float16 emulates them number by number. Measured
    on an AMD EPYC with AVX2 and torch 2.13, with the embedded model: the UNet takes 17 times as
    long in bfloat16 as in float32 (float16 21), the decoder 52 times (79). float32 is also more
    precise, so such a CPU computes in it.
    """
    if device.type != "cpu" or precision == "no" or _cpu_computes_in(precision):
        return precision
    return "no"


def precision_note(precisions: Iterable[MixedPrecision], device: torch.device) -> str | None:
    """What to tell the user where a device computes in float32 in place of these precisions."""
    replaced = []
    for precision in dict.fromkeys(precisions):
        if computed_precision(precision, device) != precision:
            replaced.append(NAMES[precision])
    if not replaced:
        return None
    return (
        f"note: this CPU has no instructions for {' and '.join(replaced)}, which would be many "
        "times slower here. It computes in float32."
    )


def _cpu_computes_in(precision: MixedPrecision) -> bool:
    """Whether this machine's CPU has instructions for a precision.

    On x86-64 oneDNN says yes to bfloat16 from AVX-512 on, where it still may convert each number.
    """
    if precision == "fp16":
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    if platform.machine() in X86:
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def in_precision(
    function: Function,
    precision: MixedPrecision,
    device: torch.device,
    *,
    emulated: bool = False,
) -> Function:
    """``function`` under autocast: convolutions and matrix products in ``precision``.

    Its weights stay in float32. With 'no' it is ``function`` itself, and so it is on a CPU that
    would have to emulate the precision.

    Args:
        function: A network, or what calls one.
        precision: Of the recipe.
        device: Where it runs.
        emulated: Use the precision even where the CPU emulates it: to count on a CPU what a
            training takes elsewhere.

    Example:
        >>> unet = in_precision(model.unet, "bf16", model.device)
        >>> unet(latents_BCHW, timestep_B, context_BLD).sample.dtype
        torch.bfloat16

    """
    if not emulated:
        precision = computed_precision(precision, device)
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

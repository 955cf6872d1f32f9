"""Fold a low-rank adaptor into the weights of the UNet, and of the VAE's encoder: W + scale * (alpha / rank) * B A."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file

from hipa_deploy.bundle.manifest import AdaptorInfo
from hipa_deploy.errors import HipaError, first_line, last_line
from hipa_deploy.hashing import file_sha256
from hipa_deploy.models.adaptor_folder import ENCODER_WEIGHTS, WEIGHTS


def merge_adaptor(unet: UNet2DConditionModel, adaptor: Path, scale: float = 1.0) -> AdaptorInfo:
    """Merge in place, in float32; afterwards the UNet has exactly its own modules again.

    Raises:
        HipaError: no adaptor, unreadable or not finite, a layer that this UNet does not have or has in another
            shape, a scale that is not finite.

    """
    _check_scale(scale)
    state, metadata = _read_weights(adaptor)
    _load_into(unet, state, adaptor, prefix="unet", metadata=metadata)
    layers = [layer for layer in unet.modules() if isinstance(layer, BaseTunerLayer)]
    rank, alpha = max(_rank_and_alpha(layer) for layer in layers)
    _fuse(unet, adaptor, scale)
    return AdaptorInfo(
        name=adaptor.resolve().name,
        sha256=file_sha256(adaptor / WEIGHTS),
        rank=rank,
        alpha=alpha,
        scale=scale,
    )


def merge_encoder_adaptor(
    vae: AutoencoderKL, adaptor: Path | None, scale: float = 1.0
) -> str | None:
    """Merge the adaptor's part for the VAE's encoder, if it has one, in place; the hash of that file, or None.

    Raises:
        HipaError: it is unreadable, does not fit this encoder or is not finite, or a scale that is not finite.

    """
    if adaptor is None or not (path := adaptor / ENCODER_WEIGHTS).exists():
        return None
    _check_scale(scale)
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise HipaError(f"{path} cannot be read: {first_line(error)}") from None
    if not state:
        raise HipaError(f"{path} holds nothing. Copy the adaptor again.")
    _check_finite(state, adaptor)
    _load_into(
        vae, state, path, prefix=None
    )  # alpha is the rank: what diffusers takes where nothing is said
    _fuse(vae, path, scale)
    return file_sha256(path)


def _check_scale(scale: float) -> None:
    if not math.isfinite(scale):
        raise HipaError(
            f"adaptor scale {scale} is not a number. Expected a finite value, 1.0 as trained."
        )


def _fuse(model: Any, adaptor: Path, scale: float) -> None:
    model.fuse_lora(lora_scale=scale)
    model.unload_lora()
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise HipaError(f"{adaptor}: adapter layers are left after merging. Expected a plain LoRA.")
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            raise HipaError(
                f"{adaptor}: merging made {name} infinite. Lower --adaptor-scale ({scale})."
            )


def _read_weights(adaptor: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    if not (adaptor / WEIGHTS).is_file():
        raise HipaError(
            f"{adaptor}: no {WEIGHTS} in it. Expected an adaptor folder, as hipa-train writes it."
        )
    try:
        state, _, metadata = StableDiffusionPipeline.lora_state_dict(
            adaptor, weight_name=WEIGHTS, return_lora_metadata=True, use_safetensors=True
        )
    except Exception as error:  # safetensors, json and key-conversion errors share no base class
        raise HipaError(f"{adaptor}/{WEIGHTS} cannot be read: {first_line(error)}") from None
    foreign = [key for key in state if not key.startswith("unet.")]
    if foreign or not state:
        got = f"{foreign[0]} ({len(foreign)} such)" if foreign else "nothing"
        raise HipaError(
            f"{adaptor}/{WEIGHTS} holds {got}. Expected layers of a UNet alone, keys that start with 'unet.'."
        )
    _check_finite(state, adaptor)
    return state, metadata


def _check_finite(state: dict[str, torch.Tensor], adaptor: Path) -> None:
    for key, value in state.items():
        if not torch.isfinite(value).all():
            raise HipaError(f"{adaptor}: {key} holds NaN or infinity. Train the adaptor again.")


def _load_into(
    model: Any,
    state: dict[str, torch.Tensor],
    adaptor: Path,
    *,
    prefix: str | None,
    metadata: dict[str, Any] | None = None,
) -> None:
    """Attach the adapter layers, and check that every tensor of the file went to a layer of this UNet, or VAE."""
    kind = "UNet" if prefix else "VAE"
    targets = {
        key.removeprefix("unet.").split(".lora")[0] for key in state if not key.endswith(".alpha")
    }
    missing = sorted(targets - {name for name, _ in model.named_modules()})
    if missing:
        raise HipaError(
            f"{adaptor} does not fit this {kind}: it has no layer {missing[0]} ({len(missing)} such)."
        )
    try:
        model.load_lora_adapter(state, prefix=prefix, metadata=metadata)
    except (
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:  # of files that are not whole, or not LoRA
        raise HipaError(f"{adaptor} does not fit this {kind}: {last_line(error)}") from None
    adapted = {name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    if adapted != targets:
        raise HipaError(
            f"{adaptor}: {len(targets)} layers in the file, {len(adapted)} matched. Expected all of them."
        )


def _rank_and_alpha(layer: Any) -> tuple[int, float]:
    name = next(iter(layer.r))
    return int(layer.r[name]), float(layer.lora_alpha[name])

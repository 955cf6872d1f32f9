"""Merge a low-rank adaptor into the weights of the UNet, and of the VAE's encoder.

A layer's weights W become W + scale * (alpha / rank) * B A, with the adapter weights A and B.
"""

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
from hipa_deploy.export.lora.lora_file import read_lora
from hipa_deploy.export.lora.merge_lora import merge_lora, module_names
from hipa_deploy.hashing import file_sha256
from hipa_deploy.models.adaptor_folder import ENCODER_WEIGHTS, METADATA, WEIGHTS


def merge_adaptor(unet: UNet2DConditionModel, adaptor: Path, scale: float = 1.0) -> AdaptorInfo:
    """Merge an adaptor into ``unet``, in place, in float32.

    Args:
        unet: afterwards it has exactly its own modules again.
        adaptor: a folder, as hipa-train writes it; or a LoRA of another tool, a .safetensors file
            or its folder, in any layout that ``hipa_deploy.export.lora`` reads.
        scale: 1.0 merges as trained, 0.0 changes nothing.

    Returns:
        What the bundle's manifest says of the adaptor.

    Raises:
        HipaError: there is no adaptor, it cannot be read, it is not finite or has a layer that this
            UNet does not have or has in another shape, or the scale is not finite.

    Example:
        >>> merge_adaptor(ModelParts.open("emoji").unet(), embedded.ADAPTOR).scale
        1.0

    """
    _check_scale(scale)
    if not (adaptor / METADATA).is_file():
        return _merge_other_lora(unet, adaptor, scale)

    # An adaptor of HiPA is merged by peft, which trained it, with the same operations.
    state, metadata = _read_weights(adaptor)
    _load_into(unet, state, adaptor, prefix="unet", metadata=metadata)

    # Layers may differ in rank; the manifest names the largest. After the fusion none is left.
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


def _merge_other_lora(unet: UNet2DConditionModel, path: Path, scale: float) -> AdaptorInfo:
    """Merge a LoRA that another tool wrote. Each layer has an alpha and a rank of its own."""
    parts = {"unet": unet}
    lora = read_lora(path, module_names(parts))
    merge_lora(parts, lora, scale)

    # The manifest has one rank and one alpha: those of the layer with the largest rank.
    rank = 1
    alpha = 1.0
    for layer in lora.layers.values():
        if (layer.rank or 0) > rank:
            rank = layer.rank or 1
            alpha = layer.scaling * rank
    return AdaptorInfo(
        name=path.resolve().name, sha256=lora.sha256, rank=rank, alpha=alpha, scale=scale
    )


def merge_encoder_adaptor(
    vae: AutoencoderKL, adaptor: Path | None, scale: float = 1.0
) -> str | None:
    """Merge the adaptor's weights for the VAE's encoder into ``vae``, in place, in float32.

    Returns:
        The hash of the file of these weights; None if the adaptor has none.

    Raises:
        HipaError: they cannot be read, do not fit this encoder or are not finite, or the scale is
            not finite.

    """
    if adaptor is None:
        return None
    path = adaptor / ENCODER_WEIGHTS
    if not path.exists():
        return None
    _check_scale(scale)
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise HipaError(f"{path} cannot be read: {first_line(error)}") from None
    if not state:
        raise HipaError(f"{path} holds nothing. Copy the adaptor again.")
    _check_finite(state, adaptor)
    # Without metadata diffusers takes the rank for alpha, which is how hipa-train trains them.
    _load_into(vae, state, path, prefix=None)
    _fuse(vae, path, scale)
    return file_sha256(path)


def _check_scale(scale: float) -> None:
    if not math.isfinite(scale):
        raise HipaError(
            f"adaptor scale {scale} is not a number. Expected a finite value, 1.0 as trained."
        )


def _fuse(model: Any, adaptor: Path, scale: float) -> None:
    """Merge the attached adapter layers and take them out, and check that nothing went wrong."""
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
    """The adapter weights and their metadata, after the checks that need no UNet."""
    if not (adaptor / WEIGHTS).is_file():
        raise HipaError(
            f"{adaptor}: no {WEIGHTS} in it. Expected an adaptor folder, as hipa-train writes it."
        )
    try:
        state, _, metadata = StableDiffusionPipeline.lora_state_dict(
            adaptor, weight_name=WEIGHTS, return_lora_metadata=True, use_safetensors=True
        )
    # Errors of safetensors, of JSON and of the conversion of keys share no base class.
    except Exception as error:
        raise HipaError(f"{adaptor}/{WEIGHTS} cannot be read: {first_line(error)}") from None

    # Adapter weights of a text encoder would be dropped silently.
    others = [key for key in state if not key.startswith("unet.")]
    if others or not state:
        got = f"{others[0]} ({len(others)} such)" if others else "nothing"
        raise HipaError(
            f"{adaptor}/{WEIGHTS} holds {got}. "
            "Expected layers of a UNet alone, keys that start with 'unet.'."
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
    """Attach the adapter layers to ``model``.

    Raises:
        HipaError: a tensor of ``state`` does not belong to a layer of this UNet or VAE.

    """
    kind = "UNet" if prefix else "VAE"
    targets = set()
    for key in state:
        if not key.endswith(".alpha"):
            targets.add(key.removeprefix("unet.").split(".lora")[0])
    missing = sorted(targets - {name for name, _ in model.named_modules()})
    if missing:
        raise HipaError(
            f"{adaptor} does not fit this {kind}: it has no layer {missing[0]} "
            f"({len(missing)} such)."
        )
    try:
        model.load_lora_adapter(state, prefix=prefix, metadata=metadata)
    # What diffusers and peft raise for files that are cut, or are not LoRA.
    except (LookupError, RuntimeError, TypeError, ValueError) as error:
        raise HipaError(f"{adaptor} does not fit this {kind}: {last_line(error)}") from None

    # diffusers skips keys that it does not understand.
    adapted = {name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    if adapted != targets:
        raise HipaError(
            f"{adaptor}: {len(targets)} layers in the file, {len(adapted)} matched. "
            "Expected all of them."
        )


def _rank_and_alpha(layer: Any) -> tuple[int, float]:
    """Rank and alpha of a peft layer, which has one adaptor."""
    name = next(iter(layer.r))
    return int(layer.r[name]), float(layer.lora_alpha[name])

"""Merge a low-rank adaptor into the weights of the UNet, and of the VAE's encoder.

A layer's weights W become W + scale * (alpha / rank) * B A, with the adapter weights A and B. The
arithmetic is that of every LoRA, in ``hipa_deploy.models.lora``.
"""

from __future__ import annotations

from pathlib import Path

from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from hipa_deploy.bundle.manifest import AdaptorInfo
from hipa_deploy.disk.hashing import file_sha256
from hipa_deploy.errors import HipaError
from hipa_deploy.models.adaptor_folder import ENCODER_WEIGHTS, METADATA, WEIGHTS
from hipa_deploy.models.lora.find_lora import own_name
from hipa_deploy.models.lora.lora_file import read_lora
from hipa_deploy.models.lora.merge_lora import merge_lora, module_names

SCALE_OPTION = "--adaptor-scale"


def merge_adaptor(unet: UNet2DConditionModel, adaptor: Path, scale: float = 1.0) -> AdaptorInfo:
    """Merge an adaptor into ``unet``, in place, in float32.

    Args:
        unet: afterwards it has exactly its own modules, with other weights.
        adaptor: a folder, as hipa-train writes it; or a LoRA of another tool, in any file or folder
            that ``hipa_deploy.models.lora`` reads.
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
    if (adaptor / METADATA).is_file() and not (adaptor / WEIGHTS).is_file():
        raise HipaError(
            f"{adaptor}: no {WEIGHTS} in it. Expected an adaptor folder, as hipa-train writes it."
        )
    parts = {"unet": unet}
    lora = read_lora(adaptor, module_names(parts))
    merge_lora(parts, lora, scale, SCALE_OPTION)

    # The manifest has one rank and one alpha: those of a layer with the largest rank.
    rank = lora.rank or 1
    alphas = []
    for layer in lora.layers.values():
        if layer.rank == rank:
            alphas.append(layer.scaling * rank)
    return AdaptorInfo(
        name=own_name(adaptor),
        sha256=lora.sha256,
        rank=rank,
        alpha=max(alphas, default=1.0),
        scale=scale,
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
    parts = {"vae": vae}
    merge_lora(parts, read_lora(path, module_names(parts)), scale, SCALE_OPTION)
    return file_sha256(path)

"""The tiny decoder's folder, and ``hipa_decoder.json``: which VAE the decoder was distilled from.

The folder loads with diffusers' ``AutoencoderTiny.from_pretrained``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from hipa_deploy.disk.reading import read_record
from hipa_deploy.errors import HipaError
from hipa_deploy.models.adaptor_folder import TrainingTime
from hipa_deploy.models.weights.weight_identity import weights_identity
from hipa_deploy.record import Record

DECODER_METADATA = "hipa_decoder.json"


class DecoderFidelity(Record):
    """How close a tiny decoder is to the full one, on latents that the training did not see.

    Attributes:
        images: number of images compared.
        psnr_db: peak signal-to-noise ratio in dB; higher is closer.
        perceptual_distance: 0 is equal; lower is closer.

    """

    images: int
    psnr_db: float
    perceptual_distance: float


class DecoderMetadata(Record):
    """``hipa_decoder.json``: what a tiny decoder was distilled from, how, and how close it is.

    Attributes:
        schema_version: version of this file's format.
        base_vae_sha256: hash of the VAE that the decoder was distilled from.
        latent_channels: channels C of the latents.
        factor: pixels per latent, along either axis.
        steps_trained: optimiser steps.
        fidelity: how close the decoder is to the full one.
        recipe: the training recipe.
        training: hours and devices, summed over all sessions of the run; empty in older decoders.

    """

    schema_version: Literal[1] = 1
    base_vae_sha256: str
    latent_channels: int
    factor: int
    steps_trained: int
    fidelity: DecoderFidelity
    recipe: dict[str, Any]
    training: tuple[TrainingTime, ...] = ()


def vae_sha256(model_folder: Path) -> str:
    """Hash the VAE's weights that are loaded from a model's folder: ``base_vae_sha256``."""
    return weights_identity(model_folder / "vae")


def read_decoder_metadata(folder: Path) -> DecoderMetadata:
    """Read the metadata of a decoder folder.

    Raises:
        HipaError: the folder is not one that hipa-train wrote, or its metadata is damaged.

    """
    path = folder / DECODER_METADATA
    if not path.exists():
        raise HipaError(
            f"decoder {folder} has no {DECODER_METADATA}. Expected a folder that hipa-train wrote."
        )
    return read_record(path, DecoderMetadata, "Copy the decoder again, or update hipa-deploy.")

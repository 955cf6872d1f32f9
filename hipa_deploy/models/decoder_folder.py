"""The tiny decoder's folder, and what ``hipa_decoder.json`` says of it.

It is enough to refuse the decoder for another VAE.

The folder loads with diffusers' ``AutoencoderTiny.from_pretrained``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from hipa_deploy.errors import HipaError
from hipa_deploy.hashing import folder_sha256

DECODER_METADATA = "hipa_decoder.json"


class DecoderFidelity(BaseModel):
    """Against the full decoder, on latents that the training did not see."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    images: int
    psnr_db: float
    perceptual_distance: float


class DecoderMetadata(BaseModel):
    """``hipa_decoder.json``: what a tiny decoder was distilled from, and how faithful it is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    base_vae_sha256: str
    latent_channels: int
    factor: int
    steps_trained: int
    fidelity: DecoderFidelity
    recipe: dict[str, Any]


def vae_sha256(model_folder: Path) -> str:
    """What ``base_vae_sha256`` holds: of every safetensors file in the model's vae folder."""
    return folder_sha256(model_folder / "vae")


def read_decoder_metadata(folder: Path) -> DecoderMetadata:
    """The metadata of a decoder folder.

    Raises:
        HipaError: not a decoder that hipa-train wrote.

    """
    try:
        return DecoderMetadata.model_validate(
            json.loads((folder / DECODER_METADATA).read_text(encoding="utf-8"))
        )
    except OSError:
        raise HipaError(
            f"decoder {folder} has no {DECODER_METADATA}. Expected a folder that hipa-train wrote."
        ) from None
    except (ValueError, ValidationError):
        raise HipaError(
            f"decoder {folder}: {DECODER_METADATA} is damaged, "
            "or of another version of hipa-deploy."
        ) from None

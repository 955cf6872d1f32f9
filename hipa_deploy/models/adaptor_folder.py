"""The adaptor folder: file names, and what ``hipa_adaptor.json`` says of it.

The folder loads with diffusers' ``pipe.load_lora_weights``; its ``scheduler/`` is exact for the one
step.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hipa_deploy.errors import HipaError
from hipa_deploy.hashing import file_sha256, folder_sha256
from hipa_deploy.models.decoder_folder import vae_sha256
from hipa_deploy.tasks import Task

WEIGHTS = "pytorch_lora_weights.safetensors"
ENCODER_WEIGHTS = "vae_encoder_lora.safetensors"  # where the VAE's encoder is adapted too
METADATA = "hipa_adaptor.json"


class AdaptorMetadata(BaseModel):
    """``hipa_adaptor.json``: what an adaptor was made from and how.

    It is enough to refuse the adaptor for anything else.

    ``strengths`` are an edit's, descending; ``timestep`` is that of the largest. ``upscale`` is how
    many times larger the images of the task upscale become; for other tasks it means nothing.
    ``initial_sha256`` is of the weights that the training started from, an adaptor's; None where it
    started from nothing. ``encoder_rank`` is the rank of the VAE encoder's part, 0 where there is
    none, and ``base_vae_sha256`` the VAE that this part is for.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    base_unet_sha256: str
    prompts_sha256: str
    rank: int
    alpha: float
    targets: tuple[str, ...]
    timestep: int
    prediction_type: str
    alpha_bar: float
    resolution: tuple[int, int]
    steps_trained: int
    recipe: dict[str, Any]
    task: Task = "generate"
    strengths: tuple[float, ...] = ()
    upscale: int = Field(default=4, ge=2, le=8)
    initial_sha256: str | None = None
    encoder_rank: int = 0
    base_vae_sha256: str | None = None


def unet_sha256(model_folder: Path) -> str:
    """What ``base_unet_sha256`` holds: of every safetensors file in the model's unet folder."""
    return folder_sha256(model_folder / "unet")


def weights_sha256(folder: Path) -> str:
    """The hash of an adaptor's weights; of both files where the encoder has a part."""
    if not (folder / ENCODER_WEIGHTS).exists():
        return file_sha256(folder / WEIGHTS)
    both = "".join(file_sha256(folder / name) for name in (WEIGHTS, ENCODER_WEIGHTS))
    return hashlib.sha256(both.encode()).hexdigest()


def read_metadata(folder: Path, model_folder: Path | None = None) -> AdaptorMetadata:
    """The metadata of an adaptor folder.

    With ``model_folder`` it is also checked that the adaptor was trained on that model.

    Raises:
        HipaError: not an adaptor folder, an incomplete one, or one of another base model.

    """
    try:
        metadata = AdaptorMetadata.model_validate(
            json.loads((folder / METADATA).read_text(encoding="utf-8"))
        )
    except OSError:
        raise HipaError(
            f"adaptor {folder} has no {METADATA}. Expected a folder that hipa-train wrote."
        ) from None
    except (ValueError, ValidationError):
        raise HipaError(
            f"adaptor {folder}: {METADATA} is damaged, or of another version of hipa-deploy."
        ) from None
    if model_folder is not None and metadata.base_unet_sha256 != unet_sha256(model_folder):
        raise HipaError(
            f"adaptor {folder} was trained on another base model than {model_folder} "
            "(UNet hashes differ)."
        )
    if metadata.encoder_rank and not (folder / ENCODER_WEIGHTS).is_file():
        raise HipaError(
            f"adaptor {folder} lacks {ENCODER_WEIGHTS}, its part on the VAE's encoder. "
            "Copy it again."
        )
    vae = metadata.base_vae_sha256
    if model_folder is not None and vae is not None and vae != vae_sha256(model_folder):
        raise HipaError(
            f"adaptor {folder} was trained with another VAE than {model_folder}'s "
            "(VAE hashes differ)."
        )
    return metadata

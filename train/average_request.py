"""The checks of an average of adaptors, which need no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hipa_deploy.errors import HipaError
from hipa_deploy.models.adaptor_folder import (
    ENCODER_WEIGHTS,
    WEIGHTS,
    AdaptorMetadata,
    read_metadata,
    same_signal,
)
from hipa_deploy.models.lora.early_lora import check_adaptor_path
from hipa_deploy.models.weights.early_check import check_tensors

# What must be the same in all adaptors, and what a message calls it.
SHARED = {
    "base_unet_sha256": "base model",
    "base_vae_sha256": "VAE",
    "task": "task",
    "timestep": "timestep",
    "prediction_type": "prediction type",
    "resolution": "resolution",
    "strengths": "strengths",
    "upscale": "factor",
    "text": "text settings",
    "loras": "LoRAs",
    "embeddings": "embeddings",
}


def check_average(folders: Sequence[Path]) -> list[AdaptorMetadata]:
    """Check the adaptors of an average before anything is loaded.

    Args:
        folders: adaptor folders.

    Returns:
        What each of them says of itself.

    Raises:
        HipaError: fewer than two adaptors, one that is missing or damaged, or adaptors that do not
            go together.

    """
    if len(folders) < 2:
        raise HipaError(f"{len(folders)} adaptor to average. Expected --average at least twice.")
    metadata = []
    for folder in folders:
        check_adaptor_path(folder)
        metadata.append(read_metadata(folder))
    _check_together(folders, metadata)
    for folder, record in zip(folders, metadata, strict=True):
        check_tensors(folder / WEIGHTS)
        if record.encoder_rank:
            check_tensors(folder / ENCODER_WEIGHTS)
    return metadata


def _check_together(folders: Sequence[Path], metadata: list[AdaptorMetadata]) -> None:
    """Raise HipaError unless the adaptors are for the same step of the same model."""
    first = metadata[0]
    for folder, other in zip(folders, metadata, strict=True):
        if bool(other.encoder_rank) != bool(first.encoder_rank):
            raise HipaError(
                f"adaptors {folders[0]} and {folder}: one of them has an adaptor of the VAE's "
                "encoder, the other none. Expected both of one kind."
            )
        for key, what in SHARED.items():
            if getattr(other, key) != getattr(first, key):
                raise HipaError(
                    f"adaptors {folders[0]} and {folder} are for another {what} each. "
                    "Expected adaptors of one model, task and timestep."
                )
        # The same weights with another schedule are another model, and its adaptor another step.
        if not same_signal(other.alpha_bar, first.alpha_bar):
            raise HipaError(
                f"adaptors {folders[0]} and {folder} are for another noise schedule each: "
                f"alpha_bar is {first.alpha_bar:.4g} and {other.alpha_bar:.4g} at timestep "
                f"{first.timestep}. Expected adaptors of one model, task and timestep."
            )

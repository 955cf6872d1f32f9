"""A base model's name -> the folder it lies in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hipa_deploy.embedded import DECODER, MODEL, NAME
from hipa_deploy.errors import HipaError, first_line

TINY, TAESD = "tiny", "madebyollin/taesd"


def model_folder(name: str) -> Path:
    """'emoji' is the embedded model, unless a folder of that name is here; else a folder, or a hub id to fetch.

    Raises:
        HipaError: no such folder, and the hub does not provide it.

    """
    path = Path(name)
    if path.exists():
        return path
    if name == NAME:
        return MODEL
    if "/" not in name or name.startswith(("/", ".")):
        raise HipaError(
            f"{name} does not exist. Expected a diffusers model folder, a hub id like owner/name, or {NAME}."
        )
    from diffusers import DiffusionPipeline

    return _fetch(name, DiffusionPipeline.download)


def resolve_decoder(name: str, model: str) -> Path | None:
    """The AutoencoderTiny folder that ``--decoder name`` means for ``model``; None for 'full', the model's own VAE.

    'tiny' is the embedded decoder for the embedded model, and TAESD (github.com/madebyollin/taesd) for any other.

    Raises:
        HipaError: no such folder, and the hub does not provide it.

    """
    if name == "full":
        return None
    if name != TINY:
        return Path(name)
    if model_folder(model) == MODEL:
        return DECODER
    from huggingface_hub import snapshot_download

    return _fetch(TAESD, snapshot_download)


def _fetch(name: str, download: Callable[[str], str]) -> Path:
    try:
        return Path(download(name))
    except Exception as error:  # network, authentication and hub errors share no base class
        raise HipaError(f"{name}: no such folder, and the hub did not provide it: {first_line(error)}") from None

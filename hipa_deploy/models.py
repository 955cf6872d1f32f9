"""A base model's name -> the folder it lies in."""

from __future__ import annotations

from pathlib import Path

from hipa_deploy.embedded import MODEL, NAME
from hipa_deploy.errors import HipaError, first_line


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

    try:
        return Path(DiffusionPipeline.download(name))
    except Exception as error:  # network, authentication and hub errors share no base class
        raise HipaError(f"{name}: no such folder, and the hub did not provide it: {first_line(error)}") from None

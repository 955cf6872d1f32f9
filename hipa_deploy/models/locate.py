"""A base model's name -> the folder it lies in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hipa_deploy.embedded import DECODER, MODEL, NAME
from hipa_deploy.errors import HipaError, first_line

TINY = "tiny"
TAESD = "madebyollin/taesd"


def model_folder(name: str, config: str | None = None) -> Path:
    """The folder of the model that ``name`` means.

    'emoji' is the embedded model, unless a folder of that name is here. Any other name is a folder,
    a checkpoint, or a hub id to fetch.

    A .safetensors checkpoint is converted into a folder of the user's cache; ``config`` says what
    it is, where its weights do not (hipa_deploy.models.single_file).

    Raises:
        HipaError: no such folder or file, another kind of model, and the hub does not provide it.

    """
    path = Path(name)
    if path.is_file():
        from hipa_deploy.models.single_file import converted

        return converted(path, config)
    if config is not None:
        raise HipaError(
            f"--config is for a checkpoint in one file, and {name} is none. Leave it out."
        )
    if path.exists():
        return path
    if name == NAME:
        return MODEL
    if "/" not in name or name.startswith(("/", ".")):
        raise HipaError(
            f"{name} does not exist. Expected a diffusers model folder, a .safetensors checkpoint, "
            f"a hub id like owner/name, or {NAME}."
        )
    from diffusers import DiffusionPipeline

    return _fetch(name, DiffusionPipeline.download)


def unpacked(name: str, config: str | None = None) -> str:
    """``name``, or the folder that a checkpoint in one file was converted into.

    Raises what ``model_folder`` does.
    """
    return str(model_folder(name, config)) if config is not None or Path(name).is_file() else name


def resolve_encoder(name: str) -> Path | None:
    """The AutoencoderTiny folder that ``--encoder name`` means.

    None stands for 'full', the model's own VAE.

    'tiny' is TAESD (github.com/madebyollin/taesd); the embedded decoder has no encoder of its own.

    Raises:
        HipaError: the hub does not provide it.

    """
    return None if name == "full" else _fetch_taesd() if name == TINY else Path(name)


def resolve_decoder(name: str, model: str) -> Path | None:
    """The AutoencoderTiny folder that ``--decoder name`` means.

    None stands for 'full', the model's own VAE.

    'tiny' is the embedded decoder for the embedded model, and TAESD (github.com/madebyollin/taesd)
    for any other.

    Raises:
        HipaError: no such folder, and the hub does not provide it.

    """
    if name == "full":
        return None
    if name != TINY:
        return Path(name)
    if model_folder(model) == MODEL:
        return DECODER
    return _fetch_taesd()


def _fetch_taesd() -> Path:
    from huggingface_hub import snapshot_download

    return _fetch(TAESD, snapshot_download)


def _fetch(name: str, download: Callable[[str], str]) -> Path:
    try:
        return Path(download(name))
    except Exception as error:  # network, authentication and hub errors share no base class
        raise HipaError(
            f"{name}: no such folder, and the hub did not provide it: {first_line(error)}"
        ) from None

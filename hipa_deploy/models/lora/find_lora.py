"""Which file a user's path to a LoRA means."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

from hipa_deploy.disk.hashing import file_sha256
from hipa_deploy.errors import HipaError
from hipa_deploy.models.weights.weight_file import (
    LORA_FILES,
    PICKLED,
    SAFETENSORS,
    read_layout,
)

PEFT_CONFIG = "adapter_config.json"
PEFT_STEM = "adapter_model"
PEFT_KEYS = "base_model.model."
# peft writes one folder for each part; their names are the pipeline's.
PART_FOLDERS = ("unet", "text_encoder", "text_encoder_2")


class FoundFile(NamedTuple):
    """A file of a LoRA, and the part that its folder says it is for."""

    path: Path
    part: str | None = None


def find_lora(path: Path) -> tuple[FoundFile, ...]:
    """The files that ``path`` means: itself, the one LoRA of a folder, or one for each part.

    Raises:
        HipaError: neither a file nor a folder with a LoRA.

    Example:
        >>> find_lora(Path("style.safetensors"))
        (FoundFile(path=PosixPath('style.safetensors'), part=None),)

    """
    if path.is_file():
        if path.suffix.lower() not in (SAFETENSORS, *PICKLED):
            endings = ", ".join((SAFETENSORS, *PICKLED))
            raise HipaError(f"{path} is no LoRA file. Expected one that ends in: {endings}.")
        return (FoundFile(path),)
    if not path.is_dir():
        raise HipaError(f"LoRA {path} does not exist. Expected a .safetensors file or its folder.")

    named = _named_file(path)
    if named is not None:
        return (FoundFile(named),)
    parts = []
    for part in PART_FOLDERS:
        file = _named_file(path / part)
        if file is not None:
            parts.append(FoundFile(file, part))
    if parts:
        return tuple(parts)
    return (FoundFile(_only_file(path)),)


def _named_file(folder: Path) -> Path | None:
    """The file of a name that a writer gives; None if there is none."""
    for name in LORA_FILES:
        if (folder / name).is_file():
            return folder / name
    return None


def _only_file(folder: Path) -> Path:
    """The one .safetensors file of a folder, whatever its name."""
    found = sorted(file for file in folder.iterdir() if file.suffix.lower() == SAFETENSORS)
    if not found:
        raise HipaError(
            f"{folder}: no {LORA_FILES[0]} or other LoRA in it. Expected an adaptor folder, as "
            "hipa-train writes it, or a LoRA's .safetensors file."
        )
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise HipaError(
            f"{folder}: expected one LoRA in this folder, found {names}. Name the file itself."
        )
    return found[0]


def own_name(path: Path) -> str:
    """What a user calls a file or folder; a file in the hub's cache is a link to a hash."""
    name = path.absolute().name
    return path.resolve().name if name in ("", "..") else name


def has_peft_config(file: Path) -> bool:
    """Whether peft's configuration lies beside ``file`` and is the file's.

    A LoRA of another kind may lie in the same folder. peft's has its own name, or its own keys.
    """
    if not file.with_name(PEFT_CONFIG).is_file():
        return False
    if file.stem == PEFT_STEM or file.suffix.lower() != SAFETENSORS:
        return file.stem == PEFT_STEM
    return any(name.startswith(PEFT_KEYS) for name in read_layout(file))


def lora_sha256(files: tuple[FoundFile, ...]) -> str:
    """SHA-256 of a LoRA: of its one file, or of the hashes of several, hexadecimal.

    A configuration beside a file counts too, since peft's alpha is there alone.
    """
    hashes = []
    for file in files:
        hashes.append(file_sha256(file.path))
        if has_peft_config(file.path):
            hashes.append(file_sha256(file.path.with_name(PEFT_CONFIG)))
    if len(hashes) == 1:
        return hashes[0]
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()

"""Content hashes: caches and manifests identify files by what they hold, never by name."""

from __future__ import annotations

import hashlib
from pathlib import Path

from hipa_deploy.errors import HipaError


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def folder_sha256(folder: Path, pattern: str = "*.safetensors") -> str:
    """SHA-256 of the files under ``folder`` that match ``pattern``: their names and contents.

    Raises:
        HipaError: no file matches.

    """
    paths = sorted(path for path in folder.rglob(pattern) if path.is_file())
    if not paths:
        raise HipaError(
            f"{folder}: no {pattern} file in it or below. Expected a folder of safetensors weights."
        )
    lines = [f"{path.relative_to(folder).as_posix()} {file_sha256(path)}\n" for path in paths]
    return hashlib.sha256("".join(lines).encode()).hexdigest()

"""Hashes of contents: caches and manifests identify a file by its content, never by its name."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from hipa_deploy.disk.reading import check_regular
from hipa_deploy.errors import HipaError


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, hexadecimal.

    Raises:
        HipaError: it is missing, or no regular file: a pipe and a device need not end.

    """
    check_regular(path, "Copy it again.")
    digest = hashlib.sha256()
    # By the MiB, since weights are files of several GB.
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def folder_sha256(folder: Path, pattern: str = "*.safetensors") -> str:
    """Return the SHA-256 of some files' relative names and contents, hexadecimal.

    Args:
        folder: searched with all folders below it.
        pattern: of the names of the files that count.

    Raises:
        HipaError: no file matches.

    """
    paths = sorted(path for path in folder.rglob(pattern) if path.is_file())
    if not paths:
        raise HipaError(
            f"{folder}: no {pattern} file in it or below. Expected a folder of safetensors weights."
        )
    return files_sha256(folder, paths)


def files_sha256(folder: Path, paths: Iterable[Path]) -> str:
    """Return the SHA-256 of the names, relative to ``folder``, and contents of ``paths``."""
    # One line a file, as ``sha256sum`` prints it but name first; '/' on every system.
    digest = hashlib.sha256()
    for path in paths:
        name = path.relative_to(folder).as_posix()
        digest.update(f"{name} {file_sha256(path)}\n".encode())
    return digest.hexdigest()

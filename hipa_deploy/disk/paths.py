"""Names of files that come from a file: each stays inside its folder, or is refused.

A manifest, a swap or a sidecar may come from a stranger. A name in it becomes a path by way of
``inside``, and in no other way.
"""

from __future__ import annotations

import stat
from pathlib import Path, PurePosixPath

from hipa_deploy.errors import HipaError

MAX_NAME = 1024  # characters


def name_problem(name: str) -> str | None:
    """What is wrong with ``name`` as a path relative to a folder; None where nothing is.

    Names are as ``Path.as_posix`` writes them: parts with '/' between them. What another system
    would read as a drive, a stream or another separator is refused on every system.

    Example:
        >>> name_problem("unet/model.onnx")
        >>> name_problem("../model.onnx")
        "has the part '..'"

    """
    if not name or len(name) > MAX_NAME:
        return f"has {len(name)} characters, expected 1 to {MAX_NAME}"
    if not name.isprintable():  # control characters, lone surrogates and invisible ones
        return "has a character that cannot be printed"
    for character in ("\\", ":"):
        if character in name:
            return f"has the character {character!r}"
    for part in name.split("/"):
        if part in ("", ".", ".."):
            return f"has the part {part!r}" if part else "is absolute, or has an empty part"
    return None


def inside(folder: Path, name: str) -> Path:
    """Return the regular file ``name`` in ``folder``.

    Links are followed, and the file that they lead to must lie in the folder as well. There is one
    exception: in the cache of a model hub, ``models--NAME/snapshots/REVISION``, every file is a
    link into ``models--NAME/blobs``.

    Args:
        folder: of the bundle, the swap or the engines.
        name: as the manifest has it.

    Raises:
        HipaError: a name that is not relative, with '..', a backslash, a colon or a character that
            cannot be printed; a file that is missing, lies elsewhere, or is a folder, a pipe or a
            device.

    """
    problem = name_problem(name)
    if problem:
        raise HipaError(f"{folder}: the file name {shown(name)} {problem}. {_REMEDY}")
    path = folder / name
    check_regular(path)
    real = path.resolve()
    if not any(real.is_relative_to(allowed) for allowed in _allowed(folder)):
        raise HipaError(f"{path} is a link that leads out of {folder}. Copy the file in its place.")
    return path


def inside_folder(folder: Path, name: str) -> Path:
    """Return the folder ``name`` in ``folder``, to write into. It need not exist.

    Raises:
        HipaError: it is a link that leads out of ``folder``.

    """
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise HipaError(f"{path} is a link that leads out of {folder}. Remove the link.")
    return path


def check_regular(path: Path) -> None:
    """Check that ``path`` is a regular file, or a link to one.

    Raises:
        HipaError: it is missing, or is a folder, a pipe, a socket or a device. Reading a pipe could
            wait for ever, and a device need not end.

    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise HipaError(f"{path} is missing, so it cannot be read. {_REMEDY}") from None
    except (OSError, ValueError) as error:  # a loop of links, or a character of no file name
        raise HipaError(f"{path} cannot be read ({error}). {_REMEDY}") from None
    if not stat.S_ISREG(mode):
        raise HipaError(f"{path} is a {_kind(mode)}. Expected a file.")


_REMEDY = "Export the folder again, or copy it whole."


def shown(name: str) -> str:
    """A name of a stranger's, for a message: cut, and quoted with escapes where it needs them."""
    cut = name if len(name) <= 80 else f"{name[:80]}…"
    return cut if cut.isprintable() and cut and " " not in cut else repr(cut)


def _allowed(folder: Path) -> list[Path]:
    """Where the files of ``folder`` may lie once links are followed."""
    real = folder.resolve()
    for parent in real.parents:
        # huggingface_hub names the folder of a repository KIND--OWNER--NAME.
        if parent.name == "snapshots" and "--" in parent.parent.name:
            return [real, parent.parent / "blobs"]
    return [real]


def _kind(mode: int) -> str:
    kinds = {
        "folder": stat.S_ISDIR,
        "pipe": stat.S_ISFIFO,
        "socket": stat.S_ISSOCK,
    }
    for kind, is_kind in kinds.items():
        if is_kind(mode):
            return kind
    return "device"


def lies_in(name: str, folder: str) -> bool:
    """Whether the file ``name`` of a manifest lies in its folder ``folder``, at any depth."""
    return PurePosixPath(name).is_relative_to(folder)

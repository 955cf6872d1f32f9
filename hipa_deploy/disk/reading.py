"""Files that may come from a stranger: their names and their contents, each fault one line.

A name in a manifest, a swap or a sidecar becomes a path by way of ``inside``, and in no other way.
A reader checks that the file is a regular one, and how large it is, before it reads. Arrays are
read by ``hipa_deploy.bundle.arrays``.
"""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError

from hipa_deploy.errors import HipaError, first_line, reason_of

# tomllib is part of Python since 3.11.
if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MIB = 1 << 20
MAX_JSON = 16 * MIB
MAX_TOML = MIB
# By the end of the name. An ONNX file is one protobuf message, of less than 2 GiB. Weights in files
# beside it have no limit.
_LARGEST = {
    ".json": 64 * MIB,
    ".txt": 256 * MIB,
    ".onnx": 2048 * MIB,
    ".npz": 16384 * MIB,
    ".npy": 16384 * MIB,
}
REEXPORT = "Export the bundle again."
_NO_WAIT = getattr(os, "O_NONBLOCK", 0)  # Windows has no pipes in its folders
Model = TypeVar("Model", bound=BaseModel)

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

    Links are followed, and the file that they lead to must lie in the folder as well. There are two
    exceptions. In the cache of a model hub, ``models--NAME/snapshots/REVISION``, every file is a
    link into ``models--NAME/blobs``. The installed package's own files may be links to anywhere:
    uv's ``link-mode = "symlink"`` and Bazel install a package so, and who can write there can
    change the code.

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
    if _is_own(folder):
        return path
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


def check_regular(path: Path, remedy: str = "") -> None:
    """Check that ``path`` is a regular file, or a link to one.

    Args:
        path: of the file.
        remedy: what a user may do, a sentence; empty for that of a bundle.

    Raises:
        HipaError: it is missing, or is a folder, a pipe, a socket or a device. Reading a pipe could
            wait for ever, and a device need not end.

    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise HipaError(f"{path} is missing, so it cannot be read. {remedy or _REMEDY}") from None
    except (OSError, ValueError) as error:  # a loop of links, or a character of no file name
        raise HipaError(f"{path} cannot be read ({error}). {remedy or _REMEDY}") from None
    if not stat.S_ISREG(mode):
        raise HipaError(f"{path} is a {_kind(mode)}. Expected a file.")


def check_file(path: Path, max_bytes: int, remedy: str = "") -> None:
    """Check that a library may be given ``path``: a regular file of at most ``max_bytes``.

    Raises:
        HipaError: as ``check_regular``; or the file is larger.

    """
    check_regular(path, remedy)
    _check_size(path, path.stat().st_size, max_bytes)


_REMEDY = "Export the folder again, or copy it whole."


def shown(name: str) -> str:
    """A name of a stranger's, for a message: cut, and quoted with escapes where it needs them."""
    cut = name if len(name) <= 80 else f"{name[:80]}…"
    return cut if cut.isprintable() and cut and " " not in cut else repr(cut)


def _is_own(folder: Path) -> bool:
    """Whether ``folder`` belongs to the installed package, as the included bundle's does."""
    # The folder of this module, and not of what it links to.
    package = Path(__file__).parent.parent
    return folder.resolve().is_relative_to(package.resolve())


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


def read_bytes(path: Path, max_bytes: int, remedy: str = "") -> bytes:
    """The content of a regular file of at most ``max_bytes``.

    Args:
        path: of the file.
        max_bytes: a larger file is not read.
        remedy: what a user may do where it is missing; empty for that of a bundle.

    Raises:
        HipaError: the file is missing, larger, no regular file, or cannot be read.

    """
    check_regular(path, remedy)
    try:
        # Non-blocking: the file could become a pipe between the check and here.
        with os.fdopen(os.open(path, os.O_RDONLY | _NO_WAIT), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise HipaError(f"{path} is not a regular file. Expected a file.")
            _check_size(path, status.st_size, max_bytes)
            return file.read(max_bytes)
    except OSError as error:
        raise HipaError(f"{path} cannot be read: {error.strerror}.") from None


def check_size(path: Path) -> None:
    """Check that a file of a bundle or a swap is no larger than such a file can be.

    Hashing a file takes seconds a gigabyte, and a file of holes may have any size.

    Raises:
        HipaError: it is larger.

    """
    limit = _LARGEST.get(path.suffix)
    if limit is not None:
        _check_size(path, path.stat().st_size, limit)


def _check_size(path: Path, size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise HipaError(f"{path} has {size} bytes. Expected at most {max_bytes}.")


def read_json(
    path: Path,
    *,
    max_bytes: int = MAX_JSON,
    remedy: str = "Export it again.",
    infinite: bool = False,
) -> Any:
    """The value in a JSON file, in UTF-8.

    Args:
        path: of the file.
        max_bytes: a larger file is not read.
        remedy: what a user may do, a sentence.
        infinite: accept Infinity and NaN, which are no JSON and which Python writes all the same.

    Raises:
        HipaError: as ``read_bytes``; or it is no JSON, nests too deep, or has a number that is not
            finite or has thousands of digits.

    """
    try:
        return parse_json(read_bytes(path, max_bytes, remedy), infinite=infinite)
    except ValueError as error:
        reason = first_line(error)
    raise HipaError(f"{path} is not JSON that can be read ({reason}). {remedy}")


def parse_json(content: bytes | str, *, infinite: bool = False) -> Any:
    """The value of a JSON text, in UTF-8.

    Raises:
        ValueError: it is no JSON or no UTF-8, nests too deep, or has a number that is not finite or
            has thousands of digits.

    """
    text = content if isinstance(content, str) else content.decode("utf-8")
    try:
        return json.loads(text, parse_constant=None if infinite else _refuse_constant)
    except RecursionError:
        raise ValueError("it nests too deep") from None


def read_toml(path: Path, *, max_bytes: int = MAX_TOML) -> dict[str, Any]:
    """The table of a TOML file, in UTF-8.

    Raises:
        HipaError: as ``read_bytes``; or it is no TOML, nests too deep, or has an integer of
            thousands of digits.

    """
    text = read_text(path, max_bytes=max_bytes)
    try:
        return tomllib.loads(text)
    except RecursionError:
        reason = "it nests too deep"
    except ValueError as error:  # TOMLDecodeError, and the one of too many digits, are ValueErrors
        reason = first_line(error)
    raise HipaError(f"{path} cannot be read as TOML: {reason}. Correct the file.")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def validated(model: type[Model], data: Any, path: Path, remedy: str) -> Model:
    """The record that ``data`` from the file at ``path`` describes.

    Raises:
        HipaError: a field is missing, unknown, or has a value that it may not have; the message
            names the first such field.

    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(shown(str(part)) for part in first["loc"])
        words = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            words = "this version knows no such field"
        reason = f"{where}: {words}" if where else words
    except HipaError as error:  # a check of the record's own
        reason = reason_of(error)
    raise HipaError(f"{path}: {reason}. {remedy}")


def read_record(path: Path, model: type[Model], remedy: str, *, max_bytes: int = MAX_JSON) -> Model:
    """The record in a JSON file.

    Raises:
        HipaError: as ``read_json`` and ``validated``.

    """
    data = read_json(path, max_bytes=max_bytes, remedy=remedy)
    return validated(model, data, path, remedy)


def read_text(path: Path, *, max_bytes: int, remedy: str = "") -> str:
    """The text of a file in UTF-8, without the mark that some editors put first.

    Args:
        path: of the file.
        max_bytes: a larger file is not read.
        remedy: what a user may do where it is missing; empty for that of a bundle.

    Raises:
        HipaError: as ``read_bytes``; or it is not UTF-8.

    """
    try:
        return read_bytes(path, max_bytes, remedy).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise HipaError(f"{path} cannot be read: it is not UTF-8 (byte {error.start}).") from None

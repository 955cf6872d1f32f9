"""Reading of files that may come from a stranger: bounded, and every fault is one line.

Each format has one reader here. A reader checks that the file is a regular one and how large it is
before it reads, and what the file promises before it makes room for that.
"""

from __future__ import annotations

import json
import math
import os
import stat
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NoReturn, TypeVar

import numpy as np
from pydantic import BaseModel, ValidationError

from hipa_deploy.disk.paths import check_regular, shown
from hipa_deploy.errors import HipaError, first_line

MIB = 1 << 20
MAX_JSON = 16 * MIB
MAX_ARRAYS = 20_000  # in one file
MAX_DIMENSIONS = 8
REEXPORT = "Export the bundle again."
MAX_SIZE = 1 << 20  # of a dimension
# Kinds of numbers that an array may hold: no objects, texts or records.
_NUMBERS = "biuf"

_NO_WAIT = getattr(os, "O_NONBLOCK", 0)  # Windows has no pipes in its folders

Model = TypeVar("Model", bound=BaseModel)
Header = tuple[np.dtype, tuple[int, ...]]  # dtype and shape of an array


@contextmanager
def as_line(problem: str, remedy: str) -> Iterator[None]:
    """Turn whatever a library raises in this block into a HipaError: problem, reason, remedy.

    Panics of libraries in Rust are no ``Exception``, and an ``EOFError`` would look like Ctrl-D: so
    everything is caught that is not a HipaError, Ctrl-C or the end of the process.

    Raises:
        HipaError: in place of any other error.

    Example:
        >>> with as_line(f"{path} is not a tokenizer", "Export the bundle again."):
        ...     tokenizer = Tokenizer.from_file(str(path))

    """
    try:
        yield
    except (HipaError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except MemoryError as error:
        # numpy says how much it wanted; others say nothing.
        reason = first_line(error) if str(error) else "not enough memory"
        raise HipaError(f"{problem}: {reason}. {remedy}") from None
    except BaseException as error:
        reason = first_line(error).rstrip(".")
        raise HipaError(f"{problem}: {reason}. {remedy}") from None


def reason_of(error: HipaError) -> str:
    """The words of an error, to stand in brackets in another one."""
    return str(error).strip().rstrip(".")


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """The content of a regular file of at most ``max_bytes``.

    Raises:
        HipaError: the file is missing, larger, no regular file, or cannot be read.

    """
    check_regular(path)
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


def _check_size(path: Path, size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise HipaError(f"{path} has {size} bytes. Expected at most {max_bytes}.")


def read_json(path: Path, *, max_bytes: int = MAX_JSON) -> Any:
    """The value in a JSON file, in UTF-8.

    Raises:
        HipaError: as ``read_bytes``; or it is no JSON, nests too deep, or has a number that is not
            finite or has thousands of digits.

    """
    content = read_bytes(path, max_bytes)
    try:
        return json.loads(content.decode("utf-8"), parse_constant=_refuse_constant)
    except RecursionError:
        reason = "it nests too deep"
    except ValueError as error:  # no UTF-8, no JSON, an integer of more than 4,300 digits
        reason = first_line(error)
    raise HipaError(f"{path} is not JSON that can be read ({reason}). Export it again.")


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
        reason = f"{where}: {words}" if where else words
    except HipaError as error:  # a check of the record's own
        reason = reason_of(error)
    raise HipaError(f"{path}: {reason}. {remedy}")


def read_record(path: Path, model: type[Model], remedy: str, *, max_bytes: int = MAX_JSON) -> Model:
    """The record in a JSON file.

    Raises:
        HipaError: as ``read_json`` and ``validated``.

    """
    return validated(model, read_json(path, max_bytes=max_bytes), path, remedy)


def read_text(path: Path, *, max_bytes: int) -> str:
    """The text of a file in UTF-8, without the mark that some editors put first.

    Raises:
        HipaError: as ``read_bytes``; or it is not UTF-8.

    """
    try:
        return read_bytes(path, max_bytes).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise HipaError(f"{path} cannot be read: it is not UTF-8 (byte {error.start}).") from None


def read_npy(path: Path, check: Callable[[Header], str | None], *, mapped: bool = False) -> Any:
    """The array of a .npy file.

    Args:
        path: the file.
        check: is asked about the dtype and shape before room is made, and says what is wrong.
        mapped: map the file and read nothing; the array cannot be written.

    Raises:
        HipaError: no array of numbers, one that ``check`` refuses, or a file of another length than
            its header says.

    """
    check_regular(path)
    with as_line(f"{path} is not an array that can be read", "Export it again."):
        with path.open("rb") as file:
            header = _header(file)
            size = path.stat().st_size - file.tell()
        _check_header(header, size, check)
        return np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)


def read_npz(
    path: Path, check: Callable[[str, Header], str | None], *, max_bytes: int
) -> dict[str, np.ndarray]:
    """The arrays of a .npz file by name.

    Args:
        path: the file.
        check: is asked about the name, dtype and shape of each before room is made, and says what
            is wrong.
        max_bytes: of all arrays together, unpacked.

    Raises:
        HipaError: not such a file, more than ``max_bytes``, or an array that ``check`` refuses.

    """
    check_regular(path)
    arrays = {}
    remedy = "Export it again."
    with (
        as_line(f"{path} is not a file of arrays that can be read", remedy),
        zipfile.ZipFile(path) as archive,
    ):
        members = archive.infolist()
        total = sum(member.file_size for member in members)
        if len(members) > MAX_ARRAYS or total > max_bytes:
            raise ValueError(
                f"it unpacks to {len(members)} arrays and {total} bytes, "
                f"expected at most {MAX_ARRAYS} and {max_bytes}"
            )
        for member in members:
            name = member.filename.removesuffix(".npy")
            # One reader would take the first of two, another reader the second.
            if name in arrays:
                raise ValueError(f"{shown(name)} comes twice")
            with archive.open(member) as file:
                arrays[name] = _read_member(file, name, member.file_size, check)
    return arrays


def _read_member(
    file: IO[bytes], name: str, size: int, check: Callable[[str, Header], str | None]
) -> np.ndarray:
    header = _header(file)
    _check_header(header, size - file.tell(), lambda found: check(name, found))
    file.seek(0)
    return np.lib.format.read_array(file, allow_pickle=False)


def _header(file: IO[bytes]) -> Header:
    """The dtype and shape that a .npy file begins with."""
    version = np.lib.format.read_magic(file)
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in readers:
        raise ValueError(f"version {version} of the format")
    shape, _, dtype = readers[version](file)
    return dtype, shape


def _check_header(header: Header, size: int, check: Callable[[Header], str | None]) -> None:
    """Raise ValueError unless the array has numbers, fills ``size`` bytes and passes ``check``."""
    dtype, shape = header
    if dtype.kind not in _NUMBERS or len(shape) > MAX_DIMENSIONS or min(shape, default=0) < 0:
        raise ValueError(f"it has {dtype} {list(shape)}")
    needed = math.prod(shape) * dtype.itemsize
    if needed != size:
        raise ValueError(f"{dtype} {list(shape)} is {needed} bytes, and there are {size}")
    problem = check(header)
    if problem:
        raise ValueError(problem)


def bounded(found: Header) -> str | None:
    """A ``check`` of an array of which only the size is known: no dimension is 0 or absurd."""
    _, shape = found
    if all(0 < size <= MAX_SIZE for size in shape):
        return None
    return f"it has the shape {list(shape)}, expected 1 to {MAX_SIZE} in each dimension"


def expect(arrays: Mapping[str, Header]) -> Callable[[str, Header], str | None]:
    """A ``check`` of ``read_npz``: every array is one of ``arrays``, with its dtype and shape."""

    def check(name: str, found: Header) -> str | None:
        if name not in arrays:
            return f"{shown(name)} is not expected in it"
        dtype, shape = arrays[name]
        if found == (dtype, shape):
            return None
        got = f"{found[0]} {list(found[1])}"
        return f"{shown(name)} is {got}, expected {dtype} {list(shape)}"

    return check

"""Arrays in files of numpy's formats, .npy and .npz, that may come from a stranger.

What a file promises is checked before room is made for it: a header of a hundred bytes can promise
any size, and an archive of megabytes can unpack to gigabytes.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from hipa_deploy.disk.reading import check_regular, shown
from hipa_deploy.errors import as_line

MAX_ARRAYS = 20_000  # in one file
MAX_DIMENSIONS = 8
MAX_SIZE = 1 << 20  # of a dimension
# Kinds of numbers that an array may hold: no objects, texts or records.
_NUMBERS = "biuf"

Header = tuple[np.dtype, tuple[int, ...]]  # dtype and shape of an array


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

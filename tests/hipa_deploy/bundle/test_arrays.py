"""Arrays of a stranger: numbers alone, of the size that the file has, and no bombs."""

from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hipa_deploy.bundle.arrays import bounded, expect, read_npy, read_npz
from hipa_deploy.errors import HipaError

ANY = 1 << 20


def header(descr: str, shape: tuple[int, ...]) -> bytes:
    text = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def saved(array: Any) -> bytes:
    target = io.BytesIO()
    np.save(target, array, allow_pickle=True)
    return target.getvalue()


ARRAYS = {
    "empty": (b"", "cannot|is not"),
    "text": (b"hello", "magic"),
    "objects": (saved(np.asarray([{}], dtype=object)), "object"),
    "texts": (saved(np.asarray(["a"])), "<U1"),
    "records": (saved(np.zeros(2, [("a", "f4")])), "it has"),
    "huge": (header("<f4", (10**12,)) + b"\0" * 8, "is 4000000000000 bytes, and there are 8"),
    "negative": (header("<f4", (-1,)) + b"\0" * 8, "it has"),
    "cut": (saved(np.zeros(9))[:-1], "72 bytes, and there are 71"),
    "zero": (saved(np.zeros((0, 3))), "it has the shape"),
    "many dimensions": (header("<f4", (1,) * 30) + b"\0" * 4, "it has"),
    "other version": (b"\x93NUMPY\x09\x00" + b"\0" * 100, "format"),
}


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("mapped", [False, True])
def test_what_is_no_array_of_numbers_is_refused(tmp_path: Path, name: str, mapped: bool) -> None:
    content, words = ARRAYS[name]
    path = tmp_path / "x.npy"
    path.write_bytes(content)
    with pytest.raises(HipaError, match=words):
        read_npy(path, bounded, mapped=mapped)


@pytest.mark.parametrize("name", ARRAYS)
def test_the_same_within_an_archive(tmp_path: Path, name: str) -> None:
    content, words = ARRAYS[name]
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", content)
    with pytest.raises(HipaError, match=words):
        read_npz(path, lambda _, found: bounded(found), max_bytes=ANY)


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x05\x06" + b"\0" * 17, b"\0" * 10_000])
def test_what_is_no_archive_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.npz"
    path.write_bytes(content)
    with pytest.raises(HipaError, match="is not a file of arrays"):
        read_npz(path, lambda *_: None, max_bytes=ANY)


def test_arrays_are_read_as_numpy_wrote_them(tmp_path: Path) -> None:
    arrays = {"a": np.arange(6, dtype=np.float16).reshape(2, 3).T, "b": np.asarray(7), "c": [True]}
    np.savez_compressed(tmp_path / "x.npz", **arrays)
    expected = {
        "a": (np.dtype("f2"), (3, 2)),
        "b": (np.dtype("i8"), ()),
        "c": (np.dtype("?"), (1,)),
    }
    read = read_npz(tmp_path / "x.npz", expect(expected), max_bytes=ANY)
    for name, array in arrays.items():
        np.testing.assert_array_equal(read[name], array)
    np.save(tmp_path / "x.npy", arrays["a"])
    for mapped in (False, True):
        got = read_npy(tmp_path / "x.npy", bounded, mapped=mapped)
        np.testing.assert_array_equal(got, arrays["a"])


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez_compressed(path, x=np.zeros(1 << 22, np.uint8))
    assert path.stat().st_size < 10_000
    with pytest.raises(HipaError, match="unpacks to 1 arrays and 4194432 bytes"):
        read_npz(path, lambda *_: None, max_bytes=ANY)


def test_an_archive_may_not_say_one_thing_twice_or_something_else(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    content = saved(np.zeros(2, np.float32))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", content)
    check = expect({"x": (np.dtype("f4"), (3,))})
    with pytest.raises(HipaError, match=r"x is float32 \[2\], expected float32 \[3\]"):
        read_npz(path, check, max_bytes=ANY)
    with pytest.raises(HipaError, match="x is not expected"):
        read_npz(path, expect({}), max_bytes=ANY)
    with (
        zipfile.ZipFile(path, "a") as archive,
        pytest.warns(UserWarning, match="Duplicate"),
    ):
        archive.writestr("x.npy", content)
    with pytest.raises(HipaError, match="x comes twice"):
        read_npz(path, lambda *_: None, max_bytes=ANY)

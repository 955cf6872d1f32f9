"""Guarded readers: bounded, regular files only, and every fault is one line."""

from __future__ import annotations

import io
import json
import os
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import Field

from hipa_deploy.disk.reading import (
    as_line,
    bounded,
    expect,
    read_bytes,
    read_json,
    read_npy,
    read_npz,
    read_record,
    read_text,
)
from hipa_deploy.errors import HipaError
from hipa_deploy.record import Record

ANY = 1 << 20


class Pair(Record):
    left: int = Field(ge=0)
    right: tuple[str, ...] = ()


def test_a_record_is_read(tmp_path: Path) -> None:
    path = tmp_path / "pair.json"
    path.write_text('{"left": 1, "right": ["ä"]}', encoding="utf-8")
    assert read_record(path, Pair, "Write it again.") == Pair(left=1, right=("ä",))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is not JSON"),
        (b"\xff", "is not JSON"),
        (b"[" * 200_000, "nests too deep"),
        (b'{"left": ' + b"9" * 5000 + b"}", "Exceeds the limit"),
        (b'{"left": NaN}', "NaN is no number"),
        (b'{"left": -1}', "left: Input should be greater"),
        (b'{"left": 1, "\\u001b[2J": 1}', r"'\\x1b\[2J': Extra inputs"),
        (b'{"left": 1, "right": [1]}', r"right\.0: "),
        (b"[]", "Input should be a valid dictionary"),
        (b'{"left": 1}' + b" " * 2000, "has 2011 bytes. Expected at most 2000"),
    ],
)
def test_what_is_no_record_is_one_line(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "pair.json"
    path.write_bytes(content)
    with pytest.raises(HipaError, match=words) as caught:
        read_record(path, Pair, "Write it again.", max_bytes=2000 if b"    " in content else ANY)
    assert str(caught.value).isprintable()


def test_a_sparse_file_is_refused_by_its_size(tmp_path: Path) -> None:
    with (tmp_path / "x.json").open("wb") as file:
        file.truncate(40 * 10**9)
    with pytest.raises(HipaError, match="has 40000000000 bytes"):
        read_json(tmp_path / "x.json")


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, words in ((tmp_path / "pipe", "pipe"), (Path("/dev/zero"), "device")):
        with pytest.raises(HipaError, match=f"is a {words}"):
            read_bytes(path, ANY)


def test_text_has_no_mark_and_is_utf8(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes("\ufeffä\n".encode())
    assert read_text(path, max_bytes=ANY) == "ä\n"
    path.write_bytes(b"a\xff")
    with pytest.raises(HipaError, match=r"is not UTF-8 \(byte 1\)"):
        read_text(path, max_bytes=ANY)


class PanicError(BaseException):
    """As pyo3's PanicException is no Exception."""


@pytest.mark.parametrize("error", [PanicError("at line 3\nmore"), EOFError(), MemoryError()])
def test_whatever_a_library_raises_is_one_line(error: BaseException) -> None:
    with (
        pytest.raises(HipaError, match=r"^it fails: .*\. Mend it\.$"),
        as_line("it fails", "Mend it."),
    ):
        raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), HipaError("mine"), SystemExit(3)])
def test_what_is_no_fault_of_a_library_passes(error: BaseException) -> None:
    with pytest.raises(type(error)), as_line("it fails", "Mend it."):
        raise error


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


def test_json_is_what_json_says(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None, True, "ü"]}
    (tmp_path / "x.json").write_text(json.dumps(value))
    assert read_json(tmp_path / "x.json") == value

"""Guarded readers: bounded, regular files only, and every fault is one line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from pydantic import Field

from hipa_deploy.disk.reading import read_bytes, read_json, read_record, read_text
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
        (b'{"left": 1, "\\u001b[2J": 1}', r"'\\x1b\[2J': this version knows no such"),
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


def test_json_is_what_json_says(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None, True, "ü"]}
    (tmp_path / "x.json").write_text(json.dumps(value))
    assert read_json(tmp_path / "x.json") == value

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hipa_deploy.errors import HipaError, MissingDependencyError
from hipa_deploy.generate.prompt_files import (
    one_line,
    read_numbered_prompts,
    read_prompt_file,
)

CATS = ["a cat, sitting", "a dog"]


def write_csv(path: Path, header: str = "id,caption") -> Path:
    path.write_text(f'{header}\n1,"a cat, sitting"\n2,a dog\n3,\n4,a dog\n5\n')
    return path


def write_parquet(path: Path, name: str = "caption", cells: Any = None) -> Path:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    cells = [*CATS, None] if cells is None else cells
    parquet.write_table(pa.table({"id": [1, 2, 3], name: cells}), path)
    return path


def write_twice(path: Path) -> Path:
    """A table as a join of two may have it, both with captions."""
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pa.table([CATS, CATS], names=["caption", "caption"]), path)
    return path


def write_dataset(folder: Path, name: str = "text") -> Path:
    """What ``datasets.Dataset.save_to_disk`` writes, in two shards."""
    pa = pytest.importorskip("pyarrow")
    folder.mkdir(parents=True)
    for index, cell in enumerate(CATS):
        table = pa.table({name: [cell]})
        with (
            pa.OSFile(str(folder / f"data-{index}.arrow"), "wb") as sink,
            pa.ipc.new_stream(sink, table.schema) as out,
        ):
            out.write_table(table)
    files = [{"filename": "data-0.arrow"}, {"filename": "data-1.arrow"}]
    (folder / "state.json").write_text(json.dumps({"_data_files": files}))
    return folder


def test_a_text_file(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("﻿a cat,  sitting\n\n a dog \na dog\n", encoding="utf-8")
    assert read_prompt_file(path) == CATS


def test_places_for_an_error_message(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_bytes(
        b"\xef\xbb\xbf# no comment\r\n\r\na dog\rand\xe2\x80\xa8so on\r\na dog\r\na cat"
    )
    assert read_numbered_prompts(path) == {
        "# no comment": "line 1",
        "a dog": "line 3",
        "and so on": "line 4",
        "a cat": "line 6",
    }
    rows = {"a cat, sitting": "row 1", "a dog": "row 2"}
    assert read_numbered_prompts(write_csv(tmp_path / "x.csv")) == rows


@given(text=st.text())
def test_any_text_of_a_file_becomes_clean_prompts(text: str) -> None:
    with tempfile.NamedTemporaryFile(suffix=".txt") as file:
        path = Path(file.name)
        path.write_bytes(text.encode())
        if "\0" in text or not text.removeprefix("\ufeff").strip():
            with pytest.raises(HipaError, match=r"is empty|zero byte"):
                read_prompt_file(path)
            return
        prompts = read_prompt_file(path)
    assert all(prompt == one_line(prompt) != "" for prompt in prompts)
    assert len(set(prompts)) == len(prompts)


def test_the_remedy_is_the_callers(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "x.csv", "id,title")
    with pytest.raises(
        HipaError, match=r"It has: id, title\. Set prompts_column\. If its first line is"
    ):
        read_prompt_file(path, column_remedy="Set prompts_column.")


def test_csv_and_tsv(tmp_path: Path) -> None:
    assert read_prompt_file(write_csv(tmp_path / "x.csv")) == CATS
    assert read_prompt_file(write_csv(tmp_path / "x.csv", "id,text")) == CATS
    assert read_prompt_file(write_csv(tmp_path / "x.CSV", "id,title"), "title") == CATS
    (tmp_path / "x.tsv").write_text("caption\tid\na cat, sitting\t1\n" + '"a\ndog"\t2\n')
    assert read_prompt_file(tmp_path / "x.tsv") == CATS


def test_parquet(tmp_path: Path) -> None:
    assert read_prompt_file(write_parquet(tmp_path / "x.parquet")) == CATS
    assert read_prompt_file(write_parquet(tmp_path / "x.parquet", "title"), "title") == CATS


def test_a_column_beside_a_table_in_a_table(tmp_path: Path) -> None:
    """Parquet calls the part b of the column a 'a.b', too."""
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "x.parquet"
    table = pa.table({"a": [{"b": "not this"}, {"b": "nor this"}], "a.b": CATS})
    parquet.write_table(table, path)
    assert read_prompt_file(path, "a.b") == CATS


@pytest.mark.parametrize("kind", ["large_string", "string_view"])
def test_other_kinds_of_text(kind: str, tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    if not hasattr(pa, kind):
        pytest.skip(f"this pyarrow has no {kind}")
    cells = pa.array([*CATS, None], getattr(pa, kind)())
    assert read_prompt_file(write_parquet(tmp_path / "x.parquet", cells=cells)) == CATS


def test_a_folder_of_datasets(tmp_path: Path) -> None:
    assert read_prompt_file(write_dataset(tmp_path / "one")) == CATS
    write_dataset(tmp_path / "splits" / "train")
    (tmp_path / "splits" / "dataset_dict.json").write_text('{"splits": ["test", "train"]}')
    assert read_prompt_file(tmp_path / "splits") == CATS


def test_what_datasets_itself_writes(tmp_path: Path) -> None:
    # The package needs a hub client of its own, which may fail to import.
    datasets = pytest.importorskip("datasets", exc_type=ImportError)
    whole = datasets.Dataset.from_dict({"caption": ["no", *CATS]})
    whole.select([1, 2]).save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": whole.select([1, 2])}).save_to_disk(tmp_path / "splits")
    assert read_prompt_file(tmp_path / "one") == read_prompt_file(tmp_path / "splits") == CATS


def damaged(path: Path, content: bytes = b"no") -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("make", "column", "message"),
    [
        (lambda p: p / "none.txt", None, r"No such file or directory\. Expected text"),
        (lambda p: p / "none.csv", None, "cannot be read: No such file"),
        (lambda p: p / "none.parquet", None, "cannot be read: No such file"),
        (lambda p: damaged(p / "x.txt", b" \n"), None, "is empty. Expected one prompt a line"),
        (lambda p: damaged(p / "x.txt", b"caf\xe9"), None, r"line 1 is not UTF-8 \(byte 3\)"),
        (lambda p: damaged(p / "x.txt", b"a\ncaf\xe9"), None, r"line 2 is not UTF-8 \(byte 5\)"),
        (lambda p: damaged(p / "x.txt", "a".encode("utf-16")), None, "is UTF-16. Save it as UTF-8"),
        (lambda p: damaged(p / "x.csv", "a".encode("utf-16")), None, "is UTF-16. Save it as UTF-8"),
        (lambda p: damaged(p / "x.txt", "a".encode("utf-32")), None, "is UTF-32. Save it as UTF-8"),
        (
            lambda p: damaged(p / "x.txt", "a\nb".encode("utf-16-be")),
            None,
            "line 1 holds a zero byte: it is no text, or UTF-16 without a mark",
        ),
        (lambda p: damaged(p / "x.jsonl", b"{}"), None, ".jsonl is not read. Expected text"),
        (lambda p: damaged(p / "x.csv", b"caf\xe9"), None, r"is not UTF-8 \(byte 3\)"),
        (
            lambda p: damaged(p / "x.txt", b"a"),
            "text",
            "has no columns: prompts_column = 'text' is for a table",
        ),
        (lambda p: damaged(p / "x.csv", b""), None, "is empty. Expected a header line"),
        (lambda p: damaged(p / "x.csv", b"caption\n"), None, "is empty. Expected one prompt a row"),
        (
            lambda p: damaged(p / "x.csv", b'caption\n"a'),
            None,
            "is damaged: unexpected end of data",
        ),
        (
            lambda p: write_csv(p / "x.csv", "id,title"),
            None,
            "no column 'caption' or 'text'. It has: id, title. Name the column",
        ),
        (lambda p: write_csv(p / "x.csv"), "title", "no column 'title'. It has: id, caption"),
        (
            lambda p: write_csv(p / "x.csv", "caption,caption"),
            None,
            "has 2 columns 'caption'. Expected one",
        ),
        (lambda p: write_twice(p / "x.parquet"), None, "has 2 columns 'caption'. Expected one"),
        (lambda p: damaged(p / "x.parquet"), None, "cannot be read as Parquet"),
        (
            lambda p: write_parquet(p / "x.parquet", cells=[1, 2, 3]),
            None,
            "a caption is of type int64. Expected",
        ),
        (
            lambda p: write_parquet(p / "x.parquet", cells=[["a"], ["b", "c"], None]),
            None,
            "a caption is of type list<",
        ),
        (lambda p: p, None, "has no readable state.json"),
        (
            lambda p: damaged(p / "dataset_dict.json").parent,
            None,
            "has no readable dataset_dict.json",
        ),
        (
            lambda p: damaged(p / "dataset_dict.json", b'{"splits": ["a", "b"]}').parent,
            None,
            "the splits a, b. Name",
        ),
        (
            lambda p: damaged(write_dataset(p / "d") / "data-1.arrow").parent,
            None,
            "cannot be read as a dataset",
        ),
        (lambda p: damaged(p / "state.json", b'{"_data_files": []}').parent, None, "It has: none"),
    ],
)
def test_mistakes_are_one_line(
    make: object, column: str | None, message: str, tmp_path: Path
) -> None:
    with pytest.raises(HipaError, match=message) as error:
        read_prompt_file(make(tmp_path), column)
    assert "\n" not in str(error.value)


def test_the_missing_package_and_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(
        MissingDependencyError, match=r"pyarrow is not installed. .*hipa-deploy\[captions"
    ):
        read_prompt_file(tmp_path / "x.parquet")

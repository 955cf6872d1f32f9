"""Captions of image folders in every layout that people have, and what is told of the others."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from hipa_deploy.errors import HipaError
from hipa_deploy.train.data.captions import folder_captions, image_paths, tell_skipped


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    """Two images in the folder and one below it; their contents do not matter."""
    names = ("Blue.PNG", "red.png", "sub/grün.jpg")
    (tmp_path / "sub").mkdir()
    for name in names:
        (tmp_path / name).touch()
    return [tmp_path / name for name in names]


def test_hidden_files_and_folders_are_no_images(images: list[Path], tmp_path: Path) -> None:
    screen = io.StringIO()
    tell_skipped(tmp_path, Console(file=screen, width=80))
    assert screen.getvalue() == ""
    for name in ("._red.png", ".cache/a.jpg", "__MACOSX/sub/b.png", "thumbs.png/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert sorted(image_paths(tmp_path)) == sorted(images)
    tell_skipped(tmp_path, Console(file=screen, width=80))
    told = screen.getvalue()
    assert f"images {tmp_path}: 4 hidden files, or folders, are skipped: ._red.png, .cache" in told

    # The folder itself may lie in a hidden one.
    hidden = tmp_path / ".photos"
    hidden.mkdir()
    (hidden / "red.png").touch()
    assert image_paths(hidden) == [hidden / "red.png"]


def read(folder: Path, images: list[Path]) -> tuple[list[str], str]:
    """The captions, and what was told."""
    screen = io.StringIO()
    captions = folder_captions(folder, images, Console(file=screen, width=80))
    return captions, screen.getvalue()


def jsonl(path: Path, rows: dict[str, str | None], column: str = "text") -> None:
    lines = [json.dumps({"file_name": name, column: text}) for name, text in rows.items()]
    path.write_text("\n".join(lines) + "\n\n", encoding="utf-8")


CAPTIONS = ["a blue  square", "a red square", "grün"]
READ = (["a blue square", "a red square", "grün"], "")


@pytest.mark.parametrize("column", ["text", "caption"])
@pytest.mark.parametrize(
    "names",
    [
        ("Blue.PNG", "red.png", "sub/grün.jpg"),
        (".\\Blue.PNG", "./red.png", "sub\\grün.jpg"),
        ("blue.png", "RED.PNG", "SUB/gru\u0308n.JPG"),
        ("Blue", "red.webp", "sub/grün"),
    ],
)
def test_tables(names: tuple[str, ...], column: str, images: list[Path], tmp_path: Path) -> None:
    rows = dict(zip(names, CAPTIONS, strict=True))
    jsonl(tmp_path / "metadata.jsonl", rows, column)
    assert read(tmp_path, images) == READ
    (tmp_path / "metadata.jsonl").unlink()

    lines = [f'{name},"{text}"' for name, text in rows.items()]
    text = "\n".join([f"file_name,{column}", *lines])
    (tmp_path / "metadata.csv").write_text(text, encoding="utf-8-sig")
    assert read(tmp_path, images) == READ
    (tmp_path / "metadata.csv").unlink()

    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"file_name": list(rows), column: list(rows.values())})
    parquet.write_table(table, tmp_path / "metadata.parquet")
    assert read(tmp_path, images) == READ


def test_a_table_of_a_folder_below_names_files_from_there(
    images: list[Path], tmp_path: Path
) -> None:
    jsonl(tmp_path / "metadata.jsonl", dict(zip(("Blue.PNG", "red.png"), CAPTIONS, strict=False)))
    jsonl(tmp_path / "sub" / "metadata.jsonl", {"grün.jpg": "grün"})
    assert read(tmp_path, images) == READ


def test_texts_beside_the_images(images: list[Path], tmp_path: Path) -> None:
    (tmp_path / "Blue.caption").write_text("a blue square\n")
    (tmp_path / "Blue.txt").write_text("not this one")
    (tmp_path / "red.txt").write_bytes(b"\xef\xbb\xbf\r\n a red square \r\nanother line")
    (tmp_path / "sub" / "grün.jpg.txt").write_text("grün", encoding="utf-8")
    assert read(tmp_path, images) == READ


def test_a_row_counts_more_than_a_text_and_an_empty_one_less(
    images: list[Path], tmp_path: Path
) -> None:
    jsonl(tmp_path / "metadata.jsonl", {"Blue.PNG": "a blue square", "red.png": None})
    for path in images:
        path.with_suffix(".txt").write_text("beside")
    assert read(tmp_path, images) == (["a blue square", "beside", "beside"], "")


def test_what_does_not_match_is_told_in_one_line_each(images: list[Path], tmp_path: Path) -> None:
    rows = {"red.png": "a red square", **{f"no{number}.png": "x" for number in range(4)}}
    jsonl(tmp_path / "metadata.jsonl", rows)
    captions, told = read(tmp_path, images)
    assert captions == ["", "a red square", ""]
    unused, missing = told.splitlines()
    assert unused.endswith("4 rows name no image of it: no0.png, no1.png, no2.png, …")
    assert "2 of 3 have no caption and train with the empty prompt: Blue.PNG, sub/grün" in missing


@pytest.mark.parametrize(
    ("folders", "told"),
    [
        (("10_cat", "2_dog", "birds"), "every image counts once: 10_cat, 2_dog"),
        (("10_cat", "."), "every image counts once: 10_cat"),
        (("5_cat", "5_dog"), ""),
        (("2024 cats", "_dogs"), ""),
    ],
)
def test_repeats_in_names_of_folders_are_told(
    folders: tuple[str, ...], told: str, tmp_path: Path
) -> None:
    images = [tmp_path / folder / "a.png" for folder in folders]
    for image in images:
        image.parent.mkdir(exist_ok=True)
        image.touch()
        image.with_suffix(".txt").write_text("a pet", encoding="utf-8")
    captions, lines = read(tmp_path, images)
    assert captions == ["a pet"] * len(images)
    assert lines.count("\n") == bool(told)
    assert told in lines


def test_a_name_of_two_images_is_none_of_them(tmp_path: Path) -> None:
    images = [tmp_path / "a.jpg", tmp_path / "a.png"]
    jsonl(tmp_path / "metadata.jsonl", {"a": "which?", "a.png": "this one"})
    captions, told = read(tmp_path, images)
    assert captions == ["", "this one"]
    assert "1 rows name no image of it: a\n" in told


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({}, r"no image has a caption\. Expected metadata.jsonl .* Blue\.txt.* captions = false"),
        ({"x.png": "y"}, r"Its metadata names x\.png, not Blue\.PNG"),
    ],
)
def test_no_caption_at_all(
    rows: dict[str, str | None], message: str, images: list[Path], tmp_path: Path
) -> None:
    if rows:
        jsonl(tmp_path / "metadata.jsonl", rows)
    with pytest.raises(HipaError, match=message):
        read(tmp_path, images)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metadata.jsonl", b"{", "line 1 is no JSON object with a file_name"),
        ("metadata.jsonl", b"[" * 100_000, "line 1 is no JSON object"),
        (
            "metadata.jsonl",
            b'{"file_name": "red.png", "label": 3}',
            "has no caption or text",
        ),
        ("metadata.jsonl", b'{"file_name": "red.png", "text": 3}', "the text is no text"),
        (
            "metadata.csv",
            b"file,text\nred.png,x\n",
            r"has no column 'file_name'. It has: file, text. Name that column file_name\.$",
        ),
        ("red.txt", b"\xff", "is not UTF-8"),
    ],
)
def test_captions_that_cannot_be_read(
    name: str, content: bytes, message: str, images: list[Path], tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(HipaError, match=message):
        read(tmp_path, images)


def test_two_tables(images: list[Path], tmp_path: Path) -> None:
    jsonl(tmp_path / "metadata.jsonl", {"red.png": "x"})
    (tmp_path / "metadata.csv").write_text("file_name,text\nred.png,y\n")
    with pytest.raises(HipaError, match=r"has metadata\.csv and metadata\.jsonl"):
        read(tmp_path, images)

"""Captions of a folder of images, as ``datasets``' ImageFolder and kohya's scripts lay them out.

- ``metadata.jsonl``, ``metadata.csv`` or ``metadata.parquet``, in the folder or below it: a row for
  each image, with ``file_name`` and ``text`` or ``caption``. Names are relative to the file.
  https://huggingface.co/docs/datasets/image_dataset#imagefolder
- A text beside each image: ``red.caption``, ``red.txt`` or ``red.png.txt`` for ``red.png``, the
  first that exists. Its first line that is not blank is the caption.
  https://github.com/kohya-ss/sd-scripts (its page on training). Its repeats, the number in a
  folder's name such as ``10_cat``, are not read.

A row counts more than a text. What has no caption, and what a row names in vain, is said.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
import re
import unicodedata
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from rich.console import Console

from hipa_deploy.disk.hashing import file_sha256
from hipa_deploy.disk.reading import MIB, read_text
from hipa_deploy.errors import HipaError
from hipa_deploy.generate.prompt_files import COLUMNS, MAX_TEXT_MIB, one_line, read_cells

TABLES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
SIDECARS = (".caption", ".txt")
FORMATS = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
_REPEATS = re.compile(r"([1-9][0-9]*)_", re.ASCII)
NAMED = 3  # how many files a message names


def image_paths(folder: Path) -> list[Path]:
    """Every image in a folder and below it, sorted, but for those that ``skipped`` names.

    Raises:
        HipaError: the folder is missing, or holds no image.

    """
    formats = ", ".join(sorted(FORMATS))
    if not folder.is_dir():
        got = "it is a file" if folder.exists() else "there is no such folder"
        raise HipaError(f"images {folder}: {got}. Expected a folder of {formats} files.")
    paths = [path for path in _with_endings(folder) if not _is_skipped(folder, path)]
    if not paths:
        raise HipaError(f"images {folder}: no image in it. Expected a folder of {formats} files.")
    return paths


def skipped(folder: Path) -> list[Path]:
    """What is named as an image and is none, sorted.

    macOS leaves '._red.jpg' beside 'red.jpg' on other disks, and a folder __MACOSX in archives.
    Names that begin with a dot are those of hidden files, and a folder may be named 'thumbs.png'.
    """
    return [path for path in _with_endings(folder) if _is_skipped(folder, path)]


def tell_skipped(folder: Path, console: Console | None) -> None:
    """Say how many files ``skipped`` finds, if any; on stderr if ``console`` is None."""
    found = skipped(folder)
    if found:
        names = _some([path.relative_to(folder).as_posix() for path in found])
        screen = console or Console(stderr=True)
        _say(
            screen, f"images {folder}: {len(found)} hidden files, or folders, are skipped: {names}"
        )


def _with_endings(folder: Path) -> list[Path]:
    """What has an image's ending in a folder and below it, sorted; nothing if it is no folder."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in FORMATS)


def _is_skipped(folder: Path, path: Path) -> bool:
    """Whether a path below ``folder`` is hidden, or no file."""
    parts = path.relative_to(folder).parts
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
    return hidden or not path.is_file()


def folder_captions(folder: Path, paths: Sequence[Path], console: Console | None) -> list[str]:
    """The caption of each image; '' for one that has none.

    Args:
        folder: The folder of the images.
        paths: The images, in it or below it.
        console: Where missing captions are told; stderr if None.

    Raises:
        HipaError: No image has a caption; a table or a text cannot be read; or a folder has two
            tables.

    Example:
        >>> folder_captions(Path("photos"), [Path("photos/red.png")], None)
        ['a red square']

    """
    by_image, unused = _from_tables(folder, paths)
    captions = []
    for path in paths:
        captions.append(by_image.get(path) or _from_sidecar(path))
    missing = [path for path, caption in zip(paths, captions, strict=True) if not caption]

    if len(missing) == len(paths):
        got = f" Its metadata names {_some(unused)}, not {paths[0].name}." if unused else ""
        raise HipaError(
            f"images {folder}: no image has a caption.{got} Expected {TABLES[0]} or {TABLES[1]} "
            f"with file_name and text, or a text beside each image, such as "
            f"{paths[0].stem}.txt. To train with the empty prompt: captions = false in [source]."
        )
    screen = console or Console(stderr=True)
    if unused:
        _say(screen, f"images {folder}: {len(unused)} rows name no image of it: {_some(unused)}")
    if missing:
        names = _some([path.relative_to(folder).as_posix() for path in missing])
        _say(
            screen,
            f"images {folder}: {len(missing)} of {len(paths)} have no caption and train with the "
            f"empty prompt: {names}",
        )
    repeated = _repeating_folders(folder, paths)
    if repeated:
        _say(
            screen,
            f"images {folder}: numbers before names of folders are not read as repeats, as kohya's "
            f"scripts do; every image counts once: {_some(repeated)}",
        )
    return captions


def _repeating_folders(folder: Path, paths: Sequence[Path]) -> list[str]:
    """Folders named as kohya's '10_cat', sorted; none where all have one number, which changes
    nothing.
    """
    names = {"" if path.parent == folder else path.parent.name for path in paths}
    numbers = {name: found[1] for name in names if (found := _REPEATS.match(name))}
    alike = len(numbers) == len(names) and len(set(numbers.values())) == 1
    return [] if alike else sorted(numbers)


def captioned_sha256(folder: Path, captions: bool = True) -> str:
    """Hash the images of a folder and their captions, in their order.

    The names of the files do not count, unless they change the order.

    Args:
        folder: Folder of images, searched with its sub-folders.
        captions: Whether captions are read. If False, the images alone are hashed.

    Raises:
        HipaError: As ``image_paths`` and ``folder_captions``.

    """
    paths = image_paths(folder)
    # What has no caption is told where the images are read.
    texts = folder_captions(folder, paths, Console(quiet=True)) if captions else [""] * len(paths)
    rows = [(file_sha256(path), text) for path, text in zip(paths, texts, strict=True)]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _some(names: Sequence[str]) -> str:
    """The first names, for a message."""
    more = ", …" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _from_tables(folder: Path, paths: Sequence[Path]) -> tuple[dict[Path, str], list[str]]:
    """Captions by image of every table in ``folder`` and below, and the names without an image."""
    tables = sorted(path for name in TABLES for path in folder.rglob(name))
    for first, second in pairwise(tables):
        if first.parent == second.parent:
            raise HipaError(
                f"images {first.parent} has {first.name} and {second.name}. Remove one of them."
            )

    captions: dict[Path, str] = {}
    unused: list[str] = []
    for table in tables:
        find = _Finder(table.parent, paths)
        for name, caption in _rows(table):
            image = find(name)
            if image is None:
                unused.append(name)
            else:
                captions[image] = caption
    return captions, unused


class _Finder:
    """Finds the image that a row means.

    A name may have Windows' backslashes, letters of another case or in another Unicode form, or
    another ending or none. The more exact match counts, and a match of two images is none.
    """

    def __init__(self, root: Path, paths: Sequence[Path]) -> None:
        self._found: list[dict[str, Path | None]] = [{}, {}, {}]
        for path in paths:
            if path.is_relative_to(root):
                name = path.relative_to(root).as_posix()
                for found, key in zip(self._found, self._keys(name), strict=True):
                    found[key] = None if key in found else path

    def __call__(self, name: str) -> Path | None:
        for found, key in zip(self._found, self._keys(name), strict=True):
            if key in found:
                return found[key]
        return None

    @staticmethod
    def _keys(name: str) -> tuple[str, str, str]:
        """The name exactly, without regard to case, and without its ending too."""
        exact = posixpath.normpath(name.strip().replace("\\", "/"))
        folded = unicodedata.normalize("NFC", exact).casefold()
        return exact, folded, posixpath.splitext(folded)[0]


def _rows(table: Path) -> list[tuple[str, str]]:
    """File name and caption of each row; a row without a name is left out."""
    if table.suffix == ".jsonl":
        rows = _jsonl_rows(table)
    else:
        names = read_cells(table, "file_name")
        rows = list(zip(names, read_cells(table, None), strict=True))
    return [(name, caption) for name, caption in rows if name]


def _jsonl_rows(table: Path) -> list[tuple[str, str]]:
    rows = []
    for number, line in enumerate(_read_text(table).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            raise HipaError(
                f"{table}, line {number} is no JSON object with a file_name. Expected "
                '{"file_name": "red.png", "text": "a red square"}'
            )
        column = next((name for name in COLUMNS if name in row), None)
        if column is None:
            expected = " or ".join(COLUMNS)
            raise HipaError(f"{table}, line {number} has no {expected}. It has: {', '.join(row)}.")
        caption = row[column]
        if caption is not None and not isinstance(caption, str):
            raise HipaError(f"{table}, line {number}: the {column} is no text. Expected a string.")
        rows.append((row["file_name"], one_line(caption or "")))
    return rows


def sidecar(image: Path) -> Path | None:
    """The text beside an image that holds its caption; None if there is none."""
    beside = [image.with_suffix(ending) for ending in SIDECARS]
    beside += [image.with_name(image.name + ending) for ending in SIDECARS]
    return next((path for path in beside if path.is_file()), None)


def _from_sidecar(image: Path) -> str:
    """The caption of the text beside an image; '' if there is none."""
    path = sidecar(image)
    if path is None:
        return ""
    lines = _read_text(path).split("\n")
    return next((one_line(line) for line in lines if line.strip()), "")


def _read_text(path: Path) -> str:
    return read_text(path, max_bytes=MAX_TEXT_MIB * MIB)

"""Prompts from a text file, or from the captions of a table: CSV, TSV, Parquet, or a folder of ``datasets``."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from hipa_deploy.errors import HipaError, MissingDependencyError, first_line

COLUMNS = ("caption", "text")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
Table = tuple[
    Sequence[str], Callable[[str], Iterable[object]]
]  # the columns' names; name -> the column's cells


def read_prompt_file(path: Path, column: str | None = None) -> list[str]:
    """The distinct prompts of ``path`` in its order, without blank ones.

    One prompt a line; or the cells of ``column`` (by default of 'caption' or 'text') of a .csv, .tsv or .parquet
    file with a header, or of a folder that ``datasets`` wrote with ``save_to_disk``.

    Raises:
        HipaError: the file is missing, damaged, not UTF-8, has no such column or holds no prompt.
        MissingDependencyError: pyarrow is needed for this format.

    """
    table = _open_table(path)
    if table is None:
        if column is not None:
            raise HipaError(
                f"prompts {path} has no columns: prompts_column = {column!r} is for a table. Leave it out."
            )
        cells: Iterable[object] = _read_text(path).splitlines()
    else:
        names, cells_of = table
        cells = cells_of(_choose(path, names, column))
    prompts = list(dict.fromkeys(text for cell in cells if (text := _clean(path, cell))))
    if not prompts:
        raise HipaError(
            f"prompts {path} is empty. Expected one prompt a {'row' if table else 'line'}."
        )
    return prompts


def read_cells(path: Path, column: str | None) -> list[str]:
    """Every cell of a table's ``column`` (by default of 'caption' or 'text'), in order; empty cells are ''.

    Raises:
        HipaError: the file is missing, damaged, or has no such column.

    """
    table = _open_table(path)
    if table is None:
        raise HipaError(
            f"captions {path} are no table. Expected .csv, .tsv, .parquet or a folder of datasets."
        )
    names, cells_of = table
    return [_clean(path, cell) for cell in cells_of(_choose(path, names, column))]


def _clean(path: Path, cell: object) -> str:
    """One line of text; empty for an empty cell."""
    if cell is None:
        return ""
    if not isinstance(cell, str):
        raise HipaError(
            f"prompts {path}: a caption is of type {type(cell).__name__}. Expected a column of text."
        )
    return " ".join(cell.split())


def _choose(path: Path, names: Sequence[str], column: str | None) -> str:
    found = [name for name in (COLUMNS if column is None else (column,)) if name in names]
    if not found:
        wanted = repr(column) if column is not None else " or ".join(map(repr, COLUMNS))
        got = ", ".join(names) or "none"
        raise HipaError(
            f"prompts {path} has no column {wanted}. It has: {got}. Set prompts_column in the recipe."
        )
    return found[0]


def _open_table(path: Path) -> Table | None:
    """The table at ``path``; None for a text file."""
    suffix = path.suffix.lower()
    if path.is_dir():
        return _open_saved_dataset(path)
    if suffix in DELIMITERS:
        return _open_csv(path, DELIMITERS[suffix])
    return _open_parquet(path) if suffix == ".parquet" else None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(
            encoding="utf-8-sig"
        )  # a spreadsheet's export begins with a byte order mark
    except OSError as error:
        raise HipaError(
            f"prompts {path} cannot be read: {error.strerror}. Expected a file of prompts."
        ) from None
    except UnicodeDecodeError as error:
        raise HipaError(
            f"prompts {path} is not UTF-8 (byte {error.start}). Save it as UTF-8."
        ) from None


def _open_csv(path: Path, delimiter: str) -> Table:
    try:
        header, *rows = csv.reader(
            io.StringIO(_read_text(path), newline=""), delimiter=delimiter, strict=True
        )
    except ValueError:
        raise HipaError(
            f"prompts {path} is empty. Expected a header line and one prompt a row."
        ) from None
    except csv.Error as error:
        raise HipaError(
            f"prompts {path} is damaged: {error}. Expected quoted fields, as spreadsheets write."
        ) from None

    def cells(name: str) -> list[str | None]:
        index = header.index(name)
        return [row[index] if index < len(row) else None for row in rows]

    return header, cells


def _open_parquet(path: Path) -> Table:
    parquet = _pyarrow("pyarrow.parquet")
    try:
        file = parquet.ParquetFile(path)
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        raise HipaError(f"prompts {path} cannot be read as Parquet: {first_line(error)}") from None
    return file.schema_arrow.names, lambda name: file.read(columns=[name])[name].to_pylist()


def _open_saved_dataset(folder: Path) -> Table:
    """The Arrow streams that state.json lists; of several splits 'train', or the only one.

    The format: https://huggingface.co/docs/datasets/about_arrow. The ``datasets`` package itself is not needed.
    """
    ipc = _pyarrow("pyarrow.ipc")
    if (folder / "dataset_dict.json").exists():
        splits = list(_read_json(folder / "dataset_dict.json", "splits"))
        if "train" not in splits and len(splits) != 1:
            got = ", ".join(splits) or "none"
            raise HipaError(f"prompts {folder} has the splits {got}. Name one: {folder}/SPLIT.")
        folder = folder / ("train" if "train" in splits else splits[0])
    files = [
        folder / str(entry["filename"])
        for entry in _read_json(folder / "state.json", "_data_files")
    ]
    try:
        tables = [ipc.open_stream(file.read_bytes()).read_all() for file in files]
    except (OSError, ValueError) as error:
        raise HipaError(
            f"prompts {folder} cannot be read as a dataset: {first_line(error)}"
        ) from None
    names = tables[0].schema.names if tables else []
    return names, lambda name: [cell for table in tables for cell in table[name].to_pylist()]


def _read_json(path: Path, key: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))[key]
    except (OSError, ValueError, KeyError, TypeError):
        message = f"prompts {path.parent} has no readable {path.name}. Expected a folder of datasets' save_to_disk."
        raise HipaError(message) from None


def _pyarrow(module: str) -> Any:
    from importlib import import_module

    try:
        return import_module(module)
    except ImportError:
        raise MissingDependencyError("pyarrow", "captions") from None

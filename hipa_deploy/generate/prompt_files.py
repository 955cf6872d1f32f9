"""Prompts from a text file, or from the captions of a table: the one reader of every command.

A table is a CSV, TSV or Parquet file with a header, or a folder that the ``datasets`` package wrote
with ``save_to_disk``.
"""

from __future__ import annotations

import codecs
import csv
import io
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hipa_deploy.disk.reading import (
    MIB,
    inside,
    inside_folder,
    read_bytes,
    read_json,
)
from hipa_deploy.errors import HipaError, MissingDependencyError, as_line

COLUMNS = ("caption", "text")  # the columns that are read by default, the first that exists
DELIMITERS = {".csv": ",", ".tsv": "\t"}
# Tables that would be taken for lines of text.
UNREAD = (".json", ".jsonl", ".xls", ".xlsx", ".ods", ".arrow", ".feather")
# What a text in another encoding than UTF-8 begins with, as Windows' editors write it. The mark of
# UTF-32 begins with that of UTF-16, so it comes first.
MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
# Far above what is useful, and small enough that no file takes a machine's memory or an hour.
MAX_TEXT_MIB = 64  # of a text file, or of one column of a table
MAX_PROMPTS = 1_000_000
MAX_CHARACTERS = 10_000  # of a prompt; a context reads about a thousand of them at most
ROWS_AT_ONCE = 1024  # of a table in Arrow's format
RENAME = "Name the column of the prompts caption or text."  # where no option names another
Table = tuple[Sequence[str], Callable[[str], Iterable[object]]]
"""The names of the columns, and a function from a column's name to its cells."""


def read_prompt_file(
    path: Path, column: str | None = None, column_remedy: str = RENAME
) -> list[str]:
    """The distinct prompts of a file or a table; see ``read_numbered_prompts``.

    Example:
        >>> read_prompt_file(Path("captions.csv"), "title")
        ['a red apple', 'a boat']

    """
    return list(read_numbered_prompts(path, column, column_remedy))


def read_numbered_prompts(
    path: Path, column: str | None = None, column_remedy: str = RENAME
) -> dict[str, str]:
    """The distinct prompts of a file or a table, in its order, and where each of them is.

    Blank ones are skipped, and of equal ones the first is taken. White space within a prompt
    becomes single spaces. Every other line is a prompt: there are no comments.

    Args:
        path: A UTF-8 text file with one prompt a line, a .csv, .tsv or .parquet file with a header,
            or a folder of ``datasets``.
        column: Column of a table; by default 'caption' or 'text'.
        column_remedy: What a user of the caller can do where a table has no such column.

    Returns:
        The place of each prompt, for an error message: 'line 2', or 'row 2' of a table, whose first
        row is the one below the header.

    Raises:
        HipaError: The file is missing, damaged or not UTF-8, has no such column, or holds no
            prompt.
        MissingDependencyError: This format needs pyarrow, which is not installed.

    Example:
        >>> read_numbered_prompts(Path("captions.csv"), "title")
        {'a red apple': 'row 1', 'a boat': 'row 2'}

    """
    table = _open_table(path)
    cells: Iterable[object]
    if table is not None:
        names, cells_of = table
        cells = cells_of(_choose_column(path, names, column, column_remedy))
    elif column is None:
        # Not splitlines: it also splits at characters that no editor counts as the end of a line.
        cells = _read_text(path).split("\n")
    else:
        raise HipaError(
            f"prompts {path} has no columns: prompts_column = {column!r} is for a table. "
            "Remove prompts_column, or choose a .csv, .tsv or .parquet file."
        )

    unit = "row" if table else "line"
    places: dict[str, str] = {}
    for number, cell in enumerate(cells, start=1):
        if number > MAX_PROMPTS:
            raise HipaError(f"prompts {path} has more than {MAX_PROMPTS} {unit}s. Split the file.")
        prompt = _clean(path, cell)
        if len(prompt) > MAX_CHARACTERS:
            raise HipaError(
                f"prompts {path}, {unit} {number} has {len(prompt)} characters. "
                f"Expected at most {MAX_CHARACTERS}."
            )
        if prompt:
            places.setdefault(prompt, f"{unit} {number}")
    if not places:
        raise HipaError(f"prompts {path} is empty. Expected one prompt a {unit}.")
    return places


def check_prompt_file(path: Path) -> None:
    """Check that there is a file or folder of prompts, without reading it.

    Raises:
        HipaError: it is missing, or is neither a regular file nor a folder.

    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # a character that no file name has is a ValueError
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise HipaError(
            f"prompts {path} cannot be read: {reason}. Expected text with one prompt a line, .csv, "
            ".tsv, .parquet or a folder of datasets."
        ) from None
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise HipaError(f"prompts {path} is a pipe or a device. Expected a file of prompts.")


def read_cells(path: Path, column: str | None) -> list[str]:
    """Every cell of one column of a table, in order; empty cells are ''.

    Args:
        path: A .csv, .tsv or .parquet file with a header, or a folder of ``datasets``.
        column: The column; None is 'caption' or 'text'.

    Raises:
        HipaError: The file is missing or damaged, is no table, or has no such column.
        MissingDependencyError: This format needs pyarrow, which is not installed.

    """
    table = _open_table(path)
    if table is None:
        raise HipaError(
            f"captions {path} are no table. Expected .csv, .tsv, .parquet or a folder of datasets."
        )
    names, cells_of = table
    remedy = RENAME if column is None else f"Name that column {column}."
    chosen = _choose_column(path, names, column, remedy)
    return [_clean(path, cell) for cell in cells_of(chosen)]


def _clean(path: Path, cell: object) -> str:
    """One line of text; empty for an empty cell."""
    if cell is None:
        return ""
    if not isinstance(cell, str):
        raise HipaError(
            f"prompts {path}: a caption is of type {type(cell).__name__}. "
            "Expected a column of text."
        )
    return one_line(cell)


def one_line(prompt: str) -> str:
    """A prompt as this reader gives it: no white space around it, and single spaces within.

    Example:
        >>> one_line(" a  red\tapple ")
        'a red apple'

    """
    return " ".join(prompt.split())


def _choose_column(path: Path, names: Sequence[str], column: str | None, remedy: str) -> str:
    """The wanted column, or the first of the default ones that exists."""
    wanted = COLUMNS if column is None else (column,)
    for name in wanted:
        if name in names:
            check_single(path, names, name)
            return name
    expected = " or ".join(map(repr, wanted))
    if path.suffix.lower() in (".csv", ".tsv") and column is None:
        remedy = f"{remedy} If its first line is a prompt, name the file .txt."
    raise HipaError(
        f"prompts {path} has no column {expected}. It has: {', '.join(names) or 'none'}. {remedy}"
    )


def check_single(path: Path, names: Sequence[str], column: str) -> None:
    """Raise HipaError where two columns of a table have the name of the prompts' column."""
    count = names.count(column)
    if count > 1:
        raise HipaError(
            f"prompts {path} has {count} columns {column!r}. Expected one. Rename the others."
        )


def _open_table(path: Path) -> Table | None:
    """The table at ``path``; None for a text file."""
    suffix = path.suffix.lower()
    if path.is_dir():
        return _open_saved_dataset(path)
    if suffix in DELIMITERS:
        return _open_csv(path, DELIMITERS[suffix])
    if suffix == ".parquet":
        return _open_parquet(path)
    if suffix in UNREAD:
        raise HipaError(
            f"prompts {path}: {suffix} is not read. "
            "Expected text with one prompt a line, .csv, .tsv, .parquet or a folder of datasets."
        )
    return None


def _read_text(path: Path) -> str:
    """The text of a file, its line ends as newlines, without a byte order mark."""
    check_prompt_file(path)
    try:
        content = read_bytes(path, MAX_TEXT_MIB * MIB)
    except HipaError as error:
        raise HipaError(f"prompts: {error} Split the file, or use Parquet.") from None
    for mark, encoding in MARKS.items():
        if content.startswith(mark):
            raise HipaError(f"prompts {path} is {encoding}. Save it as UTF-8.")

    # utf-8-sig skips the byte order mark with which spreadsheets begin a file.
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise HipaError(
            f"prompts {path}, line {line} is not UTF-8 (byte {error.start}). Save it as UTF-8."
        ) from None
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise HipaError(
            f"prompts {path}, line {line} holds a zero byte: "
            "it is no text, or UTF-16 without a mark. Save it as UTF-8."
        )
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _open_csv(path: Path, delimiter: str) -> Table:
    # Fields are as long as a prompt may be, and the csv module has its own limit for them.
    # newline="" leaves line breaks to the csv module, as they may lie within quoted fields.
    text = io.StringIO(_read_text(path), newline="")
    try:
        lines = list(csv.reader(text, delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise HipaError(
            f"prompts {path} is damaged: {error}. Expected quoted fields, as spreadsheets write."
        ) from None
    if not lines:
        raise HipaError(f"prompts {path} is empty. Expected a header line and one prompt a row.")
    header = lines[0]
    rows = lines[1:]

    # A row may be shorter than the header: its missing cells are empty.
    def cells(name: str) -> list[str | None]:
        index = header.index(name)
        return [row[index] if index < len(row) else None for row in rows]

    return header, cells


def _open_parquet(path: Path) -> Table:
    parquet = _pyarrow("pyarrow.parquet")
    check_prompt_file(path)
    with _readable(path, "as Parquet"):
        file = parquet.ParquetFile(path)
        names = list(file.schema_arrow.names)

    # Only the wanted column is read: the others may hold images. Equal cells stay one text in
    # memory ('read_dictionary'), so that a small file cannot become a large table.
    def cells(name: str) -> Iterable[object]:
        _check_text(path, file.schema_arrow.field(name).type)
        with _readable(path, "as Parquet"):
            table = parquet.ParquetFile(path, read_dictionary=[name])
            for batch in table.iter_batches(ROWS_AT_ONCE, columns=[name]):
                yield from _texts(path, batch.column(name))

    return names, cells


@contextmanager
def _readable(path: Path, how: str) -> Iterator[None]:
    """Turn whatever pyarrow says of a damaged file into a line."""
    with as_line(f"prompts {path} cannot be read {how}", "Write the file again."):
        yield


def is_text(kind: Any) -> bool:
    """Whether a column's type in Arrow is text, as it is or in a dictionary.

    Example:
        >>> is_text(pyarrow.list_(pyarrow.string()))
        False

    """
    types = _pyarrow("pyarrow.types")
    if types.is_dictionary(kind):
        kind = kind.value_type
    # Version 14 of pyarrow, the oldest that we accept, has no views.
    is_view = hasattr(types, "is_string_view") and types.is_string_view(kind)
    return bool(is_view or types.is_string(kind) or types.is_large_string(kind))


def _check_text(path: Path, kind: Any) -> None:
    """Raise HipaError unless a column's type in Arrow is text, or the column is empty."""
    if not (is_text(kind) or _pyarrow("pyarrow.types").is_null(kind)):
        raise HipaError(f"prompts {path}: a caption is of type {kind}. Expected a column of text.")


def _texts(path: Path, column: Any) -> list[object]:
    """The cells of a part of a column of Arrow's, after a check that they are what they seem."""
    # Offsets that lead out of the buffers would read foreign memory.
    column.validate(full=True)
    distinct = getattr(column, "dictionary", column)
    if distinct.nbytes > MAX_TEXT_MIB * MIB:
        raise HipaError(
            f"prompts {path}: a part of the column has {distinct.nbytes} bytes. "
            f"Expected at most {MAX_TEXT_MIB} MiB. Split the file."
        )
    texts = distinct.to_pylist()
    if distinct is column:
        return texts  # type: ignore[no-any-return]
    return [None if index is None else texts[index] for index in column.indices.to_pylist()]


def _open_saved_dataset(folder: Path) -> Table:
    """The Arrow streams that state.json lists; of several splits 'train', or the only one.

    The format: https://huggingface.co/docs/datasets/about_arrow. The ``datasets`` package itself is
    not needed.
    """
    ipc = _pyarrow("pyarrow.ipc")

    # A DatasetDict has a folder for each split, and says which in dataset_dict.json.
    if (folder / "dataset_dict.json").exists():
        splits = [str(split) for split in _read_json(folder / "dataset_dict.json", "splits")]
        if "train" in splits:
            folder = folder / "train"
        elif len(splits) == 1:
            folder = inside_folder(folder, splits[0])
        else:
            found = ", ".join(splits) or "none"
            raise HipaError(f"prompts {folder} has the splits {found}. Name one: {folder}/SPLIT.")

    entries = _read_json(folder / "state.json", "_data_files")
    arrow = _pyarrow("pyarrow")
    files = []
    with _readable(folder, "as a dataset"):
        for entry in entries:
            files.append(inside(folder, str(entry["filename"])))
        names: list[str] = []
        if files:
            with arrow.memory_map(str(files[0])) as content:
                names = list(ipc.open_stream(content).schema.names)

    def cells(name: str) -> Iterable[object]:
        for file in files:
            with _readable(file, "as a dataset"), arrow.memory_map(str(file)) as content:
                for batch in ipc.open_stream(content):
                    column = batch.column(name)
                    _check_text(file, column.type)
                    for start in range(0, len(column), ROWS_AT_ONCE):
                        yield from _texts(file, column.slice(start, ROWS_AT_ONCE))

    return names, cells


def _read_json(path: Path, key: str) -> Any:
    """The value of ``key`` in a JSON file: a list, or a table."""
    try:
        value = read_json(path)[key]
    except (HipaError, KeyError, TypeError, IndexError):
        value = None
    if not isinstance(value, list | dict):
        raise HipaError(
            f"prompts {path.parent} has no readable {path.name}. "
            "Expected a folder of datasets' save_to_disk."
        )
    return value


def _pyarrow(module: str) -> Any:
    """A module of pyarrow, which is an optional dependency."""
    from importlib import import_module

    try:
        return import_module(module)
    except ImportError:
        raise MissingDependencyError("pyarrow", "captions") from None

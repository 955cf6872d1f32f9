"""What a bulk run makes: the rows of each shard, and the record that a resumed run must equal.

Every row of the table is one image. Its seed is the job's seed plus the row's number, so an image
does not depend on the shards, nor on who makes them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from hipa_deploy.bundle.folder import MANIFEST
from hipa_deploy.disk.files import write_file
from hipa_deploy.disk.hashing import file_sha256
from hipa_deploy.disk.reading import read_record
from hipa_deploy.disk.remembered import file_marks
from hipa_deploy.errors import HipaError, MissingDependencyError, as_line
from hipa_deploy.generate.noise import check_seeds
from hipa_deploy.generate.prompt_files import COLUMNS, check_single, is_text
from hipa_deploy.record import Record

JOB = "job.json"
MAX_ROWS = 1_000_000_000  # what nine digits of a name hold
MAX_SHARD = 100_000  # images
_AT_ONCE = 1024  # rows of the table in memory
_REMEDY = "Choose another --out, or move the folder away."


class BulkJob(Record):
    """A bulk run.

    Attributes:
        version: of this record.
        bundle: SHA-256 of the bundle's manifest.
        backend: that makes the images.
        prompts: SHA-256 of the table.
        rows: of the table.
        column: of the prompts.
        seed: of row 0.
        shard_size: rows of a shard; the last may have fewer.
        truncate: cut prompts that are too long, in place of listing them as failures.
        signer: SHA-256 of the certificates that sign the images; None for unsigned images, and in
            older records.
        checker: 'module:function' that sees every image; None for none, and in older records.

    """

    version: Literal[1] = 1
    bundle: str
    backend: str
    prompts: str
    rows: int = Field(ge=1, le=MAX_ROWS)
    column: str
    seed: int
    shard_size: int = Field(ge=1, le=MAX_SHARD)
    truncate: bool
    signer: str | None = None
    checker: str | None = None

    @property
    def shards(self) -> int:
        """How many there are."""
        return -(-self.rows // self.shard_size)  # rounded up

    def rows_of(self, shard: int) -> range:
        """The rows of a shard."""
        first = shard * self.shard_size
        return range(first, min(first + self.shard_size, self.rows))


def shard_path(out: Path, shard: int) -> Path:
    """The file of a shard. Where it exists, it is whole."""
    return out / f"shard-{shard:06d}.tar"


def failures_path(out: Path, shard: int) -> Path:
    """The list of a shard's rows without an image; there is none if every row has one."""
    return out / f"shard-{shard:06d}.failures.jsonl"


def missing_shards(job: BulkJob, out: Path) -> list[int]:
    """The shards that are not made yet."""
    return [shard for shard in range(job.shards) if not shard_path(out, shard).is_file()]


def new_job(
    bundle: Path,
    prompts: Path,
    *,
    backend: str,
    column: str | None = None,
    seed: int = 0,
    shard_size: int = 1000,
    truncate: bool = False,
    signer: str | None = None,
    checker: str | None = None,
) -> BulkJob:
    """Read what is to be made.

    Raises:
        HipaError: a table that cannot be read, is changed meanwhile, has no such column or no rows,
            or a number out of range.
        MissingDependencyError: pyarrow is not installed.

    """
    if not 1 <= shard_size <= MAX_SHARD:
        raise HipaError(f"--shard-size is {shard_size}. Expected 1 to {MAX_SHARD}.")
    if not prompts.is_file():
        # Before pyarrow is looked for: where both are missing, this is the first mistake.
        state = "is no file" if prompts.exists() else "does not exist"
        raise HipaError(f"prompts {prompts} {state}. Expected a .parquet file.")
    marks = file_marks(prompts)
    with _readable(prompts):
        file = _parquet().ParquetFile(prompts)
    names = list(file.schema_arrow.names)
    wanted = COLUMNS if column is None else (column,)
    found = next((name for name in wanted if name in names), None)
    if found is None:
        expected = " or ".join(map(repr, wanted))
        raise HipaError(
            f"prompts {prompts} has no column {expected}. It has: {', '.join(names) or 'none'}. "
            "Name it with --column."
        )
    check_single(prompts, names, found)
    kind = file.schema_arrow.field(found).type
    if not is_text(kind):
        raise HipaError(
            f"prompts {prompts}: column {found!r} is {kind}. Expected text, one in each row. "
            "Name another column with --column, or write the table anew."
        )
    rows = file.metadata.num_rows
    if not 1 <= rows <= MAX_ROWS:
        raise HipaError(f"prompts {prompts} has {rows} rows. Expected 1 to {MAX_ROWS}.")
    check_seeds(seed, rows)
    job = BulkJob(
        bundle=file_sha256(bundle / MANIFEST),
        backend=backend,
        prompts=file_sha256(prompts),
        rows=rows,
        column=found,
        seed=seed,
        shard_size=shard_size,
        truncate=truncate,
        signer=signer,
        checker=checker,
    )
    # The number of rows and the hash must be those of one content.
    if file_marks(prompts) != marks:
        raise HipaError(f"prompts {prompts} was changed while it was read. Run the command again.")
    return job


def begin(job: BulkJob, out: Path) -> None:
    """Record a job in its folder; a folder that has one must have this one.

    Raises:
        HipaError: the folder holds another job, or other files.

    """
    path = out / JOB
    if path.is_file():
        before = read_record(path, BulkJob, _REMEDY)
        if before.signer != job.signer:
            raise HipaError(
                f"{out} holds images of another job: they are {_signing(before)}, now they would "
                f"be {_signing(job)}. Use --c2pa and HIPA_C2PA as in the first run. Or: {_REMEDY}"
            )
        for name in BulkJob.model_fields:
            if getattr(before, name) != getattr(job, name):
                raise HipaError(
                    f"{out} holds images of another job: its {name} was {getattr(before, name)}, "
                    f"now it is {getattr(job, name)}. {_REMEDY}"
                )
        return
    if any(not entry.name.startswith(".") for entry in out.iterdir()):
        raise HipaError(f"{out} is not empty, and no bulk job. {_REMEDY}")
    content = json.dumps(job.model_dump(mode="json"), indent=2) + "\n"
    write_file(path, content.encode())


def read_rows(prompts: Path, column: str, rows: range) -> Iterator[tuple[int, str | None]]:
    """The numbers and the texts of some rows; None for an empty cell.

    Bytes that are no UTF-8 become lone surrogates, which the pipeline takes in no prompt.

    Only the row groups that hold them are read, ``_AT_ONCE`` rows at a time.

    Raises:
        HipaError: the table is damaged.

    """
    with _readable(prompts):
        file = _parquet().ParquetFile(prompts)
        groups = []
        begin_of_group = 0
        first: int | None = None
        for group in range(file.metadata.num_row_groups):
            end = begin_of_group + file.metadata.row_group(group).num_rows
            if begin_of_group < rows.stop and end > rows.start:
                groups.append(group)
                first = begin_of_group if first is None else first
            begin_of_group = end
        batches = file.iter_batches(_AT_ONCE, row_groups=groups, columns=[column])
    number = first or 0
    while True:
        # Nothing is yielded in this block: what a caller raises is not the table's fault.
        with _readable(prompts):
            batch = next(batches, None)
            cells = [] if batch is None else _texts(batch.column(column))
        if batch is None:
            return
        for cell in cells:
            if number in rows:
                yield number, cell
            number += 1


def _texts(column: Any) -> list[str | None]:
    """The cells of a part of a column."""
    try:
        texts: list[str | None] = column.to_pylist()
    except UnicodeDecodeError:
        texts = [_text(cell) for cell in column]
    return texts


def _text(cell: Any) -> str | None:
    """The text of a cell; one damaged cell must not end a run of a million rows."""
    try:
        text: str | None = cell.as_py()
    except UnicodeDecodeError as error:
        text = error.object.decode(errors="surrogateescape")
    return text


def _signing(job: BulkJob) -> str:
    """Who signs the images, for an error message."""
    return "unsigned" if job.signer is None else f"signed (certificates {job.signer})"


def _readable(path: Path) -> Any:
    return as_line(f"prompts {path} cannot be read as Parquet", "Expected a .parquet file.")


def _parquet() -> Any:
    try:
        from pyarrow import parquet
    except ImportError:
        raise MissingDependencyError("pyarrow", "captions") from None
    return parquet

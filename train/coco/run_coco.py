"""Measure rows on COCO: make images and features where they are missing, then write the report."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from hipa_deploy.disk.files import check_space
from hipa_deploy.disk.hashing import file_sha256
from hipa_deploy.disk.locks import locked
from hipa_deploy.errors import StoppedError
from hipa_deploy.interrupts import interrupting_signal
from hipa_deploy.models.model_config import ModelConfig
from hipa_deploy.train.coco.clip_score import clip_size
from hipa_deploy.train.coco.coco_folder import CocoData
from hipa_deploy.train.coco.coco_report import (
    CocoReport,
    RowFeatures,
    coco_markdown,
    coco_report,
)
from hipa_deploy.train.coco.coco_request import CocoRequest, CocoWishes
from hipa_deploy.train.coco.entries import (
    Entry,
    Models,
    adaptor_entry,
    contender_entry,
    teacher_entry,
)
from hipa_deploy.train.coco.make_parts import Measure, make_reference, make_row
from hipa_deploy.train.coco.parts import (
    REFERENCE,
    Parts,
    begin_job,
    row_folder,
)
from hipa_deploy.train.coco.protocol import FIRST_SEED, Protocol
from hipa_deploy.train.evaluation.contenders import Contender
from hipa_deploy.train.losses.clip_folder import clip_sha256
from hipa_deploy.train.recipes.recipe import TeacherSettings

BYTES_A_PIXEL = 1.0  # of a PNG; that of a photograph has about 1.7


@dataclass(frozen=True)
class Contest:
    """What is measured.

    Attributes:
        models: what the rows have in common.
        adaptor: the adaptor's folder; None leaves out its row.
        contenders: what else is measured.
        teacher: the multi-step model's settings; None leaves out its row.

    """

    models: Models
    adaptor: Path | None
    contenders: Sequence[Contender]
    teacher: TeacherSettings | None

    def entries(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Entry]:
        """The rows of the table, for these prompts."""
        found = []
        if self.adaptor is not None:
            found.append(adaptor_entry(self.models, self.adaptor))
        for contender in self.contenders:
            found.append(contender_entry(self.models, contender, prompts, seeds))
        if self.teacher is not None:
            found.append(teacher_entry(self.models, self.teacher))
        return found


def measure_on_coco(
    out: Path,
    data: CocoData,
    wishes: CocoWishes,
    request: CocoRequest,
    contest: Contest,
    console: Console,
) -> CocoReport | None:
    """Measure a contest on one set.

    Args:
        out: the folder of images, features and report. What it holds of the same measurement is
            not made again.
        data: captions and real images, as ``read_coco`` gave them.
        wishes: what was asked for.
        request: the same, checked.
        contest: what is measured.
        console: where the progress is shown.

    Returns:
        The report, which the caller writes; None for a shard, while others have work to do.

    Raises:
        HipaError: ``out`` holds another measurement, a model or an image cannot be loaded, or the
            disk has too little space.
        StoppedError: Ctrl-C; the same call goes on from there.

    """
    with console.status("reading models"):
        protocol = make_protocol(data, wishes, request)
        seeds = [FIRST_SEED + number for number in range(len(data.captions))]
        entries = contest.entries(data.captions, seeds)
    reference = Parts(out / REFERENCE, len(data.real))
    rows = {}
    for entry in entries:
        rows[entry.row] = Parts(row_folder(out, entry.row, entry.identity), len(data.captions))
    check_space(out, _bytes_to_write(contest, entries, rows))

    # Before anything is recorded: a network that cannot be loaded must not begin a measurement.
    measure = Measure(request.inception, wishes.clip, protocol.resolution, protocol.clip_prefix)
    if any(parts.missing() for parts in (reference, *rows.values())):
        measure.load()
    begin_job(out, protocol)
    shard = request.shard
    try:
        with ExitStack() as stack:
            lock = out / f".shard-{shard.number}-of-{shard.count}.lock"
            stack.enter_context(locked(lock, f"{out}, shard {shard.number}/{shard.count}"))
            make_reference(reference, data.real, measure, shard, console)
            for entry in entries:
                make_row(
                    entry,
                    rows[entry.row],
                    data.captions,
                    seeds,
                    measure,
                    batch=wishes.batch,
                    shard=shard,
                    console=console,
                )
    except KeyboardInterrupt:
        number = interrupting_signal() or signal.SIGINT
        raise StoppedError(
            f"stopped; what was made is in {out}, and the same command goes on from there", number
        ) from None

    if not request.report:
        _say_what_is_left([reference, *rows.values()], console)
        return None
    with console.status("computing distances"):
        return coco_report(
            protocol,
            reference.read("features"),
            _read_rows(entries, rows, has_clip=protocol.clip is not None),
            data.captions,
        )


def make_protocol(data: CocoData, wishes: CocoWishes, request: CocoRequest) -> Protocol:
    """The record of everything that the numbers depend on but the models."""
    clip = wishes.clip
    return Protocol(
        year=data.known.year,
        images=len(data.captions),
        captions=data.chosen,
        captions_sha256=data.captions_sha256,
        resolution=wishes.resolution,
        reference=request.reference,
        reference_sha256=data.real_sha256,
        reference_images=len(data.real),
        inception_sha256=file_sha256(request.inception),
        clip=None if clip is None else clip.resolve().name,
        clip_sha256=None if clip is None else clip_sha256(clip),
        clip_size=None if clip is None else clip_size(clip),
        clip_prefix=wishes.clip_prefix,
    )


def write_coco_report(out: Path, report: CocoReport, write: Callable[[Path, bytes], Path]) -> Path:
    """Write report.json, then report.md.

    Args:
        out: the folder.
        report: the numbers.
        write: writes a file, and returns where.

    """
    write(out / "report.json", (report.model_dump_json(indent=2) + "\n").encode())
    return write(out / "report.md", coco_markdown(report).encode())


def _read_rows(
    entries: Sequence[Entry], rows: dict[str, Parts], *, has_clip: bool
) -> dict[str, RowFeatures]:
    found = {}
    for entry in entries:
        parts = rows[entry.row]
        found[entry.row] = RowFeatures(
            features_ND=parts.read("features"),
            clip_N=parts.read("clip") if has_clip else None,
            notes=entry.notes,
            identity=dict(entry.identity) if entry.load_maker is not None else {},
        )
    return found


def _bytes_to_write(contest: Contest, entries: Sequence[Entry], rows: dict[str, Parts]) -> int:
    """About how much the images that are missing will take."""
    models = contest.models
    height, width = models.size or ModelConfig.read(models.folder).native_size
    images = 0
    for entry in entries:
        if entry.load_maker is not None:
            parts = rows[entry.row]
            images += sum(len(parts.images_of(part)) for part in parts.missing())
    return int(images * height * width * BYTES_A_PIXEL)


def _say_what_is_left(sets: Sequence[Parts], console: Console) -> None:
    left = sum(len(parts.missing()) for parts in sets)
    total = sum(len(parts.parts) for parts in sets)
    if left:
        text = f"this shard is done; {left} of {total} parts are left for the others."
    else:
        text = "all parts are done. The same command without --shard writes the report."
    console.print(text, markup=False, highlight=False)

"""The quality report of ``hipa-evaluate``: teacher, base model and adaptor from the same noise.

Base model and adaptor make their images in one step.

Shapes: N images of a row of the report, H, W image size in pixels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.table import Table

from hipa_deploy.bundle.text_settings import TextSettings
from hipa_deploy.errors import HipaError
from hipa_deploy.models.adaptor_folder import read_metadata
from hipa_deploy.models.style import Style, StyleInfo
from hipa_deploy.train.evaluation.contenders import Contender
from hipa_deploy.train.evaluation.evaluation_request import REPORT_FILES, draw
from hipa_deploy.train.evaluation.intervals import (
    Interval,
    draw_weights,
    interval,
    kid_of_draws,
    mean_of_draws,
)
from hipa_deploy.train.evaluation.quality import (
    Quality,
    high_frequency_energies,
    kernels,
    lite0_features,
    one_step_images,
    other_prompts,
    paired_distances,
    teacher_images,
)
from hipa_deploy.train.evaluation.rivals import Facts, rival_images
from hipa_deploy.train.recipes.recipe import TeacherSettings

FEW_PROMPTS = 64  # with fewer the intervals are too wide to rank adaptors (ours)
# A share whose interval is as wide as the whole gap cannot tell none of it from all of it (ours).
WIDEST_SHARE = 1.0
_TEACHER = re.compile(r"teacher, \d+ steps?", re.ASCII)  # as ``teacher_row`` names it
FEWER_STEPS = (1, 2, 4, 8)  # the teacher's rows beside its full number of steps
BASE = "base, one step"
ADAPTED = "HiPA, one step"


class Intervals(BaseModel):
    """Bootstrap intervals of a row's numbers, each from 2.5 to 97.5 % (see intervals.py).

    Attributes:
        kid_lite0: Of KID-Lite0.
        distance: Of the distance; None where there is none.
        high_frequency_ratio: Of the high-frequency ratio.
        kid_gap_closed: Of the share of the gap that the row closes; None where a share says
            nothing: the gap between base and teacher is itself not clear of 0, or the interval of
            the share is wider than ``WIDEST_SHARE``.

    """

    model_config = ConfigDict(frozen=True)

    kid_lite0: Interval
    distance: Interval | None
    high_frequency_ratio: Interval
    kid_gap_closed: Interval | None = None


class QualityReport(BaseModel):
    """The numbers of a report, stored as report.json.

    Every row has images of the same prompts and noise. The KID-Lite0 of the teacher's own row is
    the floor: no other row is expected below it.

    Version 5 of the schema has notes, and rows without a distance. Version 4 has intervals, and the
    prompts' count. Reports of version 3 are read.
    Since version 3 KID-Lite0 leaves out pairs of rows with the same prompt (``kid``), so
    that the floor is about 0. In earlier versions it was below 0.

    Attributes:
        schema_version: Version of these fields.
        adaptor_sha256: Hash of the measured adaptor's weights; None where there is none, and in
            reports of 0.1.0.
        images: Images of each row.
        prompts: How many different prompts they are of.
        teacher_steps: UNet steps of the teacher that the rows are compared with.
        teacher_guidance: That teacher's guidance.
        kid_lite0_floor: KID-Lite0 between the teacher's images and its images from other noise.
        teacher_from: Where the teacher's settings come from, in words.
        rows: The three numbers of each row, by its name.
        intervals: Their bootstrap intervals, by the row's name.
        notes: What a reader should know of a row, a sentence each, by the row's name.
        style: LoRAs and embeddings of every row's model.
        text: How prompts were encoded.

    """

    model_config = ConfigDict(frozen=True)

    schema_version: int = 5
    adaptor_sha256: str | None = None
    images: int
    prompts: int | None = None
    teacher_steps: int
    teacher_guidance: float
    kid_lite0_floor: float
    teacher_from: str | None = None
    rows: dict[str, Quality]
    intervals: dict[str, Intervals] = {}
    notes: dict[str, tuple[str, ...]] = {}
    style: StyleInfo = StyleInfo()
    text: TextSettings = TextSettings()

    def kid_gap_closed(self, row: str = ADAPTED) -> float:
        """Share of the gap between base and teacher in KID-Lite0 that a row closes.

        0 is the base model in one step, 1 is the teacher; worse than the base is negative.
        """
        base = self.rows[BASE].kid_lite0
        return (base - self.rows[row].kid_lite0) / (base - self.kid_lite0_floor)

    @property
    def doubts(self) -> list[str]:
        """What a reader should know before ranking rows by these numbers, a sentence each."""
        found = []
        if self.prompts is not None and self.prompts < FEW_PROMPTS:
            found.append(
                f"{self.prompts} different prompts are few: the intervals are wide. Expected at "
                f"least {FEW_PROMPTS}."
            )
        unknown = []
        for name, intervals in self.intervals.items():
            if not _is_reference(name) and intervals.kid_gap_closed is None:
                unknown.append(name)
        if unknown:
            found.append(
                f"No share of the gap in KID-Lite0 is given of {'; '.join(unknown)}: the gap "
                "between the base's one step and the teacher is smaller than its own noise, or "
                "than that of the share. Compare more images."
            )
        return found


def teacher_row(steps: int) -> str:
    """Name of the teacher's row: 'teacher, 1 step' or 'teacher, 25 steps'."""
    plural = "s" if steps > 1 else ""
    return f"teacher, {steps} step{plural}"


def make_images(
    model_dir: Path,
    adaptor: Path | None,
    prompts: list[str],
    teacher: TeacherSettings,
    images: int,
    console: Console,
    style: Style | None = None,
    rivals: Sequence[Contender] = (),
    text: TextSettings | None = None,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Make the images of every row of a report.

    Args:
        model_dir: Diffusers folder of the base model.
        adaptor: Folder of an adaptor; None leaves out its row.
        prompts: The prompts to evaluate on.
        teacher: The teacher to compare with.
        images: N, how many images each row has.
        console: Where the status line goes.
        style: LoRAs and embeddings of every row's model.
        text: How prompts are encoded, for every row; None is as the adaptor was trained. All
            images have the size that the adaptor was trained at.
        rivals: What else is compared, a row each.

    Returns:
        The images of each row by its name, uint8 [N, H, W, 3]; and the teacher's for the same
        prompts from other noise, uint8 [N, H, W, 3].

    Raises:
        HipaError: As ``draw``, or a model or adaptor that cannot be loaded.

    """
    texts, seeds = draw(prompts, images)
    rows = {}
    size = None
    if adaptor is not None:
        trained = read_metadata(adaptor)
        text = text or trained.text
        size = trained.resolution

    # What takes one step, or none, comes before the teacher's many: an image of another size, or a
    # prompt that a bundle does not know, is said before minutes or hours of its images.
    others = {}
    with console.status("one-step images"):
        for rival in rivals:
            others[rival.row] = rival_images(
                model_dir, rival, texts, seeds, style=style, text=text, size=size
            )
        base = one_step_images(model_dir, None, texts, seeds, style=style, text=text, size=size)
        own = {BASE: base}
        if adaptor is not None:
            own[ADAPTED] = one_step_images(model_dir, adaptor, texts, seeds, style=style, text=text)

    # The teacher at fewer steps shows what its steps are worth on this model.
    for steps in FEWER_STEPS:
        if steps >= teacher.steps:
            continue
        with console.status(f"{steps}-step teacher, {images} images"):
            fewer = teacher.model_copy(update={"steps": steps})
            rows[teacher_row(steps)] = teacher_images(
                model_dir, texts, seeds, fewer, style=style, text=text, size=size
            )

    # The reference, and the same prompts from other noise, to which KID-Lite0 is measured.
    with console.status(f"{teacher.steps}-step teacher, twice {images} images"):
        rows[teacher_row(teacher.steps)], again = teacher_twice(
            model_dir, texts, seeds, teacher, style, text, size
        )

    return {**rows, **own, **others}, again


def quality_report(
    teacher: TeacherSettings,
    prompts: list[str],
    truth_NHWC: np.ndarray,
    again_NHWC: np.ndarray,
    rows: dict[str, np.ndarray],
    facts: Mapping[str, Facts] | None = None,
) -> QualityReport:
    """Compare the rows' images with the teacher's for the same prompts and noise.

    Args:
        teacher: The teacher that made the reference images.
        prompts: The prompt of each image, N of them.
        truth_NHWC: The teacher's images from the rows' noise, uint8.
        again_NHWC: The teacher's images from other noise, uint8: KID-Lite0 is measured to these.
        rows: Images of each row by its name, uint8 [N, H, W, 3].
        facts: What is known of some rows beside their images, by the row's name.

    Raises:
        HipaError: The sets differ in shape, or have fewer than two different prompts.

    """
    reference = _Reference(truth_NHWC, again_NHWC, prompts)
    floor = reference.measure(truth_NHWC)

    # The teacher's own row is measured like any other: it shows what perfect numbers look like.
    facts = facts or {}
    measured = {}
    for name, images_NHWC in rows.items():
        paired = name not in facts or facts[name].same_noise
        measured[name] = reference.measure(images_NHWC, paired=paired)
    base = measured.get(BASE)
    return QualityReport(
        images=len(truth_NHWC),
        prompts=len(set(prompts)),
        teacher_steps=teacher.steps,
        teacher_guidance=teacher.guidance,
        kid_lite0_floor=floor.quality.kid_lite0,
        rows={name: row.quality for name, row in measured.items()},
        intervals={name: _intervals(row, base, floor) for name, row in measured.items()},
        notes={name: fact.notes for name, fact in facts.items() if fact.notes},
    )


@dataclass(frozen=True)
class _Measured:
    """A row's numbers, and the same of every bootstrap draw, float64 [R]."""

    quality: Quality
    kid_R: np.ndarray
    distance_R: np.ndarray | None
    ratio_R: np.ndarray


class _Reference:
    """The teacher's images, to which every row is compared, with what is computed of them once.

    Args:
        truth_NHWC: From the rows' noise, uint8.
        again_NHWC: From other noise, uint8.
        prompts: The prompt of each image.

    Raises:
        HipaError: Fewer than two different prompts, or not one for each image.

    """

    def __init__(self, truth_NHWC: np.ndarray, again_NHWC: np.ndarray, prompts: list[str]) -> None:
        self.truth_NHWC = truth_NHWC
        self.again_ND = lite0_features(again_NHWC)
        self.energy_N = high_frequency_energies(truth_NHWC)
        self.compared_NN = other_prompts(prompts, lite0_features(truth_NHWC), self.again_ND)
        self.weights_RN = draw_weights(prompts)

    def measure(self, images_NHWC: np.ndarray, *, paired: bool = True) -> _Measured:
        """Compare a row's images, uint8 [N, H, W, 3].

        Images that are not ``paired`` are of other noise than the teacher's: nothing says which
        part of their distance is the noise's, and so they have none. KID and the ratio compare sets
        and not pairs.
        """
        row_kernels = kernels(lite0_features(images_NHWC), self.again_ND)
        energy_N = high_frequency_energies(images_NHWC)

        # Every image once is one more draw: that of the numbers themselves.
        every_1N = torch.ones(1, len(images_NHWC), dtype=torch.float64)
        weights_RN = torch.cat([every_1N, self.weights_RN])
        kid_R = kid_of_draws(row_kernels, self.compared_NN, weights_RN)
        ratio_R = mean_of_draws(energy_N, weights_RN) / mean_of_draws(self.energy_N, weights_RN)
        if not paired:
            quality = Quality(float(kid_R[0]), None, float(ratio_R[0]))
            return _Measured(quality, kid_R[1:], None, ratio_R[1:])
        distance_N = paired_distances(images_NHWC, self.truth_NHWC)
        distance_R = mean_of_draws(distance_N, weights_RN)
        quality = Quality(float(kid_R[0]), float(distance_R[0]), float(ratio_R[0]))
        return _Measured(quality, kid_R[1:], distance_R[1:], ratio_R[1:])


def _intervals(row: _Measured, base: _Measured | None, floor: _Measured) -> Intervals:
    """The intervals of a row; the base's row is None where there is none."""
    closed = None
    if base is not None:
        gap_R = base.kid_R - floor.kid_R
        if interval(gap_R)[0] > 0:
            low, high = interval((base.kid_R - row.kid_R) / gap_R)
            if high - low <= WIDEST_SHARE:
                closed = low, high
    return Intervals(
        kid_lite0=interval(row.kid_R),
        distance=None if row.distance_R is None else interval(row.distance_R),
        high_frequency_ratio=interval(row.ratio_R),
        kid_gap_closed=closed,
    )


def _is_reference(name: str) -> bool:
    """Whether a row is the base's or the teacher's, of which there is no share to close."""
    # By its whole form: a rival's file or folder may be called 'teacher' too.
    return name == BASE or _TEACHER.fullmatch(name) is not None


def teacher_twice(
    model_dir: Path,
    texts: list[str],
    seeds: list[int],
    teacher: TeacherSettings,
    style: Style | None = None,
    text: TextSettings | None = None,
    size: tuple[int, int] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The teacher's images from ``seeds``, and of the same prompts from other seeds.

    Returns:
        Two sets uint8 [N, H, W, 3]; the other seeds are the N that follow, for consecutive seeds.

    """
    # One call for both sets, so that the model is loaded once.
    others = [seed + len(seeds) for seed in seeds]
    both = teacher_images(
        model_dir, [*texts, *texts], [*seeds, *others], teacher, style=style, text=text, size=size
    )
    return both[: len(seeds)], both[len(seeds) :]


def render_table(report: QualityReport) -> Table:
    """The rows as a table for the terminal, with the conditions in its title."""
    headings = ("KID-Lite0", "DISTS-like distance", "high-frequency ratio")
    table = Table("", *headings, title=conditions(report))
    for name, row in report.rows.items():
        table.add_row(name, *_cells(row, report.intervals.get(name)))
    return table


def conditions(report: QualityReport) -> str:
    """What the numbers were measured on, in one line."""
    added = [f"{lora.name}:{lora.scale:g}" for lora in report.style.loras]
    added += [embedding.name for embedding in report.style.embeddings]
    if report.text.clip_skip:
        added.append(f"clip skip {report.text.clip_skip}")
    style = f" with {', '.join(added)}" if added else ""
    source = f", from {report.teacher_from}" if report.teacher_from else ""
    prompts = "the same prompts" if report.prompts is None else f"{report.prompts} prompts"
    return (
        f"{report.images} images of {prompts}{style}; KID-Lite0 to the teacher "
        f"({report.teacher_steps} steps, guidance {report.teacher_guidance:g}{source}) from other "
        f"noise, its floor {report.kid_lite0_floor:.3f}; the other numbers to its images from "
        "the same noise"
    )


def markdown_table(report: QualityReport) -> str:
    """The rows as a table in Markdown."""
    lines = ["| | KID-Lite0 | DISTS-like distance | high-frequency ratio |", "|---|---|---|---|"]
    for name, row in report.rows.items():
        cells = _cells(row, report.intervals.get(name))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cells(row: Quality, intervals: Intervals | None) -> list[str]:
    """The three numbers of a row, each with its interval."""
    limits: tuple[Interval | None, ...] = (None, None, None)
    if intervals is not None:
        limits = (intervals.kid_lite0, intervals.distance, intervals.high_frequency_ratio)
    numbers = (row.kid_lite0, row.distance, row.high_frequency_ratio)
    cells = []
    for number, ends in zip(numbers, limits, strict=True):
        if number is None:
            cells.append("none")
        elif ends is None:
            cells.append(f"{number:.3f}")
        else:
            cells.append(f"{number:.3f} ({ends[0]:.3f} to {ends[1]:.3f})")
    return cells


def row_notes(report: QualityReport) -> list[str]:
    """A line for each row of which a reader should know something."""
    return [f"{name}: {' '.join(notes)}" for name, notes in report.notes.items()]


def gap_line(report: QualityReport) -> str | None:
    """The share of the gap that each row closes, with its interval; None where there is none."""
    closed = []
    for name in report.rows:
        if _is_reference(name):
            continue
        if not report.intervals:
            closed.append(f"{name} {report.kid_gap_closed(name):.0%}")
            continue
        limits = report.intervals[name].kid_gap_closed
        if limits is not None:
            share = f"{name} {report.kid_gap_closed(name):.0%}"
            closed.append(f"{share} ({limits[0]:.0%} to {limits[1]:.0%})")
    return f"KID gap closed: {'; '.join(closed)}." if closed else None


def write_report(
    folder: Path, report: QualityReport, rows: dict[str, np.ndarray], *, force: bool = False
) -> Path:
    """Write ``REPORT_FILES`` into ``folder``.

    Args:
        folder: Folder to write, made if it is missing.
        report: The numbers.
        rows: Images of each row by its name, uint8 [N, H, W, 3].
        force: Whether files that exist are replaced.

    Returns:
        The path of report.md.

    Raises:
        HipaError: One of the files exists and ``force`` is False.

    """
    from hipa_deploy.disk.files import write_file
    from hipa_deploy.train.evaluation.figures import (
        premise_picture,
        samples_picture,
        save_picture,
        spectra_figure,
    )

    for name in REPORT_FILES:
        if (folder / name).exists() and not force:
            raise HipaError(
                f"{folder / name} exists. Give force=True to replace it, or another folder."
            )

    # The spectra compare three rows only: more curves could not be told apart.
    truth = teacher_row(report.teacher_steps)
    shown = {name: rows[name] for name in (truth, BASE, ADAPTED) if name in rows}
    folder.mkdir(parents=True, exist_ok=True)
    spectra_figure(folder / "spectra.png", shown, truth)
    save_picture(folder / "premise.png", premise_picture(rows[BASE], rows[truth]))
    save_picture(folder / "samples.png", samples_picture(rows))

    # The text comes last, so that a report that can be read has all of its pictures.
    text = f"# Quality\n\n{conditions(report)}.\n\n{markdown_table(report)}\n\n{INTERVALS}\n"
    for line in (gap_line(report), *report.doubts, *row_notes(report)):
        if line:
            text += f"\n{line}\n"
    text += f"\n{PICTURES}Columns of the samples: {'; '.join(rows)}.\n"
    write_file(folder / "report.json", (report.model_dump_json(indent=2) + "\n").encode())
    write_file(folder / "report.md", text.encode())
    return folder / "report.md"


INTERVALS = (
    "In brackets: 95 % of 1,000 bootstrap draws of the prompts. They say how far the numbers "
    "depend on the prompts that were drawn, and nothing of another training."
)
PICTURES = """![Radial power spectra](spectra.png)

![The premise](premise.png)

Left to right: one step of the base model; the teacher; low frequencies of one step with the \
high ones of the teacher;
the converse.

![Samples](samples.png)

"""

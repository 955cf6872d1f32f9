"""The quality report of ``hipa-evaluate``: teacher, base model and adaptor from the same noise.

Base model and adaptor make their images in one step.

Shapes: N images of a row of the report, H, W image size in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.table import Table

from hipa_deploy.bundle.text_settings import TextSettings
from hipa_deploy.errors import HipaError
from hipa_deploy.models.adaptor_folder import read_metadata
from hipa_deploy.models.style import Style, StyleInfo
from hipa_deploy.train.evaluation.evaluation_request import REPORT_FILES, Rival, draw
from hipa_deploy.train.evaluation.quality import (
    Quality,
    compare,
    kid_lite0,
    one_step_images,
    teacher_images,
)
from hipa_deploy.train.evaluation.rivals import rival_images
from hipa_deploy.train.recipes.recipe import TeacherSettings

FEWER_STEPS = (1, 2, 4, 8)  # the teacher's rows beside its full number of steps
BASE = "base, one step"
ADAPTED = "HiPA, one step"


class QualityReport(BaseModel):
    """The numbers of a report, stored as report.json.

    Every row has images of the same prompts and noise. The KID-Lite0 of the teacher's own row is
    the floor: no other row is expected below it.

    Version 3 of the schema: KID-Lite0 leaves out pairs of rows with the same prompt (``kid``), so
    that the floor is about 0. In earlier versions it was below 0.

    Attributes:
        schema_version: Version of these fields.
        images: Images of each row.
        teacher_steps: UNet steps of the teacher that the rows are compared with.
        teacher_guidance: That teacher's guidance.
        kid_lite0_floor: KID-Lite0 between the teacher's images and its images from other noise.
        rows: The three numbers of each row, by its name.
        style: LoRAs and embeddings of every row's model.
        text: How prompts were encoded.

    """

    model_config = ConfigDict(frozen=True)

    schema_version: int = 3
    images: int
    teacher_steps: int
    teacher_guidance: float
    kid_lite0_floor: float
    rows: dict[str, Quality]
    style: StyleInfo = StyleInfo()
    text: TextSettings = TextSettings()

    def kid_gap_closed(self, row: str = ADAPTED) -> float:
        """Share of the gap between base and teacher in KID-Lite0 that a row closes.

        0 is the base model in one step, 1 is the teacher; worse than the base is negative.
        """
        base = self.rows[BASE].kid_lite0
        return (base - self.rows[row].kid_lite0) / (base - self.kid_lite0_floor)


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
    rivals: Sequence[Rival] = (),
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
        text: How prompts are encoded, for every row; None is as the adaptor was trained.
        rivals: One-step LoRAs and models of others, a row each.

    Returns:
        The images of each row by its name, uint8 [N, H, W, 3]; and the teacher's for the same
        prompts from other noise, uint8 [N, H, W, 3].

    Raises:
        HipaError: As ``draw``, or a model or adaptor that cannot be loaded.

    """
    texts, seeds = draw(prompts, images)
    rows = {}
    if text is None and adaptor is not None:
        text = read_metadata(adaptor).text

    # The teacher at fewer steps shows what its steps are worth on this model.
    for steps in FEWER_STEPS:
        if steps >= teacher.steps:
            continue
        with console.status(f"{steps}-step teacher, {images} images"):
            fewer = teacher.model_copy(update={"steps": steps})
            rows[teacher_row(steps)] = teacher_images(
                model_dir, texts, seeds, fewer, style=style, text=text
            )

    # The reference, and the same prompts from other noise, to which KID-Lite0 is measured.
    with console.status(f"{teacher.steps}-step teacher, twice {images} images"):
        rows[teacher_row(teacher.steps)], again = teacher_twice(
            model_dir, texts, seeds, teacher, style, text
        )

    with console.status("one-step images"):
        rows[BASE] = one_step_images(model_dir, None, texts, seeds, style=style, text=text)
        if adaptor is not None:
            rows[ADAPTED] = one_step_images(
                model_dir, adaptor, texts, seeds, style=style, text=text
            )
        for rival in rivals:
            rows[rival.row] = rival_images(model_dir, rival, texts, seeds, style=style, text=text)
    return rows, again


def quality_report(
    teacher: TeacherSettings,
    prompts: list[str],
    truth_NHWC: np.ndarray,
    again_NHWC: np.ndarray,
    rows: dict[str, np.ndarray],
) -> QualityReport:
    """Compare the rows' images with the teacher's for the same prompts and noise.

    Args:
        teacher: The teacher that made the reference images.
        prompts: The prompt of each image, N of them.
        truth_NHWC: The teacher's images from the rows' noise, uint8.
        again_NHWC: The teacher's images from other noise, uint8: KID-Lite0 is measured to these.
        rows: Images of each row by its name, uint8 [N, H, W, 3].

    Raises:
        HipaError: The sets differ in shape, or have fewer than two different prompts.

    """
    # The teacher's own row is measured like any other: it shows what perfect numbers look like.
    qualities = {}
    for name, images_NHWC in rows.items():
        qualities[name] = compare(images_NHWC, truth_NHWC, again_NHWC, prompts)
    return QualityReport(
        images=len(truth_NHWC),
        teacher_steps=teacher.steps,
        teacher_guidance=teacher.guidance,
        kid_lite0_floor=kid_lite0(truth_NHWC, again_NHWC, prompts),
        rows=qualities,
    )


def teacher_twice(
    model_dir: Path,
    texts: list[str],
    seeds: list[int],
    teacher: TeacherSettings,
    style: Style | None = None,
    text: TextSettings | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The teacher's images from ``seeds``, and of the same prompts from other seeds.

    Returns:
        Two sets uint8 [N, H, W, 3]; the other seeds are the N that follow, for consecutive seeds.

    """
    # One call for both sets, so that the model is loaded once.
    others = [seed + len(seeds) for seed in seeds]
    both = teacher_images(
        model_dir, [*texts, *texts], [*seeds, *others], teacher, style=style, text=text
    )
    return both[: len(seeds)], both[len(seeds) :]


def render_table(report: QualityReport) -> Table:
    """The rows as a table for the terminal, with the conditions in its title."""
    headings = ("KID-Lite0", "DISTS-like distance", "high-frequency ratio")
    table = Table("", *headings, title=conditions(report))
    for name, row in report.rows.items():
        table.add_row(name, *_cells(row))
    return table


def conditions(report: QualityReport) -> str:
    """What the numbers were measured on, in one line."""
    added = [f"{lora.name}:{lora.scale:g}" for lora in report.style.loras]
    added += [embedding.name for embedding in report.style.embeddings]
    if report.text.clip_skip:
        added.append(f"clip skip {report.text.clip_skip}")
    style = f" with {', '.join(added)}" if added else ""
    return (
        f"{report.images} images{style}; KID-Lite0 to the teacher ({report.teacher_steps} steps, "
        f"guidance {report.teacher_guidance:g}) from other noise, its floor "
        f"{report.kid_lite0_floor:.3f}; the other numbers to its images from the same noise"
    )


def markdown_table(report: QualityReport) -> str:
    """The rows as a table in Markdown."""
    lines = ["| | KID-Lite0 | DISTS-like distance | high-frequency ratio |", "|---|---|---|---|"]
    for name, row in report.rows.items():
        lines.append(f"| {name} | {' | '.join(_cells(row))} |")
    return "\n".join(lines)


def _cells(row: Quality) -> list[str]:
    numbers = (row.kid_lite0, row.distance, row.high_frequency_ratio)
    return [f"{number:.3f}" for number in numbers]


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
    text = f"# Quality\n\n{conditions(report)}.\n\n{markdown_table(report)}"
    closed = []
    for name in report.rows:
        if name != BASE and not name.startswith("teacher"):
            closed.append(f"{name} {report.kid_gap_closed(name):.0%}")
    text += f"\n\nKID gap closed: {'; '.join(closed)}.\n" if closed else "\n"
    text += f"\n{PICTURES}Columns of the samples: {'; '.join(rows)}.\n"
    write_file(folder / "report.json", (report.model_dump_json(indent=2) + "\n").encode())
    write_file(folder / "report.md", text.encode())
    return folder / "report.md"


PICTURES = """![Radial power spectra](spectra.png)

![The premise](premise.png)

Left to right: one step of the base model; the teacher; low frequencies of one step with the \
high ones of the teacher;
the converse.

![Samples](samples.png)

"""

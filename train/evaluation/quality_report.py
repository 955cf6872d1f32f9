"""The quality report of ``hipa-evaluate``: teacher, base in one step and adaptor in one step, from the same noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.table import Table

from hipa_deploy.errors import HipaError
from hipa_deploy.generate.prompt_files import read_prompt_file
from hipa_deploy.train.evaluation.quality import (
    Quality,
    compare,
    kid_lite0,
    one_step_images,
    teacher_images,
)
from hipa_deploy.train.recipes.recipe import TeacherSettings

FIRST_SEED = 1_000_000  # training pairs have seeds above 2**32: no noise is seen twice
FEWER_STEPS, REFERENCE_STEPS = (1, 2, 4, 8), 25
BASE, ADAPTED = "base, one step", "HiPA, one step"


class QualityReport(BaseModel):
    """Each row's images for the same prompts and noise; the teacher's own row is the floor of KID-Lite0.

    Version 3: KID-Lite0 leaves out rows of the same prompt (``kid``), so that the floor is about 0 and not below it.
    """

    model_config = ConfigDict(frozen=True)

    schema_version: int = 3
    images: int
    teacher_steps: int
    teacher_guidance: float
    kid_lite0_floor: float
    rows: dict[str, Quality]

    def kid_gap_closed(self, row: str = ADAPTED) -> float:
        """How much of the way from the base's KID-Lite0 in one step to the teacher's a row goes: 1 is all of it."""
        base = self.rows[BASE].kid_lite0
        return (base - self.rows[row].kid_lite0) / (base - self.kid_lite0_floor)


def held_out_prompts(model_dir: Path, prompts: Path | None = None) -> list[str]:
    """The prompts to evaluate on: a file, one a line, or those that the model folder sets aside."""
    return read_prompt_file(prompts or model_dir / "prompts_pair.txt")


def draw(prompts: list[str], count: int) -> tuple[list[str], list[int]]:
    """``count`` (prompt, seed) jobs that go through the prompts in turn."""
    if len(set(prompts)) < 2:
        raise HipaError(
            f"different prompts to evaluate on: {len(set(prompts))}. Expected at least 2."
        )
    if not 4 <= count <= 100_000:
        raise HipaError(f"{count} images were asked for. Expected 4 to 100000.")
    return [prompts[i % len(prompts)] for i in range(count)], [FIRST_SEED + i for i in range(count)]


def reference_teacher(teacher: TeacherSettings) -> TeacherSettings:
    """What images are compared with, however coarsely the training's pairs were made: DDIM, 25 steps or more, FP32."""
    steps = max(REFERENCE_STEPS, teacher.steps)
    return teacher.model_copy(update={"sampler": "ddim", "steps": steps, "mixed_precision": "no"})


def teacher_row(steps: int) -> str:
    """Name of the teacher's row at so many steps."""
    return f"teacher, {steps} step{'s' * (steps > 1)}"


def make_images(
    model_dir: Path,
    adaptor: Path | None,
    prompts: list[str],
    teacher: TeacherSettings,
    images: int,
    console: Console,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The rows' images, uint8 [images, H, W, 3], and the teacher's for the same prompts from other noise."""
    texts, seeds = draw(prompts, images)
    rows = {}
    for steps in (n for n in FEWER_STEPS if n < teacher.steps):
        with console.status(f"{steps}-step teacher, {images} images"):
            fewer = teacher.model_copy(update={"steps": steps})
            rows[teacher_row(steps)] = teacher_images(model_dir, texts, seeds, fewer)
    with console.status(f"{teacher.steps}-step teacher, twice {images} images"):
        rows[teacher_row(teacher.steps)], again = teacher_twice(model_dir, texts, seeds, teacher)
    with console.status("one-step images"):
        rows[BASE] = one_step_images(model_dir, None, texts, seeds)
        if adaptor is not None:
            rows[ADAPTED] = one_step_images(model_dir, adaptor, texts, seeds)
    return rows, again


def quality_report(
    teacher: TeacherSettings,
    prompts: list[str],
    truth_BHWC: np.ndarray,
    again_BHWC: np.ndarray,
    rows: dict[str, np.ndarray],
) -> QualityReport:
    """Compare sets of uint8 images [N, H, W, 3] with the teacher's for the same N prompts and noise.

    ``again_BHWC`` are the teacher's from other noise: KID-Lite0 is measured against them, its floor the teacher's.
    """
    return QualityReport(
        images=len(truth_BHWC),
        teacher_steps=teacher.steps,
        teacher_guidance=teacher.guidance,
        kid_lite0_floor=kid_lite0(truth_BHWC, again_BHWC, prompts),
        rows={
            name: compare(images_BHWC, truth_BHWC, again_BHWC, prompts)
            for name, images_BHWC in rows.items()
        },
    )


def teacher_twice(
    model_dir: Path, texts: list[str], seeds: list[int], teacher: TeacherSettings
) -> tuple[np.ndarray, np.ndarray]:
    """The teacher's images from ``seeds``, and for the same prompts from other seeds."""
    others = [seed + len(seeds) for seed in seeds]
    both = teacher_images(model_dir, [*texts, *texts], [*seeds, *others], teacher)
    return both[: len(seeds)], both[len(seeds) :]


def render_table(report: QualityReport) -> Table:
    """A table with its conditions in the title."""
    table = Table(
        "", "KID-Lite0", "DISTS-like distance", "high-frequency ratio", title=conditions(report)
    )
    for name, row in report.rows.items():
        table.add_row(
            name, *(f"{v:.3f}" for v in (row.kid_lite0, row.distance, row.high_frequency_ratio))
        )
    return table


def conditions(report: QualityReport) -> str:
    """What the numbers were measured on, in one line."""
    return (
        f"{report.images} images; KID-Lite0 to the teacher ({report.teacher_steps} steps, guidance "
        f"{report.teacher_guidance:g}) from other noise, its floor {report.kid_lite0_floor:.3f}; "
        "the rest to its images from the same noise"
    )


def markdown_table(report: QualityReport) -> str:
    """The same table in Markdown."""
    lines = ["| | KID-Lite0 | DISTS-like distance | high-frequency ratio |", "|---|---|---|---|"]
    for name, row in report.rows.items():
        lines.append(
            f"| {name} | {row.kid_lite0:.3f} | {row.distance:.3f} | {row.high_frequency_ratio:.3f} |"
        )
    return "\n".join(lines)


def write_report(folder: Path, report: QualityReport, rows: dict[str, np.ndarray]) -> Path:
    """report.md, report.json and the pictures spectra.png, premise.png and samples.png, into ``folder``."""
    from hipa_deploy.files import write_file
    from hipa_deploy.train.evaluation.figures import (
        premise_picture,
        samples_picture,
        save_picture,
        spectra_figure,
    )

    truth = teacher_row(report.teacher_steps)
    shown = {name: rows[name] for name in (truth, BASE, ADAPTED) if name in rows}
    folder.mkdir(parents=True, exist_ok=True)
    spectra_figure(folder / "spectra.png", shown, truth)
    save_picture(folder / "premise.png", premise_picture(rows[BASE], rows[truth]))
    save_picture(folder / "samples.png", samples_picture(rows))
    closed = (
        f"\n\nKID gap closed: {report.kid_gap_closed():.0%}.\n" if ADAPTED in report.rows else "\n"
    )
    text = f"# Quality\n\n{conditions(report)}.\n\n{markdown_table(report)}{closed}\n{PICTURES}"
    text += f"Columns of the samples: {'; '.join(rows)}.\n"
    write_file(folder / "report.json", (report.model_dump_json(indent=2) + "\n").encode())
    write_file(folder / "report.md", text.encode())
    return folder / "report.md"


PICTURES = """![Radial power spectra](spectra.png)

![The premise](premise.png)

Left to right: one step of the base model; the teacher; low frequencies of one step with the high ones of the teacher;
the converse.

![Samples](samples.png)

"""

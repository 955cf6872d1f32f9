"""The quality report of ``hipa-evaluate``: teacher, base in one step and adaptor in one step, from the same noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.table import Table

from hipa_deploy.errors import HipaError
from hipa_deploy.train.evaluate import Quality, compare, kid_lite0, one_step_images, teacher_images
from hipa_deploy.train.prompts import read_prompt_file
from hipa_deploy.train.recipe import TeacherSettings

FIRST_SEED = 1_000_000  # training pairs have seeds above 2**32: no noise is seen twice


class QualityReport(BaseModel):
    """Each row against the teacher's images for the same prompts and noise; as a floor the teacher from other noise."""

    model_config = ConfigDict(frozen=True)

    schema_version: int = 1
    images: int
    teacher_steps: int
    teacher_guidance: float
    kid_lite0_floor: float
    rows: dict[str, Quality]


def held_out_prompts(model_dir: Path, prompts: Path | None = None) -> list[str]:
    """The prompts to evaluate on: a file, one a line, or those that the model folder sets aside."""
    return read_prompt_file(prompts or model_dir / "prompts_pair.txt")


def draw(prompts: list[str], count: int) -> tuple[list[str], list[int]]:
    """``count`` (prompt, seed) jobs that go through the prompts in turn."""
    if not 4 <= count <= 100_000:
        raise HipaError(f"{count} images were asked for. Expected 4 to 100000.")
    return [prompts[i % len(prompts)] for i in range(count)], [FIRST_SEED + i for i in range(count)]


def quality_report(
    teacher: TeacherSettings, truth_BHWC: np.ndarray, again_BHWC: np.ndarray, rows: dict[str, np.ndarray]
) -> QualityReport:
    """Compare sets of uint8 images [N, H, W, 3] with the teacher's.

    ``again_BHWC`` are the teacher's for the same prompts from other noise: their KID-Lite0 is the floor. Rows from the
    teacher's own noise can fall below it.
    """
    return QualityReport(
        images=len(truth_BHWC),
        teacher_steps=teacher.steps,
        teacher_guidance=teacher.guidance,
        kid_lite0_floor=kid_lite0(again_BHWC, truth_BHWC),
        rows={name: compare(images_BHWC, truth_BHWC) for name, images_BHWC in rows.items()},
    )


def teacher_twice(
    model_dir: Path, texts: list[str], seeds: list[int], teacher: TeacherSettings
) -> tuple[np.ndarray, np.ndarray]:
    """The teacher's images from ``seeds``, and for the same prompts from other seeds."""
    others = [seed + len(seeds) for seed in seeds]
    both = teacher_images(model_dir, [*texts, *texts], [*seeds, *others], teacher)
    return both[: len(seeds)], both[len(seeds) :]


def evaluate_adaptor(
    model_dir: Path, adaptor: Path, prompts: list[str], teacher: TeacherSettings, *, images: int, console: Console
) -> QualityReport:
    """Make the images of teacher, base and adaptor, and compare them."""
    texts, seeds = draw(prompts, images)
    with console.status(f"{teacher.steps}-step teacher, twice {images} images"):
        truth, again = teacher_twice(model_dir, texts, seeds, teacher)
    with console.status("one-step images"):
        rows = {
            "base, one step": one_step_images(model_dir, None, texts, seeds),
            "HiPA, one step": one_step_images(model_dir, adaptor, texts, seeds),
        }
    return quality_report(teacher, truth, again, rows)


def render_table(report: QualityReport) -> Table:
    """A table with its conditions in the title."""
    title = (
        f"{report.images} images against the teacher ({report.teacher_steps} steps, guidance "
        f"{report.teacher_guidance:g}); KID-Lite0 of the teacher from other noise {report.kid_lite0_floor:.3f}"
    )
    table = Table("", "KID-Lite0", "DISTS-like distance", "high-frequency ratio", title=title)
    for name, row in report.rows.items():
        table.add_row(name, *(f"{v:.3f}" for v in (row.kid_lite0, row.distance, row.high_frequency_ratio)))
    return table

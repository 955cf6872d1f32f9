"""A task on the embedded model, in one command: export its shipped adaptor, compile, run on held-out images."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from rich.console import Console

from hipa_deploy import embedded
from hipa_deploy.demo.training_demo import (
    SHEET,
    SHEET_ROWS,
    build,
    export,
    open_folder,
    profile,
    tell,
    write_sheet,
)
from hipa_deploy.extras import require
from hipa_deploy.generate.pipeline import OneStepPipeline
from hipa_deploy.images.compositing import hide_hole
from hipa_deploy.images.example_source import example_mask
from hipa_deploy.images.png import enlarge
from hipa_deploy.models.adaptor_folder import unet_sha256
from hipa_deploy.tasks import Task

SEED = 1_000_000  # training has seeds above 2**32: no noise is seen twice


def run_task_demo(task: Task, out: Path, *, console: Console) -> None:
    """Bundle, engines, contact sheet (source | base in one step | adapted in one step) and latency of ``task``.

    The sources are the teacher's images of prompts that the training never saw; an edit's are of the same thing in
    another style.

    Raises:
        HipaError: ``out`` holds something else, or the training and export extras are not installed.

    """
    require("train", "export")
    started = time.perf_counter()
    adaptor = embedded.ADAPTORS[f"{embedded.NAME}-{task}"]
    open_folder(out, {"model": unet_sha256(embedded.MODEL), "task": task})
    bundle = export(out, adaptor, console)
    built = build(bundle, console)
    columns = _compare(task, out, adaptor, console)
    latency = profile(out, console)
    tell(out, columns, built, [latency], "", time.perf_counter() - started, console)


def _compare(task: Task, out: Path, adaptor: Path, console: Console) -> list[str]:
    """The contact sheet; what its columns are."""
    from hipa_deploy.generate.prompt_files import read_prompt_file
    from hipa_deploy.train.data.examples import edit_starts
    from hipa_deploy.train.evaluation.quality import teacher_images
    from hipa_deploy.train.evaluation.quality_report import held_out_prompts
    from hipa_deploy.train.evaluation.task_images import one_step_task_images
    from hipa_deploy.train.recipes.recipe import load_recipe

    console.rule("4. run and compare")
    recipe, prompts = load_recipe(f"{embedded.NAME}-{task}"), held_out_prompts(embedded.MODEL)
    prompts = prompts[:: max(1, len(prompts) // SHEET_ROWS)][:SHEET_ROWS]
    seeds = [SEED + n for n in range(len(prompts))]
    training = read_prompt_file(embedded.MODEL / "prompts.txt")
    starts = edit_starts(prompts, training, recipe.source.same) if task == "edit" else prompts
    with console.status(f"teacher, {recipe.teacher.steps} steps, {len(starts)} images"):
        originals = teacher_images(embedded.MODEL, starts, seeds, recipe.teacher)
    given, masks, shown = _inputs(task, originals, recipe.source.factor)
    options = {
        "strength": recipe.source.strengths[0],
        "timestep": recipe.timestep,
        "factor": recipe.source.factor,
    }
    base = one_step_task_images(
        embedded.MODEL, None, task, given, prompts, seeds, masks_NHW=masks, **options
    )
    with OneStepPipeline.load(out / "bundle", backend="onnxruntime") as pipe:
        cases = zip(given, prompts, seeds, strict=True)
        ours = np.concatenate(
            [_run(pipe, task, image, prompt, seed) for image, prompt, seed in cases]
        )
    columns = {"source": shown, "base, 1 step": base, "adapted, 1 step (bundle)": ours}
    write_sheet(
        out / SHEET, columns if task == "edit" else {**columns, "original": originals}, prompts
    )
    return list(columns)


def _inputs(
    task: Task, originals_NHWC: np.ndarray, factor: int
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """What the task is given, the masks of inpainting, and the given images at the size of the result."""
    from hipa_deploy.train.data.examples import reduced

    height, width = originals_NHWC.shape[1:3]
    if task == "upscale":
        small = np.stack([reduced(image, factor) for image in originals_NHWC])
        return small, None, np.stack([enlarge(image, factor) for image in small])
    if task == "inpaint":
        mask_HW = example_mask(height, width)
        hidden = np.stack([hide_hole(image, mask_HW) for image in originals_NHWC])
        return originals_NHWC, np.stack([mask_HW] * len(originals_NHWC)), hidden
    return originals_NHWC, None, originals_NHWC


def _run(
    pipe: OneStepPipeline, task: Task, image_HWC: np.ndarray, prompt: str, seed: int
) -> np.ndarray:
    """uint8 [1, H, W, 3] through the bundle."""
    if task == "edit":
        return pipe.edit(image_HWC, prompt, seed=seed).images_BHWC
    if task == "inpaint":
        mask = example_mask(*image_HWC.shape[:2])
        return pipe.inpaint(image_HWC, mask, prompt, feather=0, seed=seed).images_BHWC
    return pipe.upscale(image_HWC, prompt).images_BHWC

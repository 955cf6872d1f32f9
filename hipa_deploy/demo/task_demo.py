"""A task on the embedded model: export its embedded adaptor, compile, run on held-out images.

Shape suffixes: N images, H W image size, C three colours.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from rich.console import Console

from hipa_deploy import embedded
from hipa_deploy.demo.contact_sheet import SHEET, SHEET_ROWS, spread, write_sheet
from hipa_deploy.demo.steps import (
    alone_in,
    build,
    choose_folder,
    export,
    open_folder,
    print_summary,
    profile,
)
from hipa_deploy.extras import require
from hipa_deploy.generate.pipeline import OneStepPipeline
from hipa_deploy.images.compositing import hide_hole
from hipa_deploy.images.example_source import example_mask
from hipa_deploy.images.png import enlarge
from hipa_deploy.models.adaptor_folder import unet_sha256
from hipa_deploy.tasks import Task

SEED = 1_000_000  # training has seeds above 2**32: no noise is seen twice


def run_task_demo(task: Task, out: Path | None, *, console: Console) -> None:
    """Make bundle, engines, contact sheet and latency report of ``task``.

    The sources are the teacher's images of prompts that the training never saw; an edit's show the
    same thing in another style. The sheet compares source, base in one step and adapted in one
    step.

    Args:
        task: 'edit', 'inpaint' or 'upscale'.
        out: the folder to write; new, empty, or one of the same demo that was stopped;
            None takes one that is not there yet.
        console: where progress and the summary are printed.

    Raises:
        HipaError: ``out`` holds something else, or the training and export extras are not
            installed.

    """
    require("train", "export")
    started = time.perf_counter()
    adaptor = embedded.ADAPTORS[f"{embedded.NAME}-{task}"]
    identity = {"model": unet_sha256(embedded.MODEL), "task": task}
    out = out or choose_folder(identity)
    open_folder(out, identity)

    with alone_in(out):
        bundle = export(out, adaptor, console)
        engines = build(bundle, console)
        columns = _compare(task, out, console)
        latency = profile(out, console)

    seconds = time.perf_counter() - started
    print_summary(out, columns, engines, [latency], None, seconds, console)


def _compare(task: Task, out: Path, console: Console) -> list[str]:
    """Write the contact sheet; give its headings."""
    from hipa_deploy.generate.prompt_files import read_prompt_file
    from hipa_deploy.train.data.edit_prompts import edit_starts
    from hipa_deploy.train.evaluation.evaluation_request import held_out_prompts
    from hipa_deploy.train.evaluation.quality import teacher_images
    from hipa_deploy.train.evaluation.task_images import one_step_task_images
    from hipa_deploy.train.recipes.recipe import load_recipe

    console.rule("4. run and compare")
    recipe = load_recipe(f"{embedded.NAME}-{task}")

    held_out = held_out_prompts(embedded.MODEL)
    prompts = [held_out[place] for place in spread(len(held_out), SHEET_ROWS)]
    seeds = [SEED + n for n in range(len(prompts))]

    # An edit starts from an image of the same thing in a style that was trained on.
    source_prompts = prompts
    if task == "edit":
        training_prompts = read_prompt_file(embedded.MODEL / "prompts.txt")
        source_prompts = edit_starts(prompts, training_prompts, recipe.source.same)
    with console.status(f"teacher, {recipe.teacher.steps} steps, {len(prompts)} images"):
        originals_NHWC = teacher_images(embedded.MODEL, source_prompts, seeds, recipe.teacher)

    # The base model's column is made in PyTorch, ours by the bundle as a user runs it.
    sources_NHWC, masks_NHW, shown_NHWC = _inputs(task, originals_NHWC, recipe.source.factor)
    base_NHWC = one_step_task_images(
        embedded.MODEL,
        None,
        task,
        sources_NHWC,
        prompts,
        seeds,
        masks_NHW=masks_NHW,
        strength=recipe.source.strengths[0],
        timestep=recipe.timestep,
        factor=recipe.source.factor,
    )
    made = []
    with OneStepPipeline.load(out / "bundle", backend="onnxruntime") as pipe:
        for image_HWC, prompt, seed in zip(sources_NHWC, prompts, seeds, strict=True):
            made.append(_run(pipe, task, image_HWC, prompt, seed))

    columns = {
        "source": shown_NHWC,
        "base, 1 step": base_NHWC,
        "adapted, 1 step (bundle)": np.concatenate(made),
    }
    # What was hidden or reduced can be compared with the original; an edit has no such truth.
    if task != "edit":
        columns["original"] = originals_NHWC
    write_sheet(out / SHEET, columns, prompts)
    return list(columns)


def _inputs(
    task: Task, originals_NHWC: np.ndarray, factor: int
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """What the task starts from.

    Args:
        task: 'edit', 'inpaint' or 'upscale'.
        originals_NHWC: uint8 [N, H, W, 3].
        factor: how many times larger super-resolution makes an image.

    Returns:
        Source images, uint8 [N, H, W, 3], for super-resolution [N, H / factor, W / factor, 3]; the
        masks of inpainting, float32 [N, H, W], None for other tasks; and the sources as the sheet
        shows them, uint8 [N, H, W, 3].

    """
    from hipa_deploy.train.data.examples import reduced

    height, width = originals_NHWC.shape[1:3]
    if task == "upscale":
        small_NHWC = np.stack([reduced(image_HWC, factor) for image_HWC in originals_NHWC])
        shown_NHWC = np.stack([enlarge(image_HWC, factor) for image_HWC in small_NHWC])
        return small_NHWC, None, shown_NHWC
    if task == "inpaint":
        mask_HW = example_mask(height, width)
        masks_NHW = np.stack([mask_HW] * len(originals_NHWC))
        hidden_NHWC = np.stack([hide_hole(image_HWC, mask_HW) for image_HWC in originals_NHWC])
        return originals_NHWC, masks_NHW, hidden_NHWC
    return originals_NHWC, None, originals_NHWC


def _run(
    pipe: OneStepPipeline, task: Task, image_HWC: np.ndarray, prompt: str, seed: int
) -> np.ndarray:
    """One image through the bundle, uint8 [1, H, W, 3]."""
    if task == "edit":
        return pipe.edit(image_HWC, prompt, seed=seed).images_BHWC
    if task == "inpaint":
        mask_HW = example_mask(*image_HWC.shape[:2])
        return pipe.inpaint(image_HWC, mask_HW, prompt, feather=0, seed=seed).images_BHWC
    return pipe.upscale(image_HWC, prompt).images_BHWC

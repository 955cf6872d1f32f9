"""The whole chain on the embedded model, in one command: ``run_demo`` is the list of its steps.

Shape suffixes: N images, H W image size, C three colours.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from hipa_deploy import embedded
from hipa_deploy.demo.contact_sheet import SHEET, write_sheet
from hipa_deploy.demo.steps import (
    alone_in,
    build,
    choose_folder,
    export,
    open_folder,
    print_summary,
    profile,
)
from hipa_deploy.disk.files import write_file
from hipa_deploy.extras import require
from hipa_deploy.generate.pipeline import OneStepPipeline
from hipa_deploy.models.adaptor_folder import unet_sha256

if TYPE_CHECKING:
    from hipa_deploy.train.recipes.recipe import Recipe

# Enough for KID-Lite0 to distinguish base and adaptor, few enough for the teacher's 25 steps.
IMAGES = 64

# What the demos change in the embedded recipe. FULL is short enough for two CPU cores: a teacher
# pair takes 0.1 to 0.3 s there, a decoded training step 0.6 s.
FULL: dict[str, Any] = {
    "teacher.pairs": 384,
    "teacher.batch": 32,
    "steps": 400,
    "loss.latent_warmup_steps": 250,
}
QUICK: dict[str, Any] = {
    "teacher.pairs": 64,
    "teacher.batch": 32,
    "steps": 12,
    "loss.latent_warmup_steps": 0,
}
COMMON: dict[str, Any] = {
    "prompts": "model:prompts.txt",
    "optimiser.warmup_steps": 5,
    "sample_every": 50,
    "checkpoint_every": 20,
    "batch": 12,
}


def run_demo(out: Path | None, *, quick: bool, console: Console) -> None:
    """Train, merge, export, compile, generate, measure.

    Adaptor, bundle and engines that are in the folder already are kept.

    Args:
        out: the folder to write; new, empty, or one of a demo that was stopped;
            None takes one that is not there yet.
        quick: start from the embedded adaptor and train for a few steps.
        console: where progress and the summary are printed.

    Raises:
        HipaError: ``out`` holds something else, or the training and export extras are not
            installed.

    """
    require("train", "export")
    started = time.perf_counter()
    recipe = _recipe(quick)
    identity = {"model": unet_sha256(embedded.MODEL), "recipe": recipe.model_dump(mode="json")}
    out = out or choose_folder(identity)
    open_folder(out, identity)

    with alone_in(out):
        adaptor = _train(out, recipe, quick, console)
        bundle = export(out, adaptor, console)
        engines = build(bundle, console)
        columns, quality = _compare(out, recipe, console)
        latency = profile(out, console)

    seconds = time.perf_counter() - started
    results = [quality, latency]
    print_summary(out, columns, engines, results, _trained_with(), seconds, console)


def _recipe(quick: bool) -> Recipe:
    from hipa_deploy.train.recipes.recipe import load_recipe

    length = QUICK if quick else FULL
    return load_recipe(embedded.NAME, COMMON | length)


def _train(out: Path, recipe: Recipe, quick: bool, console: Console) -> Path:
    """The adaptor's folder, trained now unless it is there."""
    from hipa_deploy.train.train_adaptor import train_adaptor

    adaptor = out / "adaptor"
    if not adaptor.exists():
        console.rule("1. train: teacher pairs, then a HiPA adaptor")
        start = embedded.ADAPTOR if quick else None
        train_adaptor(recipe, embedded.MODEL, adaptor, initial_adaptor=start, console=console)
    return adaptor


def _compare(out: Path, recipe: Recipe, console: Console) -> tuple[list[str], str]:
    """Write contact sheet and quality.json on prompts that no training saw.

    Returns:
        The sheet's headings, and the line to print about the quality.

    """
    from hipa_deploy.train.evaluation.evaluation_request import (
        held_out_prompts,
        reference_teacher,
    )
    from hipa_deploy.train.evaluation.quality import one_step_images
    from hipa_deploy.train.evaluation.quality_report import draw, quality_report, teacher_twice

    console.rule("4. generate and compare")
    prompts, seeds = draw(held_out_prompts(embedded.MODEL), IMAGES)
    teacher = reference_teacher(recipe.teacher)

    # The same prompts and seeds for every column: only the model differs. The teacher's second set,
    # from other noise, shows how much two good sets of images differ by chance.
    with console.status(f"teacher, {teacher.steps} steps, twice {IMAGES} images"):
        truth_NHWC, again_NHWC = teacher_twice(embedded.MODEL, prompts, seeds, teacher)
    base_NHWC = one_step_images(embedded.MODEL, None, prompts, seeds)
    made = []
    with OneStepPipeline.load(out / "bundle", backend="onnxruntime") as pipe:
        for prompt, seed in zip(prompts, seeds, strict=True):
            made.append(pipe(prompt, seed=seed).images_BHWC)
    ours_NHWC = np.concatenate(made)

    columns = {
        f"teacher, {teacher.steps} steps": truth_NHWC,
        "base, 1 step": base_NHWC,
        "HiPA, 1 step (bundle)": ours_NHWC,
    }
    write_sheet(out / SHEET, columns, prompts)
    report = quality_report(
        teacher, prompts, truth_NHWC, again_NHWC, {"base": base_NHWC, "hipa": ours_NHWC}
    )
    write_file(out / "quality.json", (report.model_dump_json(indent=2) + "\n").encode())
    line = (
        f"KID-Lite0 to the {teacher.steps}-step teacher on {IMAGES} held-out (style, concept) "
        f"pairs, lower is better: base one step {report.rows['base'].kid_lite0:.2f}, "
        f"HiPA one step {report.rows['hipa'].kid_lite0:.2f}, "
        f"the teacher from other noise {report.kid_lite0_floor:.2f}"
    )
    return list(columns), line


def _trained_with() -> str:
    import torch

    return "PyTorch, CUDA" if torch.cuda.is_available() else "PyTorch, CPU"

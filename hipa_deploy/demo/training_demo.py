"""The whole chain on the embedded model, in one command: ``run_demo`` is the list of its steps.

Shape suffixes: N images, H W image size, C three colours.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from rich.console import Console

from hipa_deploy import embedded
from hipa_deploy.demo.contact_sheet import SHEET, SHEET_ROWS, spread, write_sheet
from hipa_deploy.demo.steps import (
    alone_in,
    begun_folder,
    build,
    choose_folder,
    export,
    open_folder,
    print_summary,
    profile,
)
from hipa_deploy.demo.training_length import longest_within, training_recipes
from hipa_deploy.disk.files import write_file
from hipa_deploy.extras import require
from hipa_deploy.generate.pipeline import OneStepPipeline
from hipa_deploy.models.adaptor_folder import unet_sha256

if TYPE_CHECKING:
    from hipa_deploy.train.recipes.recipe import Recipe, TeacherSettings

# Enough for KID-Lite0 to distinguish base and adaptor, few enough for the teacher's 25 steps.
IMAGES = 64
TIMED = 3  # images of the teacher, after one that is not counted
BASE_TIMESTEP = 999
CHOICE = (
    "{count} prompts that no training saw, at equal distances in their list. Of every {part}: the "
    "one whose images of base and teacher differ most."
)
TRAINING_SECONDS = 390  # of the ten minutes that README.md promises: 3.5 are left for the rest


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
    recipes = training_recipes(quick=quick)
    model = unet_sha256(embedded.MODEL)
    identities = []
    for recipe in recipes:
        identities.append({"model": model, "recipe": recipe.model_dump(mode="json")})

    # A demo that was stopped goes on with its own length, whatever the pace is now.
    begun = begun_folder(out, identities)
    if begun is None:
        recipe = longest_within(recipes, TRAINING_SECONDS, console)
        identity = identities[recipes.index(recipe)]
        out = out or choose_folder(identity)
        open_folder(out, identity)
    else:
        out, number = begun
        recipe = recipes[number]

    with alone_in(out):
        adaptor = _train(out, recipe, quick, console)
        bundle = export(out, adaptor, console)
        engines = build(bundle, console)
        columns, quality = _compare(out, recipe, console)
        latency = profile(out, console)

    seconds = time.perf_counter() - started
    results = [quality, latency]
    print_summary(out, columns, engines, results, _trained_with(), seconds, console)


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
    """Write contact sheet, spectra.png and quality.json on prompts that no training saw.

    Returns:
        The sheet's headings, and the line to print about the quality.

    """
    from hipa_deploy.train.evaluation.evaluation_request import (
        held_out_prompts,
        reference_teacher,
    )
    from hipa_deploy.train.evaluation.figures import spectra_figure
    from hipa_deploy.train.evaluation.quality import one_step_images
    from hipa_deploy.train.evaluation.quality_report import draw, quality_report, teacher_twice

    console.rule("4. generate and compare")
    held_out = held_out_prompts(embedded.MODEL)
    candidates = [held_out[place] for place in spread(len(held_out), IMAGES)]
    prompts, seeds = draw(candidates, IMAGES)
    teacher = reference_teacher(recipe.teacher)

    # The same prompts and seeds for every column: only the model differs. The teacher's second set,
    # from other noise, shows how much two good sets of images differ by chance.
    with console.status(f"teacher, {teacher.steps} steps, twice {IMAGES} images"):
        truth_NHWC, again_NHWC = teacher_twice(embedded.MODEL, prompts, seeds, teacher)
    base_NHWC = one_step_images(embedded.MODEL, None, prompts, seeds)
    shipped_NHWC, shipped_ms = _through_bundle(embedded.BUNDLE, prompts, seeds)
    ours_NHWC, ours_ms = _through_bundle(out / "bundle", prompts, seeds)

    sets = {"teacher": truth_NHWC, "base": base_NHWC, "shipped": shipped_NHWC, "hipa": ours_NHWC}
    teacher_ms, base_ms = _pytorch_times(prompts[0], seeds[0], teacher)
    times = {"teacher": teacher_ms, "base": base_ms, "shipped": shipped_ms, "hipa": ours_ms}
    headings = _headings(times, teacher, recipe)
    named = {
        "teacher": truth_NHWC,
        "base": base_NHWC,
        "HiPA, included": shipped_NHWC,
        "HiPA, trained now": ours_NHWC,
    }
    spectra_figure(out / "spectra.png", named, truth="teacher", tall=True)
    columns = {headings[name]: images_NHWC for name, images_NHWC in sets.items()}
    rows = _most_changed(base_NHWC, truth_NHWC, SHEET_ROWS)
    note = CHOICE.format(count=IMAGES, part=IMAGES // SHEET_ROWS)
    with Image.open(out / "spectra.png") as spectra:
        write_sheet(out / SHEET, columns, prompts, rows=rows, note=note, beside=spectra)

    report = quality_report(
        teacher,
        prompts,
        truth_NHWC,
        again_NHWC,
        {name: sets[name] for name in ("base", "shipped", "hipa")},
    )
    write_file(out / "quality.json", (report.model_dump_json(indent=2) + "\n").encode())
    line = (
        f"KID-Lite0 to the {teacher.steps}-step teacher on {IMAGES} held-out (style, concept) "
        f"pairs, lower is better: base one step {report.rows['base'].kid_lite0:.2f}, "
        f"HiPA one step with the included adaptor {report.rows['shipped'].kid_lite0:.2f}, "
        f"with the one trained now {report.rows['hipa'].kid_lite0:.2f}, "
        f"the teacher from other noise {report.kid_lite0_floor:.2f}. "
        f"The sheet has of every {IMAGES // SHEET_ROWS} of these prompts the one whose base and "
        "teacher images differ most, and the median time of an image, one at a time"
    )
    return [heading.replace("\n", ", ") for heading in columns], line


def _headings(
    times: Mapping[str, float], teacher: TeacherSettings, recipe: Recipe
) -> dict[str, str]:
    """Three lines over each column: the steps, the time of an image, and what makes it.

    Args:
        times: median milliseconds of one image, by the column's name.
        teacher: the teacher's settings.
        recipe: the recipe of the adaptor that was trained now.

    """
    lines = {
        "teacher": (f"teacher, {teacher.steps} steps", "PyTorch", f"guidance {teacher.guidance:g}"),
        "base": ("base, 1 step", "PyTorch", "no adaptor"),
        "shipped": ("HiPA, 1 step", "bundle", "included adaptor"),
        "hipa": ("HiPA, 1 step", "bundle", f"trained now, {recipe.steps} steps"),
    }
    found = {}
    for name, (steps, runtime, maker) in lines.items():
        found[name] = f"{steps}\n{times[name]:.0f} ms, {runtime}\n{maker}"
    return found


def _through_bundle(
    bundle: Path, prompts: Sequence[str], seeds: Sequence[int]
) -> tuple[np.ndarray, float]:
    """One image of each prompt, uint8 [N, H, W, 3], and the median milliseconds of one."""
    made = []
    times = []
    with OneStepPipeline.load(bundle, backend="onnxruntime") as pipe:
        pipe.warmup()
        for prompt, seed in zip(prompts, seeds, strict=True):
            started = time.perf_counter()
            made.append(pipe(prompt, seed=seed).images_BHWC)
            times.append((time.perf_counter() - started) * 1000)
    return np.concatenate(made), statistics.median(times)


def _pytorch_times(prompt: str, seed: int, teacher: TeacherSettings) -> tuple[float, float]:
    """Median milliseconds of one image of the teacher, and of the base model in one step."""
    from hipa_deploy.train.data.teacher_pairs import teacher_latents
    from hipa_deploy.train.evaluation.quality import decoded_images, one_step_model
    from hipa_deploy.train.model.diffusion_model import DiffusionModel

    model = DiffusionModel.load(embedded.MODEL)
    unguided = model.unguided()
    many = partial(teacher_latents, model, unguided=unguided, teacher=teacher)
    found = []
    for latents in (many, one_step_model(model, BASE_TIMESTEP, None)):
        times = []
        for _ in range(TIMED + 1):
            started = time.perf_counter()
            decoded_images(model, latents, [prompt], [seed])
            times.append((time.perf_counter() - started) * 1000)
        found.append(statistics.median(times[1:]))
    return found[0], found[1]


def _most_changed(one_NHWC: np.ndarray, other_NHWC: np.ndarray, parts: int) -> list[int]:
    """Of each of so many equal parts, the row whose two images differ most in their pixels.

    Over all rows at once, flags and faces would win: they fill the image.
    """
    difference_NHWC = one_NHWC.astype(np.float32) - other_NHWC.astype(np.float32)
    distance_N = np.square(difference_NHWC).mean(axis=(1, 2, 3))
    rows = np.arange(len(distance_N))
    return [int(part[distance_N[part].argmax()]) for part in np.array_split(rows, parts)]


def _trained_with() -> str:
    import torch

    return "PyTorch, CUDA" if torch.cuda.is_available() else "PyTorch, CPU"

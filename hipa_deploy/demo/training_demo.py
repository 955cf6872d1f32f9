"""The whole chain on the embedded model, in one command: ``run_demo`` is the list of its steps."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from hipa_deploy import embedded
from hipa_deploy.errors import HipaError
from hipa_deploy.extras import require
from hipa_deploy.files import write_file
from hipa_deploy.generate.pipeline import OneStepPipeline
from hipa_deploy.images.png import grid, png_bytes
from hipa_deploy.models.adaptor_folder import unet_sha256

if TYPE_CHECKING:
    from hipa_deploy.bundle.folder import Bundle
    from hipa_deploy.train.recipes.recipe import Recipe

MARKER = "demo.json"
SHEET = "contact_sheet.png"
IMAGES = (
    64  # enough for KID-Lite0 to tell base and adaptor apart, few enough for the teacher's 25 steps
)
SHEET_ROWS = 12

# Short enough for two CPU cores: a teacher pair is 0.1 to 0.3 s there, a decoded training step 0.6 s.
FULL = {"teacher.pairs": 384, "teacher.batch": 32, "steps": 400, "loss.latent_warmup_steps": 250}
QUICK = {"teacher.pairs": 64, "teacher.batch": 32, "steps": 12, "loss.latent_warmup_steps": 0}
COMMON = {
    "prompts": "model:prompts.txt",
    "optimiser.warmup_steps": 5,
    "sample_every": 50,
    "checkpoint_every": 20,
    "batch": 12,
}


def run_demo(out: Path, *, quick: bool, console: Console) -> None:
    """Train, merge, export, compile, generate, profile. Adaptor, bundle and engines that are there are kept.

    Raises:
        HipaError: ``out`` holds something else, or the training and export extras are not installed.

    """
    require("train", "export")
    started = time.perf_counter()
    recipe = _recipe(quick)
    open_folder(
        out, {"model": unet_sha256(embedded.MODEL), "recipe": recipe.model_dump(mode="json")}
    )
    adaptor = _train(out, recipe, quick, console)
    bundle = export(out, adaptor, console)
    built = build(bundle, console)
    quality = _compare(out, recipe, console)
    latency = profile(out, console)
    columns = ("teacher 25 steps", "base 1 step", "HiPA 1 step through the bundle")
    tell(
        out,
        columns,
        built,
        [quality, latency],
        f"{_trained()}, ",
        time.perf_counter() - started,
        console,
    )


def open_folder(out: Path, identity: dict[str, Any]) -> None:
    """Begin a demo's folder, or go on with one of the same identity: a model and what is done with it."""
    content, marker = json.dumps(identity, sort_keys=True).encode(), out / MARKER
    if marker.exists():
        if marker.read_bytes() != content:
            raise HipaError(
                f"{out} holds a demo of another model or with other options. Remove it, or choose another --out."
            )
        return
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise HipaError(f"{out} is not empty and not a demo's folder. Choose another --out.")
    write_file(marker, content)


def _recipe(quick: bool) -> Recipe:
    from hipa_deploy.train.recipes.recipe import load_recipe

    return load_recipe(embedded.NAME, {**COMMON, **(QUICK if quick else FULL)})


def _train(out: Path, recipe: Recipe, quick: bool, console: Console) -> Path:
    from hipa_deploy.train.train_adaptor import train_adaptor

    adaptor = out / "adaptor"
    if not adaptor.exists():
        console.rule("1. train: teacher pairs, then a HiPA adaptor")
        start = embedded.ADAPTOR if quick else None
        train_adaptor(recipe, embedded.MODEL, adaptor, initial_adaptor=start, console=console)
    return adaptor


def export(out: Path, adaptor: Path, console: Console) -> Bundle:
    """The bundle of the embedded model with ``adaptor``, made now unless it is there."""
    from hipa_deploy.bundle.folder import Bundle
    from hipa_deploy.export.export_bundle import export_bundle
    from hipa_deploy.export.export_options import ExportOptions

    if not (out / "bundle").exists():
        console.rule("2. merge and export: ONNX, checked against PyTorch")
        export_bundle(
            ExportOptions(model=embedded.NAME, adaptor=adaptor, out=out / "bundle"), console
        )
    return Bundle.open(out / "bundle")


def build(bundle: Bundle, console: Console) -> list[Path]:
    """TensorRT-RTX engines of ``bundle``, where that is installed."""
    from hipa_deploy.engines.build.build_bundle import build_bundle

    if importlib.util.find_spec("tensorrt_rtx") is None:
        return []
    console.rule("3. compile: TensorRT-RTX engines")
    return [engine.path for engine in build_bundle(bundle, backend="rtx", console=console)]


def _compare(out: Path, recipe: Recipe, console: Console) -> str:
    """Contact sheet and KID-Lite0 on held-out pairs; the line to print."""
    from hipa_deploy.train.evaluation.quality import one_step_images
    from hipa_deploy.train.evaluation.quality_report import (
        draw,
        held_out_prompts,
        quality_report,
        reference_teacher,
        teacher_twice,
    )

    console.rule("4. generate and compare")
    texts, seeds = draw(held_out_prompts(embedded.MODEL), IMAGES)
    teacher = reference_teacher(recipe.teacher)
    with console.status(f"teacher, {teacher.steps} steps, twice {IMAGES} images"):
        truth, again = teacher_twice(embedded.MODEL, texts, seeds, teacher)
    base = one_step_images(embedded.MODEL, None, texts, seeds)
    with OneStepPipeline.load(out / "bundle", backend="onnxruntime") as pipe:
        ours = np.concatenate(
            [pipe(t, seed=s).images_BHWC for t, s in zip(texts, seeds, strict=True)]
        )
    write_sheet(
        out / SHEET,
        {"teacher, 25 steps": truth, "base, 1 step": base, "HiPA, 1 step (bundle)": ours},
        texts,
    )
    report = quality_report(teacher, texts, truth, again, {"base": base, "hipa": ours})
    write_file(out / "quality.json", (report.model_dump_json(indent=2) + "\n").encode())
    kids = {name: row.kid_lite0 for name, row in report.rows.items()}
    return (
        f"KID-Lite0 to the {teacher.steps}-step teacher on {IMAGES} held-out (style, concept) pairs: base one step "
        f"{kids['base']:.2f}, HiPA one step {kids['hipa']:.2f}, "
        f"the teacher from other noise {report.kid_lite0_floor:.2f}"
    )


def write_sheet(path: Path, columns: dict[str, np.ndarray], texts: list[str]) -> None:
    """Some rows of the columns, uint8 [N, H, W, 3] each, twice as large."""
    step = max(1, len(texts) // SHEET_ROWS)  # spread over the prompts: neighbours are alike
    rows = slice(0, step * SHEET_ROWS, step)
    sheet = grid([np.repeat(np.repeat(c[rows], 2, axis=1), 2, axis=2) for c in columns.values()])
    write_file(path, png_bytes(sheet, {"columns": list(columns), "rows": texts[rows]}))


def profile(out: Path, console: Console) -> str:
    """latency.json of the bundle on this CPU; the line to print."""
    from hipa_deploy.engines.latency.measure import profile_pipeline
    from hipa_deploy.engines.latency.table import render_table

    console.rule("5. profile: ONNX Runtime on this CPU")
    with OneStepPipeline.load(out / "bundle", backend="onnxruntime") as pipe:
        report = profile_pipeline(pipe, runs=30, console=console)
    write_file(out / "latency.json", (report.model_dump_json(indent=2) + "\n").encode())
    console.print(render_table(report))
    return f"latency.json: {report.end_to_end.runs} runs, ONNX Runtime, this CPU"


def _trained() -> str:
    import torch

    return f"training (PyTorch, {'CUDA' if torch.cuda.is_available() else 'CPU'})"


def tell(
    out: Path,
    columns: Sequence[str],
    built: list[Path],
    found: list[str],
    trained: str,
    seconds: float,
    console: Console,
) -> None:
    """What is where, what was measured, and what ran on this machine."""
    console.rule("done")
    engines = "no engine compiled: TensorRT-RTX is not installed (pip install 'hipa-deploy[rtx]')"
    if built:
        engines = f"{len(built)} TensorRT-RTX engines compiled; none was run: that needs an RTX GPU"
    lines = [
        f"contact sheet: {out / SHEET} ({' | '.join(columns)})",
        *found,
        f"engines: {engines}",
        f"run on this machine: {trained}export, ONNX Runtime (CPU); {seconds / 60:.1f} minutes",
    ]
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

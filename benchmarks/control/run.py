"""How well the one step follows a ControlNet, compared with many steps.

Purpose: a table and a contact sheet. The rows are held-out pictures through the VAE, the teacher
with and without the ControlNet, the exported one step at several scales, and the base model's one
step. The adaptor was trained without any ControlNet.

Commands, from the repository's root::

    PYTHONPATH=examples/emoji python -m benchmarks.control.run --data runs/emoji128 \\
        --controlnet runs/controlnet/controlnet --out report

Expected time: eight minutes on one thread of a CPU that has other work as well. One minute is the
exports', and most of the others the teacher's.

The control images are the edges of pictures that no training saw (examples/emoji/edges.py), the
prompts their captions. All rows see the same control images, prompts and noise. Each image is
measured in two ways: by the detector that also made the control image, and by the correlation of
Sobel gradients with the picture (``benchmarks.tasks.measures.structure_distance``), of which the
ControlNet's training knew nothing. The columns 'another picture' say what chance reaches: they
compare the same images with the picture of the case before.

Shapes: N cases, H, W image size in pixels.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from augment import Pictures
from captions import levels
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from edges import control_image, find_edges
from PIL import Image
from rich.console import Console

from benchmarks.control.measures import agreement
from benchmarks.tasks.measures import structure_distance
from hipa_deploy import OneStepPipeline
from hipa_deploy.demo.contact_sheet import write_sheet
from hipa_deploy.disk.files import write_file
from hipa_deploy.embedded import ADAPTOR
from hipa_deploy.errors import HipaError
from hipa_deploy.export.export_bundle import export_bundle
from hipa_deploy.export.export_options import ExportOptions
from hipa_deploy.models.locate import model_folder
from hipa_deploy.train.data.teacher_pairs import teacher_scheduler
from hipa_deploy.train.evaluation.quality import kid_lite0, teacher_images
from hipa_deploy.train.model.diffusion_model import DiffusionModel, to_float, to_uint8
from hipa_deploy.train.recipes.recipe import TeacherSettings

TEACHER = TeacherSettings(sampler="dpmsolver++", steps=25, guidance=3.0, pairs=1)
SCALES = (0.0, 0.5, 1.0, 1.5)
FIRST_SEED = 5_000_000  # training has seeds above 2**32
CHUNK = 16  # images that go through the pipeline at once
TOLERANCES = (1, 2)  # pixels
REAL = "the pictures through the VAE"
GUIDED = "teacher, 25 steps, ControlNet"
SHEET = {
    "control image": "control image",
    GUIDED: "teacher, 25 steps,\nwith ControlNet",
    "adaptor, one step, scale 0": "one step, scale 0",
    "adaptor, one step, scale 1": "one step, scale 1",
}
Numbers = dict[str, float]
"""Measures of one image set, by the title of the column."""


@dataclass(frozen=True)
class Cases:
    """N held-out pictures: uint8 [N, H, W, 3], their control images, and their captions."""

    pictures: np.ndarray
    controls: np.ndarray
    prompts: list[str]

    @property
    def edges(self) -> np.ndarray:
        """The control images as bool [N, H, W]."""
        return self.controls[..., 0] > 0


def held_out_cases(data: Path, count: int) -> Cases:
    """Pictures at equal distances in the list of held-out emoji, each drawn once at random."""
    held_out = Pictures(data, "pair", "concept")
    rng = np.random.default_rng(11)
    places = np.linspace(0, len(held_out) - 1, min(count, len(held_out))).round().astype(int)
    pictures, colours = held_out.draw_batch(places.tolist(), rng)
    prompts = []
    for place, colour in zip(places, colours, strict=True):
        row = held_out.rows[place]
        prompts.append(levels(row["style"], row["concept"], row["kind"], colour)[0])
    controls = np.stack([control_image(picture) for picture in pictures])
    return Cases(pictures, controls, prompts)


@torch.no_grad()
def through_vae(model: Path, pictures: np.ndarray) -> np.ndarray:
    """The pictures encoded and decoded: what the model could reach at best."""
    base = DiffusionModel.load(model)
    made = []
    for chunk in to_float(torch.from_numpy(pictures)).split(CHUNK):
        made.append(to_uint8(base.decode(base.encode(chunk))))
    return torch.cat(made).numpy()


def guided_teacher(model: Path, controlnet: Path, cases: Cases, seeds: list[int]) -> np.ndarray:
    """Images of StableDiffusionControlNetPipeline, from the noise that one step starts from."""
    base = DiffusionModel.load(model)
    parts = {**base.pipe.components, "scheduler": teacher_scheduler(base.schedule, TEACHER.sampler)}
    network = ControlNetModel.from_pretrained(controlnet).to(base.device)
    pipe = StableDiffusionControlNetPipeline(
        **parts, controlnet=network, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    made = []
    for start in range(0, len(seeds), CHUNK):
        chunk = slice(start, start + CHUNK)
        images_BHWC = pipe(
            cases.prompts[chunk],
            image=[Image.fromarray(control) for control in cases.controls[chunk]],
            num_inference_steps=TEACHER.steps,
            guidance_scale=TEACHER.guidance,
            latents=base.noise(seeds[chunk]),
            output_type="np",
        ).images
        made.append(np.rint(images_BHWC * 255).astype(np.uint8))
    return np.concatenate(made)


def one_step(bundle: Path, cases: Cases, seeds: list[int], scale: float) -> np.ndarray:
    """Images of an exported bundle."""
    pipe = OneStepPipeline.load(bundle)
    made = []
    for control, prompt, seed in zip(cases.controls, cases.prompts, seeds, strict=True):
        made.append(pipe.control(control, prompt, scale=scale, seed=seed).images_BHWC[0])
    return np.stack(made)


def export(model: str, adaptor: Path | None, controlnet: Path, out: Path) -> Path:
    """Export a bundle, unless an earlier run has."""
    if not out.exists():
        export_bundle(ExportOptions(model=model, adaptor=adaptor, controlnet=controlnet, out=out))
    return out


def makers(
    model: str, adaptor: Path, controlnet: Path, out: Path, cases: Cases
) -> dict[str, Callable[[list[int]], np.ndarray]]:
    """Each row: the function from noise seeds to its images, uint8 [N, H, W, 3]."""
    folder = model_folder(model)
    adapted = export(model, adaptor, controlnet, out / "bundle")
    base = export(model, None, controlnet, out / "bundle-base")

    def steps(bundle: Path, scale: float) -> Callable[[list[int]], np.ndarray]:
        return lambda seeds: one_step(bundle, cases, seeds, scale)

    rows: dict[str, Callable[[list[int]], np.ndarray]] = {
        REAL: lambda seeds: through_vae(folder, cases.pictures),
        GUIDED: lambda seeds: guided_teacher(folder, controlnet, cases, seeds),
        "teacher, 25 steps": lambda seeds: teacher_images(folder, cases.prompts, seeds, TEACHER),
    }
    for scale in SCALES:
        rows[f"adaptor, one step, scale {scale:g}"] = steps(adapted, scale)
    for scale in (0.0, 1.0):
        rows[f"no adaptor, one step, scale {scale:g}"] = steps(base, scale)
    return rows


def measure(images: np.ndarray, cases: Cases) -> Numbers:
    """The numbers of an image set."""
    edges_NHW = np.stack([find_edges(image) for image in images])
    numbers = {}
    for tolerance in TOLERANCES:
        found = agreement(edges_NHW, cases.edges, tolerance)
        numbers[f"precision, {tolerance} px"] = float(found.precision.mean())
        numbers[f"recall, {tolerance} px"] = float(found.recall.mean())
        numbers[f"F1, {tolerance} px"] = float(found.f1.mean())
        other = agreement(edges_NHW, np.roll(cases.edges, 1, axis=0), tolerance)
        numbers[f"F1 to another picture, {tolerance} px"] = float(other.f1.mean())
    distance_N = structure_distance(images, cases.pictures)
    other_N = structure_distance(images, np.roll(cases.pictures, 1, axis=0))
    numbers["Sobel correlation"] = float(1 - distance_N.mean())
    numbers["Sobel correlation to another picture"] = float(1 - other_N.mean())
    numbers["edge pixels, share of the control's"] = float(edges_NHW.sum() / cases.edges.sum())
    numbers["KID-Lite0 to the pictures"] = kid_lite0(images, cases.pictures, cases.prompts)
    return numbers


def spread(values: list[float]) -> str:
    """The mean, and of several values their standard deviation."""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"


def render(title: str, numbers: dict[str, list[Numbers]]) -> str:
    """The report's text in Markdown."""
    columns = list(next(iter(numbers.values()))[0])
    lines = [f"## {title}", "", f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for row, repeats in numbers.items():
        cells = [spread([repeat[column] for repeat in repeats]) for column in columns]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def main(
    data: Annotated[Path, typer.Option(help="A folder of build_dataset.py --size 128.")],
    controlnet: Annotated[Path, typer.Option(help="A ControlNetModel folder.")],
    out: Annotated[Path, typer.Option(help="Folder of the report and of the bundles.")],
    model: Annotated[str, typer.Option(help="Base model.")] = "emoji",
    adaptor: Annotated[Path, typer.Option(help="Trained to generate.")] = ADAPTOR,
    cases: Annotated[int, typer.Option(min=2, help="Held-out pictures, evenly spread.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Times with other noise.")] = 2,
) -> None:
    """Measure how well images follow their control images, and write the report."""
    console = Console(stderr=True)
    out.mkdir(parents=True, exist_ok=True)
    chosen = held_out_cases(data, cases)
    count = len(chosen.prompts)
    rows = makers(model, adaptor, controlnet, out, chosen)

    numbers: dict[str, list[Numbers]] = {}
    shown: dict[str, Any] = {"control image": chosen.controls}
    for repeat in range(repeats):
        seeds = list(range(FIRST_SEED + repeat * count, FIRST_SEED + (repeat + 1) * count))
        for name, make in rows.items():
            # The pictures are the same with any noise.
            if name == REAL and repeat:
                continue
            with console.status(f"{name}, {repeat + 1} of {repeats}"):
                images = make(seeds)
            numbers.setdefault(name, []).append(measure(images, chosen))
            shown.setdefault(name, images)

    title = f"control: {count} held-out pictures, {repeats} seeds of noise each"
    report = render(title, numbers)
    columns = {heading: shown[name] for name, heading in SHEET.items()}
    write_sheet(out / "control.png", columns, chosen.prompts)
    write_file(out / "control.md", (report + "\n![control](control.png)\n").encode())
    write_file(out / "control.json", json.dumps({"title": title, "rows": numbers}).encode())
    typer.echo(report)


if __name__ == "__main__":
    try:
        typer.run(main)
    except HipaError as error:
        sys.exit(f"error: {error}")

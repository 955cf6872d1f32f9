"""Draw two sheets of the miniature SDXL: its one-step images, and what the six numbers do.

    python examples/emoji_sdxl/show_images.py --model runs/emoji/sdxl \\
        --adaptor runs/emoji/adaptor --out runs/emoji/sheets

``one_step.png`` has the images of held-out prompts by the teacher, by the base model in one step,
and by HiPA in one step. ``sizes.png`` has the teacher's images of one prompt and one noise that was
told of other originals and crops.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image
from torch import Tensor

from hipa_deploy.train.data.teacher_pairs import teacher_latents
from hipa_deploy.train.evaluation.quality import one_step_images, teacher_images
from hipa_deploy.train.evaluation.sample_grid import GAP, LINE, headed_grid
from hipa_deploy.train.model.diffusion_model import DiffusionModel, to_uint8
from hipa_deploy.train.recipes.recipe import TeacherSettings

TEACHER = TeacherSettings(sampler="ddim", steps=25, guidance=3.0, pairs=1)
FIRST_SEED = 1_000_000  # as hipa-evaluate takes it; no training sees these seeds
# Heading -> original height and width, top and left of the crop, target height and width.
SIZES = {
    "128 x 128": (128, 128, 0, 0, 128, 128),
    "original 32": (32, 32, 0, 0, 128, 128),
    "original 64": (64, 64, 0, 0, 128, 128),
    "crop, left 0": (128, 192, 0, 0, 128, 128),
    "crop, left 64": (128, 192, 0, 64, 128, 128),
    "crop, top 64": (192, 128, 64, 0, 128, 128),
}


def compare(model: Path, adaptor: Path, prompts: list[str]) -> np.ndarray:
    """The sheet of one-step images, uint8 [H, W, 3]."""
    seeds = [FIRST_SEED + number for number in range(len(prompts))]
    columns = {
        "25 steps, guided": teacher_images(model, prompts, seeds, TEACHER),
        "base, one step": one_step_images(model, None, prompts, seeds),
        "HiPA, one step": one_step_images(model, adaptor, prompts, seeds),
    }
    tensors = {name: torch.from_numpy(images) for name, images in columns.items()}
    return sheet(tensors, prompts)


def sheet(columns: dict[str, Tensor], prompts: list[str]) -> np.ndarray:
    """A sample grid without its first line, which names a step of a training."""
    return headed_grid(columns, prompts, step=0)[LINE + GAP :]


@torch.no_grad()
def sizes_columns(folder: Path, prompts: list[str]) -> dict[str, Tensor]:
    """The teacher's images uint8 [N, H, W, 3] of every six numbers, from the same noise."""
    model = DiffusionModel.load(folder)
    noise = model.noise([FIRST_SEED] * len(prompts))
    conditions = model.conditions(prompts)
    columns = {}
    for heading, numbers in SIZES.items():
        sizes = torch.tensor([numbers], dtype=torch.float32, device=model.device)
        told = replace(conditions, sizes_B6=sizes.expand(len(prompts), -1))
        # The unguided prediction is told the same, as diffusers does by default.
        unguided = replace(model.unguided(), sizes_B6=sizes)
        latents = teacher_latents(model, noise, told, unguided, TEACHER)
        columns[heading] = to_uint8(model.decode(latents))
    return columns


def main(
    model: Annotated[Path, typer.Option(help="The model folder that pretrain_unet.py wrote.")],
    adaptor: Annotated[Path, typer.Option(help="The adaptor that hipa-train wrote.")],
    out: Annotated[Path, typer.Option(help="Folder to write the sheets to.")],
    rows: int = 5,
) -> None:
    """Draw the sheets."""
    held_out = (model / "prompts_pair.txt").read_text(encoding="utf-8").splitlines()
    prompts = held_out[:: max(1, len(held_out) // rows)][:rows]
    out.mkdir(parents=True, exist_ok=True)
    Image.fromarray(compare(model, adaptor, prompts)).save(out / "one_step.png", optimize=True)
    sizes = sheet(sizes_columns(model, prompts[:3]), prompts[:3])
    Image.fromarray(sizes).save(out / "sizes.png", optimize=True)


if __name__ == "__main__":
    typer.run(main)

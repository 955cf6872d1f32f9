from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from rich.console import Console

from hipa_deploy.errors import HipaError
from hipa_deploy.train.evaluation.quality import one_step_images
from hipa_deploy.train.evaluation.task_images import one_step_task_images
from hipa_deploy.train.model.diffusion_model import DiffusionModel, to_float, to_uint8
from hipa_deploy.train.recipes.recipe import Recipe
from hipa_deploy.train.train_adaptor import train_adaptor

PROMPTS = ["a red apple", "a boat"]
SEEDS = [3, 4]


@pytest.fixture
def images(model: DiffusionModel) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (2, *model.resolution, 3), dtype=np.uint8)


@torch.no_grad()
def test_an_edit_is_one_ddim_step_from_the_noised_source(
    model: DiffusionModel, images: np.ndarray
) -> None:
    source = model.encode(to_float(torch.from_numpy(images)))
    noise = model.noise(SEEDS)
    scheduler = DDIMScheduler(**model.schedule, clip_sample=False)
    steps_B = torch.tensor([499, 499])
    start = scheduler.add_noise(source, noise, steps_B)
    output = model.unet(start, steps_B, model.context(PROMPTS), return_dict=False)[0]
    scheduler.set_timesteps(1)
    x0 = scheduler.step(output, 499, start).pred_original_sample
    got = one_step_task_images(model.folder, None, "edit", images, PROMPTS, SEEDS, strength=0.5)
    assert np.abs(got.astype(int) - to_uint8(model.decode(x0)).numpy()).max() <= 1


def test_a_whole_hole_is_text_to_image(model: DiffusionModel, images: np.ndarray) -> None:
    masks = np.ones(images.shape[:3], np.float32)
    got = one_step_task_images(
        model.folder, None, "inpaint", images, PROMPTS, SEEDS, masks_NHW=masks
    )
    assert np.array_equal(got, one_step_images(model.folder, None, PROMPTS, SEEDS))


def test_inpainting_keeps_every_pixel_outside_and_sees_none_inside(
    model: DiffusionModel, images: np.ndarray
) -> None:
    masks = np.zeros(images.shape[:3], np.float32)
    masks[:, :5, :5] = 1
    other = np.where(masks[..., None] > 0, 255 - images, images)
    inputs = (PROMPTS, SEEDS)
    made = one_step_task_images(model.folder, None, "inpaint", images, *inputs, masks_NHW=masks)
    again = one_step_task_images(model.folder, None, "inpaint", other, *inputs, masks_NHW=masks)
    assert np.array_equal(made[masks == 0], images[masks == 0])
    assert np.array_equal(made, again)


def test_upscaling_gives_the_models_own_size(model: DiffusionModel) -> None:
    small = np.full((2, 4, 4, 3), 90, np.uint8)
    made = one_step_task_images(model.folder, None, "upscale", small, PROMPTS, SEEDS, factor=4)
    assert made.shape == (2, 16, 16, 3)


@pytest.fixture
def edit_adaptor(recipe: Recipe, model_dir: Path, cache: Path, tmp_path: Path) -> Path:
    values: dict[str, Any] = recipe.model_dump() | {
        "task": "edit",
        "source": {"strengths": [0.5]},
        "steps": 1,
    }
    values["teacher"] |= {"steps": 2, "pairs": 2}
    edit = Recipe.model_validate(values)
    return train_adaptor(
        edit, model_dir, tmp_path / "edit", cache=cache, device="cpu", console=Console(quiet=True)
    )


def test_an_adaptor_changes_the_image_and_knows_its_task(
    edit_adaptor: Path, model_dir: Path, images: np.ndarray
) -> None:
    inputs = ("edit", images, PROMPTS, SEEDS)
    base = one_step_task_images(model_dir, None, *inputs, strength=0.5)
    adapted = one_step_task_images(model_dir, edit_adaptor, *inputs, strength=0.5)
    assert not np.array_equal(base, adapted)
    with pytest.raises(
        HipaError, match=r"task edit, strengths \(0.5,\). Expected edit, strength 0.8"
    ):
        one_step_task_images(model_dir, edit_adaptor, "edit", images, PROMPTS, SEEDS, strength=0.8)
    with pytest.raises(HipaError, match="Expected upscale"):
        one_step_task_images(model_dir, edit_adaptor, "upscale", images, PROMPTS, SEEDS)


def test_an_adaptor_for_edits_does_not_generate(edit_adaptor: Path, model_dir: Path) -> None:
    with pytest.raises(HipaError, match=r"is for the task edit\. Expected one for text to image"):
        one_step_images(model_dir, edit_adaptor, PROMPTS, SEEDS)


def test_inpainting_without_masks(model_dir: Path, images: np.ndarray) -> None:
    with pytest.raises(HipaError, match="needs a mask for each image"):
        one_step_task_images(model_dir, None, "inpaint", images, PROMPTS, SEEDS)

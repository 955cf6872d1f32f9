"""The multi-step baselines, real diffusers pipelines on the tiny model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from PIL import Image

from benchmarks.tasks import baselines
from benchmarks.tasks.baselines import BASELINES, Settings, unet_calls
from hipa_deploy.errors import HipaError
from hipa_deploy.images.compositing import latent_mask
from hipa_deploy.train.data.teacher_pairs import teacher_scheduler
from hipa_deploy.train.evaluation.quality import teacher_images
from hipa_deploy.train.model.diffusion_model import DiffusionModel
from hipa_deploy.train.recipes.recipe import TeacherSettings

PROMPTS = ["a red apple", "a green pear"]
SEEDS = [3, 4]
FEW = Settings(steps=4, guidance=2.0, strength=0.5, scale=2)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def masks() -> np.ndarray:
    masks = np.zeros((2, 32, 32), np.float32)
    masks[0, 8:16, 12:24] = 1
    masks[1, 5:7, 5:7] = 1  # within one latent cell, off its centre
    return masks


def arguments(
    name: str, images: np.ndarray, masks: np.ndarray
) -> tuple[np.ndarray, np.ndarray | None]:
    if name in ("upscale img2img", "bicubic"):
        return images[:, ::2, ::2], None
    return images, masks


@pytest.mark.parametrize("name", BASELINES)
def test_equal_calls_give_equal_images_and_other_seeds_others(
    name: str, model_dir: Path, images: np.ndarray, masks: np.ndarray
) -> None:
    inputs = arguments(name, images, masks)
    settings = replace(FEW, strength=1.0) if name == "inpaint" else FEW
    made = BASELINES[name](model_dir, *inputs, PROMPTS, SEEDS, settings)
    assert made.shape == (2, 32, 32, 3)
    assert made.dtype == np.uint8
    np.testing.assert_array_equal(
        BASELINES[name](model_dir, *inputs, PROMPTS, SEEDS, settings), made
    )
    other = BASELINES[name](model_dir, *inputs, PROMPTS, [3, 5], settings)
    assert np.abs(other[0].astype(int) - made[0]).max() <= 1
    assert (other[1] != made[1]).any() == (name != "bicubic")


@pytest.mark.parametrize("name", ["img2img", "inpaint"])
def test_an_image_does_not_depend_on_its_batch(
    name: str,
    model_dir: Path,
    images: np.ndarray,
    masks: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    together = BASELINES[name](model_dir, images, masks, PROMPTS, SEEDS, FEW)
    monkeypatch.setattr(baselines, "CHUNK", 1)
    alone = BASELINES[name](model_dir, images, masks, PROMPTS, SEEDS, FEW)
    assert np.abs(alone.astype(int) - together).max() <= 1


def test_img2img_is_what_diffusers_gives(model_dir: Path, images: np.ndarray) -> None:
    """Its own from_pipe, an image at a time."""
    model = DiffusionModel.load(model_dir)
    pipe = StableDiffusionImg2ImgPipeline.from_pipe(
        model.pipe, scheduler=teacher_scheduler(model.schedule, "ddim")
    )
    pipe.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 2.0, "strength": 0.5}
    expected = []
    for text, image, seed in zip(PROMPTS, images, SEEDS, strict=True):
        generator = torch.Generator().manual_seed(seed)
        made = pipe(text, Image.fromarray(image), generator=generator, **options)
        expected.append(np.asarray(made.images[0]))
    made = BASELINES["img2img"](model_dir, images, None, PROMPTS, SEEDS, FEW)
    assert np.abs(made.astype(int) - np.stack(expected)).max() <= 1


def test_the_hole_is_hidden_and_composited(
    model_dir: Path, images: np.ndarray, masks: np.ndarray
) -> None:
    """What lies under the mask changes nothing; a composite keeps the original outside of it."""
    settings = replace(FEW, strength=1.0, feather=0)
    made = BASELINES["inpaint"](model_dir, images, masks, PROMPTS, SEEDS, settings)
    other = np.where(masks[..., None] > 0, 255 - images, images)
    np.testing.assert_array_equal(
        BASELINES["inpaint"](model_dir, other, masks, PROMPTS, SEEDS, settings), made
    )
    np.testing.assert_array_equal(made[masks == 0], images[masks == 0])
    assert (made[0][masks[0] > 0] != 127).any()
    assert (made[1][masks[1] > 0] != 127).any()


def as_diffusers_samples(masks: np.ndarray) -> torch.Tensor:
    """The nearest pixel of each of 8x8 latent cells."""
    return torch.nn.functional.interpolate(torch.from_numpy(masks)[:, None], size=(8, 8))


def test_the_pipeline_repaints_every_cell_that_the_mask_touches(
    model_dir: Path, images: np.ndarray, masks: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The small mask misses the pixel of its cell that diffusers' downsampling takes."""
    arrays_seen: dict[str, np.ndarray] = {}

    def record(pipe: Any, arrays: dict[str, np.ndarray], *_: Any) -> np.ndarray:
        arrays_seen.update(arrays)
        return images

    monkeypatch.setattr(baselines, "_run", record)
    BASELINES["inpaint"](model_dir, images, masks, PROMPTS, SEEDS, FEW)
    sampled = as_diffusers_samples(arrays_seen["mask_image"]) > 127
    plain = as_diffusers_samples(masks) > 0.5
    assert np.array_equal(sampled.float(), np.stack([latent_mask(mask, 4) for mask in masks]))
    assert not plain[1].any()


def test_the_unet_runs_as_often_as_said(
    model_dir: Path, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    original = baselines._pipeline

    def counting(kind: Any, folder: Path) -> Any:
        pipe = original(kind, folder)
        pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
        return pipe

    monkeypatch.setattr(baselines, "_pipeline", counting)
    for strength in (1.0, 0.75, 0.3):
        calls.clear()
        settings = replace(FEW, strength=strength)
        BASELINES["img2img"](model_dir, images, None, PROMPTS, SEEDS, settings)
        assert len(calls) == unet_calls(settings)


def test_the_control_sees_no_image(model_dir: Path, images: np.ndarray) -> None:
    made = BASELINES["prompt alone"](model_dir, images, None, PROMPTS, SEEDS, FEW)
    teacher = TeacherSettings(steps=4, guidance=2.0, pairs=2)
    np.testing.assert_array_equal(made, teacher_images(model_dir, PROMPTS, SEEDS, teacher))
    np.testing.assert_array_equal(
        BASELINES["prompt alone"](model_dir, 255 - images, None, PROMPTS, SEEDS, FEW), made
    )


@pytest.mark.filterwarnings("error::FutureWarning")
@pytest.mark.parametrize("name", ["img2img", "inpaint"])
def test_no_pipeline_warns_of_its_scheduler(
    name: str,
    model_dir: Path,
    images: np.ndarray,
    masks: np.ndarray,
    caplog: pytest.LogCaptureFixture,
) -> None:
    BASELINES[name](model_dir, images, masks, PROMPTS, SEEDS, FEW)
    assert "steps_offset" not in caplog.text


def test_bicubic_keeps_a_constant() -> None:
    grey = np.full((1, 8, 6, 3), 90, np.uint8)
    made = BASELINES["bicubic"](Path("none"), grey, None, [""], [0], Settings(scale=3))
    assert made.shape == (1, 24, 18, 3)
    assert (made == 90).all()


def test_what_cannot_be_run(model_dir: Path, images: np.ndarray, masks: np.ndarray) -> None:
    for call, words in [
        (("img2img", images, None, PROMPTS[:1], SEEDS, FEW), "2 images, 1 prompts, 2 seeds"),
        (("img2img", images[:, :30], None, PROMPTS, SEEDS, FEW), "multiples of 4"),
        (
            ("img2img", images, None, PROMPTS, SEEDS, replace(FEW, strength=0.2)),
            "0.2 of 4 steps is 0 steps",
        ),
        (
            ("img2img", images, None, PROMPTS, SEEDS, replace(FEW, strength=1.5)),
            r"strength in \(0, 1\]",
        ),
        (("inpaint", images, None, PROMPTS, SEEDS, FEW), "no masks"),
        (("inpaint", images, masks[:, :8], PROMPTS, SEEDS, FEW), "one mask"),
    ]:
        with pytest.raises(HipaError, match=words):
            BASELINES[call[0]](model_dir, *call[1:])

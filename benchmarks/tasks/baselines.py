"""The baselines of the tasks: diffusers' multi-step pipelines, bicubic enlarging, and a control.

All of them use the same base model as the one step they are compared with, and have the same
arguments and results: uint8 [N, H, W, 3] in and out. Equal calls return equal images: DDIM with
trailing timesteps, and a generator for each image from its seed.

The pipelines are used as they are, with two differences that keep the comparison fair; our one step
gets the same. The image to inpaint has its hole already hidden, since the VAE carries what was
there into the latents around it. The mask consists of whole latent cells, since diffusers looks
only at the nearest pixel of each cell. The safety checker is off.

Shapes: N images, H, W image size in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline
from PIL import Image

from hipa_deploy.errors import HipaError
from hipa_deploy.images.compositing import composite, hide_hole, latent_mask
from hipa_deploy.images.png import enlarge
from hipa_deploy.train.data.teacher_pairs import teacher_scheduler
from hipa_deploy.train.evaluation.quality import teacher_images
from hipa_deploy.train.model.diffusion_model import DiffusionModel
from hipa_deploy.train.recipes.recipe import TeacherSettings

CHUNK = 16  # images that go through a pipeline at once
# The parts of a pipeline; those that the base model's folder does not have are None.
PARTS = (
    "vae",
    "text_encoder",
    "tokenizer",
    "unet",
    "safety_checker",
    "feature_extractor",
    "image_encoder",
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a baseline; bicubic enlarging uses ``scale`` alone."""

    steps: int = 25
    """Steps of the whole schedule; the UNet runs int(steps * strength) times (guided: twice)."""
    guidance: float = 5.0
    """Classifier-free guidance; 1 turns it off."""
    strength: float = 1.0
    """Share of the schedule that is run, in (0, 1]: 1 for inpainting, about 0.3 for
    super-resolution."""
    scale: int = 4
    """Of super-resolution: how many times larger each way."""
    feather: int | None = None
    """Of inpainting: composite the result over the original with this feather in pixels; None
    returns the pipeline's own result."""


class Baseline(Protocol):
    """A baseline: images and masks (None where the task has none), a prompt and a seed for each.

    All images of a call have one size.
    """

    def __call__(
        self,
        model_dir: Path,
        images_NHWC: np.ndarray,
        masks_NHW: np.ndarray | None,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: Settings,
    ) -> np.ndarray: ...


def edit_img2img(
    model_dir: Path,
    images_NHWC: np.ndarray,
    masks_NHW: np.ndarray | None,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: Settings,
) -> np.ndarray:
    """SDEdit (Meng et al. 2022) as StableDiffusionImg2ImgPipeline does it; masks are ignored.

    Raises:
        HipaError: Unequal numbers of images, prompts and seeds, image sides that are no multiples
            of the latent cells, or a strength that leaves no step.

    """
    pipe = _pipeline(StableDiffusionImg2ImgPipeline, model_dir)
    _check(images_NHWC, prompts, seeds, settings, pipe.vae_scale_factor)
    return _run(pipe, {"image": images_NHWC}, prompts, seeds, settings)


def inpaint_pipeline(
    model_dir: Path,
    images_NHWC: np.ndarray,
    masks_NHW: np.ndarray | None,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: Settings,
) -> np.ndarray:
    """Inpainting as StableDiffusionInpaintPipeline does it.

    With a 4-channel UNet the pipeline blends in the known latents after every step.

    Raises:
        HipaError: As ``edit_img2img``, or not one mask for each image.

    """
    pipe = _pipeline(StableDiffusionInpaintPipeline, model_dir)
    factor = pipe.vae_scale_factor
    _check(images_NHWC, prompts, seeds, settings, factor)
    if masks_NHW is None or masks_NHW.shape != images_NHWC.shape[:3]:
        got = "no masks" if masks_NHW is None else f"masks of shape {masks_NHW.shape}"
        raise HipaError(
            f"{got} for images of shape {images_NHWC.shape}. "
            "Expected one mask [H, W] for each image."
        )

    # The hole is hidden and the mask is extended to whole latent cells, as for our one step.
    hidden = []
    cell_masks = []
    for image, mask in zip(images_NHWC, masks_NHW, strict=True):
        cells_HW = latent_mask(mask, factor)[0]
        hidden.append(hide_hole(image, mask))
        cell_masks.append(np.kron(cells_HW, np.ones((factor, factor))))
    masks_uint8 = (np.stack(cell_masks) * 255).astype(np.uint8)
    arrays = {"image": np.stack(hidden), "mask_image": masks_uint8}
    made = _run(pipe, arrays, prompts, seeds, settings)
    if settings.feather is None:
        return made

    finished = []
    for result, image, mask in zip(made, images_NHWC, masks_NHW, strict=True):
        finished.append(composite(result, image, mask, settings.feather, match=True))
    return np.stack(finished)


def upscale_img2img(
    model_dir: Path,
    images_NHWC: np.ndarray,
    masks_NHW: np.ndarray | None,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: Settings,
) -> np.ndarray:
    """Bicubic enlarging, then img2img at a low strength, so that the model adds the detail.

    Returns:
        uint8 [N, scale H, scale W, 3].

    Raises:
        HipaError: As ``edit_img2img``, for the enlarged images.

    """
    enlarged_NHWC = _bicubic(images_NHWC, settings.scale)
    return edit_img2img(model_dir, enlarged_NHWC, masks_NHW, prompts, seeds, settings)


def upscale_bicubic(
    model_dir: Path,
    images_NHWC: np.ndarray,
    masks_NHW: np.ndarray | None,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: Settings,
) -> np.ndarray:
    """Pillow's bicubic enlarging, no model: uint8 [N, scale H, scale W, 3]."""
    return _bicubic(images_NHWC, settings.scale)


def prompt_alone(
    model_dir: Path,
    images_NHWC: np.ndarray,
    masks_NHW: np.ndarray | None,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: Settings,
) -> np.ndarray:
    """A control: what the model makes of the prompt at its own size, without seeing the image.

    Where the control comes as near to the truth as a task's method does, the truth says nothing
    about the task. This can happen: a small model that knows its prompts by heart makes nearly the
    same image of a prompt, whatever the noise.

    Raises:
        HipaError: Unequal numbers of prompts and seeds.

    """
    teacher = TeacherSettings(steps=settings.steps, guidance=settings.guidance, pairs=len(seeds))
    return teacher_images(model_dir, prompts, seeds, teacher)


BASELINES: dict[str, Baseline] = {
    "prompt alone": prompt_alone,
    "img2img": edit_img2img,
    "inpaint": inpaint_pipeline,
    "upscale img2img": upscale_img2img,
    "bicubic": upscale_bicubic,
}


def unet_calls(settings: Settings) -> int:
    """UNet calls of a pipeline for one image; the two halves of guidance count as one call."""
    return min(int(settings.steps * settings.strength), settings.steps)


def _pipeline(kind: Any, model_dir: Path) -> Any:
    """A pipeline of this kind on the parts of a DiffusionModel, with the teacher's scheduler."""
    model = DiffusionModel.load(model_dir)
    # Trailing timesteps use no offset, but the pipelines warn of any value other than 1.
    scheduler = teacher_scheduler({**model.schedule, "steps_offset": 1}, "ddim")
    parts = {name: model.pipe.components.get(name) for name in PARTS}
    pipe = kind(**parts, scheduler=scheduler, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _run(
    pipe: Any,
    arrays: dict[str, np.ndarray],
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: Settings,
) -> np.ndarray:
    """Run a pipeline by chunks, uint8 [N, H, W, 3].

    Args:
        pipe: An img2img or inpainting pipeline.
        arrays: Its image arguments by name, uint8 [N, H, W] or [N, H, W, 3].
        prompts: N prompts.
        seeds: The seed of each image's generator.
        settings: Steps, guidance and strength.

    """
    # The inpainting pipeline resizes to the model's own size unless it is told the image's;
    # img2img keeps the size of its image, and has no such arguments.
    size = {}
    if "mask_image" in arrays:
        size["height"], size["width"] = arrays["image"].shape[1:3]

    made = []
    for start in range(0, len(seeds), CHUNK):
        chunk = slice(start, start + CHUNK)
        images = {name: _pil_images(values[chunk]) for name, values in arrays.items()}
        images_BHWC = pipe(
            list(prompts[chunk]),
            **images,
            **size,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            strength=settings.strength,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds[chunk]],
            output_type="np",
        ).images
        made.append(np.rint(images_BHWC * 255).astype(np.uint8))
    return np.concatenate(made)


def _pil_images(arrays: np.ndarray) -> list[Image.Image]:
    return [Image.fromarray(array) for array in arrays]


def _bicubic(images_NHWC: np.ndarray, scale: int) -> np.ndarray:
    return np.stack([enlarge(image_HWC, scale) for image_HWC in images_NHWC])


def _check(
    images_NHWC: np.ndarray,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: Settings,
    factor: int,
) -> None:
    """Raise HipaError for what the pipelines would refuse later, or silently change."""
    if not len(images_NHWC) == len(prompts) == len(seeds) > 0:
        raise HipaError(
            f"{len(images_NHWC)} images, {len(prompts)} prompts, {len(seeds)} seeds. "
            "Expected one prompt and one seed for each image."
        )
    if any(side % factor for side in images_NHWC.shape[1:3]):
        raise HipaError(
            f"images of shape {images_NHWC.shape}. Expected sides that are multiples of {factor}."
        )
    if not 0 < settings.strength <= 1 or unet_calls(settings) < 1:
        raise HipaError(
            f"strength {settings.strength} of {settings.steps} steps is {unet_calls(settings)} "
            "steps. Expected a strength in (0, 1], and one step or more."
        )

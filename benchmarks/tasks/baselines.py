"""What one step is compared with: diffusers' own multi-step pipelines on the same base model, bicubic, and a control.

Each baseline is a function of the same arguments, uint8 [N, H, W, 3] in and out, and gives the same images again: DDIM
with trailing timesteps, and a generator for each image from its seed. Import it as ``benchmarks.tasks.baselines``.

The pipelines are used as they are, with two differences that keep the comparison fair. Inpainting gets the image with
its hole already hidden, since the VAE carries what was there into the latents around it, and a mask of whole latent
cells, since diffusers takes only the nearest pixel of each: our one step gets the same. The safety checker is off.
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

CHUNK = 16
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
    """Of a multi-step baseline; bicubic looks at ``scale`` alone."""

    steps: int = 25
    """Of the whole schedule: the UNet runs int(steps * strength) times (twice with guidance)."""
    guidance: float = 5.0
    """Classifier-free guidance; 1 turns it off."""
    strength: float = 1.0
    """How much of the schedule is run, in (0, 1]: 1 for inpainting, about 0.3 for super-resolution."""
    scale: int = 4
    """Super-resolution: how many times larger each way."""
    feather: int | None = None
    """Inpainting: composite over the original with this feather, in pixels; None: as the pipeline leaves it."""


class Baseline(Protocol):
    """Images and masks (None where the task has none) of one size, a prompt and a seed for each."""

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
    """SDEdit (Meng et al. 2022) as StableDiffusionImg2ImgPipeline does it; masks are not looked at.

    Raises:
        HipaError: unequal numbers of images, prompts and seeds, images that are no multiple of the latent cells, or a
            strength that leaves no step.

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
    """StableDiffusionInpaintPipeline: with a 4-channel UNet the known latents are blended in after every step.

    Raises:
        HipaError: as ``edit_img2img``, or not one mask for each image.

    """
    pipe = _pipeline(StableDiffusionInpaintPipeline, model_dir)
    factor = pipe.vae_scale_factor
    _check(images_NHWC, prompts, seeds, settings, factor)
    if masks_NHW is None or masks_NHW.shape != images_NHWC.shape[:3]:
        got = "no masks" if masks_NHW is None else f"masks of shape {masks_NHW.shape}"
        raise HipaError(
            f"{got} for images of shape {images_NHWC.shape}. Expected one mask [H, W] for each image."
        )
    pairs = list(zip(images_NHWC, masks_NHW, strict=True))
    hidden = np.stack([hide_hole(image, mask) for image, mask in pairs])
    cells = np.stack(
        [np.kron(latent_mask(mask, factor)[0], np.ones((factor, factor))) for _, mask in pairs]
    )
    whole = {"image": hidden, "mask_image": (cells * 255).astype(np.uint8)}
    made = _run(pipe, whole, prompts, seeds, settings)
    if settings.feather is None:
        return made
    return np.stack(
        [
            composite(m, image, mask, settings.feather)
            for m, (image, mask) in zip(made, pairs, strict=True)
        ]
    )


def upscale_img2img(
    model_dir: Path,
    images_NHWC: np.ndarray,
    masks_NHW: np.ndarray | None,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: Settings,
) -> np.ndarray:
    """Bicubic, then img2img at a low strength, so that the prior adds the detail: uint8 [N, scale H, scale W, 3].

    Raises:
        HipaError: as ``edit_img2img``; the enlarged images are the ones to be whole latent cells.

    """
    return edit_img2img(
        model_dir, _bicubic(images_NHWC, settings.scale), masks_NHW, prompts, seeds, settings
    )


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
    """A control: what the model makes of the prompt at its own size, without a look at the image.

    Where this comes as near to the truth as a task's method does, the truth says nothing about the task: a small model
    that knows its prompts by heart makes nearly one image of each, whatever the noise.

    Raises:
        HipaError: unequal numbers of prompts and seeds.

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
    """How often the pipelines run the UNet for an image, the two halves of guidance counted as one."""
    return min(int(settings.steps * settings.strength), settings.steps)


def _pipeline(kind: Any, model_dir: Path) -> Any:
    """A pipeline of this kind on the parts of a DiffusionModel, with the teacher's scheduler."""
    model = DiffusionModel.load(model_dir)
    # trailing timesteps take no offset; the pipelines warn of any but 1
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
    """The pipeline by chunks, uint8 [N, H, W, 3]; ``arrays`` are its image arguments, [N, H, W(, 3)]."""
    made, size = [], dict(zip(("height", "width"), arrays["image"].shape[1:3], strict=True))
    for start in range(0, len(seeds), CHUNK):
        chunk = slice(start, start + CHUNK)
        images_BHWC = pipe(
            list(prompts[chunk]),
            **{
                name: [Image.fromarray(array) for array in values[chunk]]
                for name, values in arrays.items()
            },
            **(size if "mask_image" in arrays else {}),  # img2img keeps its image's size
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            strength=settings.strength,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds[chunk]],
            output_type="np",
        ).images
        made.append(np.rint(images_BHWC * 255).astype(np.uint8))
    return np.concatenate(made)


def _bicubic(images_NHWC: np.ndarray, scale: int) -> np.ndarray:
    return np.stack([enlarge(image_HWC, scale) for image_HWC in images_NHWC])


def _check(
    images_NHWC: np.ndarray,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: Settings,
    factor: int,
) -> None:
    if not len(images_NHWC) == len(prompts) == len(seeds) > 0:
        got = f"{len(images_NHWC)} images, {len(prompts)} prompts, {len(seeds)} seeds"
        raise HipaError(f"{got}. Expected one prompt and one seed for each image.")
    if any(side % factor for side in images_NHWC.shape[1:3]):
        raise HipaError(
            f"images of shape {images_NHWC.shape}. Expected sides that are multiples of {factor}."
        )
    if not 0 < settings.strength <= 1 or unet_calls(settings) < 1:
        got = f"strength {settings.strength} of {settings.steps} steps"
        raise HipaError(
            f"{got} is {unet_calls(settings)} steps. Expected a strength in (0, 1], and one step or more."
        )

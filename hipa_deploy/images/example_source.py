"""A source image and mask that are the same everywhere.

An export's reference is made from them, and so is what a profile times.
"""

from __future__ import annotations

import numpy as np

from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.images.compositing import hide_hole, latent_mask
from hipa_deploy.images.png import enlarge
from hipa_deploy.images.source import Source
from hipa_deploy.tasks import Task

_RED = (214, 48, 49)
_BLUE = (9, 60, 132)


def example_source(bundle: Bundle, number: int = 0) -> Source | None:
    """A source at the bundle's own size, another for every ``number``; None for text to image."""
    manifest = bundle.manifest
    step = manifest.one_step
    if manifest.task == "generate":
        return None
    factor = step.height // step.latent_shape[1]
    inputs = example_inputs(
        manifest.task, step.height, step.width, factor, manifest.upscale or 1, number
    )
    several = len(manifest.strengths) > 1
    return Source(manifest.task, inputs["image"], inputs.get("mask"), step=0 if several else None)


def example_inputs(
    task: Task, height: int, width: int, factor: int, upscale: int = 1, number: int = 0
) -> dict[str, np.ndarray]:
    """What the stages of ``task`` take beside noise and text: 'image' [H, W, 3], 'mask' [1, h, w].

    ``factor`` is pixels a latent. The task is not to generate.
    """
    image_HWC = example_image(height, width, number)
    if task == "upscale":
        return {"image": enlarge(image_HWC[::upscale, ::upscale], upscale)[:height, :width]}
    if task == "edit":
        return {"image": image_HWC}
    mask_HW = example_mask(height, width)
    return {"image": hide_hole(image_HWC, mask_HW), "mask": latent_mask(mask_HW, factor)}


def example_image(height: int, width: int, number: int = 0) -> np.ndarray:
    """A disc and a square over smooth colours, uint8 [height, width, 3].

    Another ``number`` shifts the colours.
    """
    y_H1, x_1W = np.mgrid[0:height, 0:width].astype(np.float64)
    y_H1 = (y_H1 + 0.5) / height
    x_1W = (x_1W + 0.5) / width
    image_HWC = np.stack([160 + 90 * y_H1, 235 - 80 * x_1W, 200 - 60 * y_H1 * x_1W], axis=-1)
    image_HWC = np.roll(image_HWC, number, axis=1)
    image_HWC[(y_H1 - 0.45) ** 2 + (x_1W - 0.4) ** 2 < 0.07] = _RED
    image_HWC[(abs(y_H1 - 0.72) < 0.12) & (abs(x_1W - 0.7) < 0.12)] = _BLUE
    return image_HWC.round().astype(np.uint8)


def example_mask(height: int, width: int) -> np.ndarray:
    """A rectangle right of the middle to be repainted, float32 [height, width] of 0 and 1."""
    mask_HW = np.zeros((height, width), np.float32)
    mask_HW[height // 4 : 3 * height // 4, width // 2 : 7 * width // 8] = 1
    return mask_HW

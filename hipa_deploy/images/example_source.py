"""A drawn source image and mask, equal on every machine: inputs of references and of timings.

Shapes: H, W height and width in pixels; h, w of the latent; C = 3 colour channels.
"""

from __future__ import annotations

import numpy as np

from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.images.compositing import hide_hole, latent_mask
from hipa_deploy.images.png import enlarge
from hipa_deploy.images.source import Source
from hipa_deploy.tasks import Task

EXAMPLE_SCALE = 0.8  # of control: at 1 a network that ignores it would look right
_RED = (214, 48, 49)
_BLUE = (9, 60, 132)


def example_source(bundle: Bundle, number: int = 0) -> Source | None:
    """Draw a source at the bundle's own size.

    Args:
        bundle: a bundle for any task.
        number: every number gives another image.

    Returns:
        The source, or None for a bundle that generates from a prompt alone.

    """
    manifest = bundle.manifest
    step = manifest.one_step
    if manifest.task == "generate":
        return None
    if manifest.task == "control":
        control_HWC = example_image(step.height, step.width, number)
        return Source("control", control_HWC, scale=EXAMPLE_SCALE)
    factor = step.height // step.latent_shape[1]
    upscale = manifest.upscale or 1
    inputs = example_inputs(manifest.task, step.height, step.width, factor, upscale, number)
    # Only a graph with several strengths has an input for the index of one.
    several_strengths = len(manifest.strengths) > 1
    return Source(
        manifest.task,
        inputs["image"],
        inputs.get("mask"),
        step=0 if several_strengths else None,
    )


def example_inputs(
    task: Task, height: int, width: int, factor: int, upscale: int = 1, number: int = 0
) -> dict[str, np.ndarray]:
    """Draw what the stages of a task take besides noise and text, without a batch axis.

    Args:
        task: any task but generate, which takes no image.
        height: in pixels.
        width: in pixels.
        factor: pixels per latent, along either axis.
        upscale: factor of the enlargement, for the task upscale.
        number: every number gives another image.

    Returns:
        'image' uint8 [H, W, 3]; for inpainting also 'mask' float32 [1, h, w]; for control
        'control' uint8 [H, W, 3] and 'control_scale' float32 [] in their place.

    """
    image_HWC = example_image(height, width, number)
    if task == "control":
        return {"control": image_HWC, "control_scale": np.asarray(EXAMPLE_SCALE, np.float32)}
    if task == "upscale":
        # Take every n-th pixel, then enlarge: as blurred as an image that is to be enlarged is.
        small_HWC = image_HWC[::upscale, ::upscale]
        return {"image": enlarge(small_HWC, upscale)[:height, :width]}
    if task == "edit":
        return {"image": image_HWC}
    mask_HW = example_mask(height, width)
    return {"image": hide_hole(image_HWC, mask_HW), "mask": latent_mask(mask_HW, factor)}


def example_image(height: int, width: int, number: int = 0) -> np.ndarray:
    """Draw a disc and a square over smooth colours, uint8 [height, width, 3].

    Another ``number`` shifts the colours.
    """
    # Pixel centres, as a share of the height and of the width.
    y_H1, x_1W = np.mgrid[0:height, 0:width].astype(np.float64)
    y_H1 = (y_H1 + 0.5) / height
    x_1W = (x_1W + 0.5) / width

    image_HWC = np.stack([160 + 90 * y_H1, 235 - 80 * x_1W, 200 - 60 * y_H1 * x_1W], axis=-1)
    image_HWC = np.roll(image_HWC, number, axis=1)

    # Hard edges and flat areas beside the gradients: an encoder has to meet all three.
    image_HWC[(y_H1 - 0.45) ** 2 + (x_1W - 0.4) ** 2 < 0.07] = _RED
    image_HWC[(abs(y_H1 - 0.72) < 0.12) & (abs(x_1W - 0.7) < 0.12)] = _BLUE
    return image_HWC.round().astype(np.uint8)


def example_mask(height: int, width: int) -> np.ndarray:
    """Draw a rectangle right of the middle, float32 [height, width]: 1 is repainted."""
    mask_HW = np.zeros((height, width), np.float32)
    mask_HW[height // 4 : 3 * height // 4, width // 2 : 7 * width // 8] = 1
    return mask_HW

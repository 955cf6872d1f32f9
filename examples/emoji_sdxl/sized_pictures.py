"""Training pictures of several original sizes and crops, with the six numbers that tell of them.

As SDXL was trained (Podell et al. 2023, https://arxiv.org/abs/2307.01952, section 2.2): an image is
resized until its shorter side has the training's pixels, and what stands over is cut off. The UNet
is told the original height and width, how many pixels were cut off at the top and at the left, and
the training's height and width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

SIDE = 128  # pixels of a training picture
SMALLEST = 32  # of an original's side
LARGEST_OVERHANG = 64  # pixels that one side of an original may be longer than the other


@dataclass(frozen=True)
class Sized:
    """A picture, and what the UNet is told of it.

    Attributes:
        image_HWC: uint8 [128, 128, 3].
        sizes: original height and width, top and left of the crop, target height and width.

    """

    image_HWC: np.ndarray
    sizes: tuple[int, int, int, int, int, int]


def plain(image_HWC: np.ndarray) -> Sized:
    """The image as it is: StableDiffusionXLPipeline asks for these six numbers by default."""
    return Sized(image_HWC, (SIDE, SIDE, 0, 0, SIDE, SIDE))


def small_original(image_HWC: np.ndarray, side: int) -> Sized:
    """The image as an original of ``side`` pixels, enlarged: the fewer, the more it is blurred."""
    original = Image.fromarray(image_HWC).resize((side, side), Image.Resampling.LANCZOS)
    enlarged = original.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return Sized(np.asarray(enlarged), (side, side, 0, 0, SIDE, SIDE))


def cropped(image_HWC: np.ndarray, overhang: int, offset: int, upright: bool) -> Sized:
    """The image in the middle of a longer white original, of which a square is cut out.

    Args:
        image_HWC: uint8 [128, 128, 3].
        overhang: pixels by which one side is longer.
        offset: pixels that are cut off at the top or left, 0 to ``overhang``.
        upright: whether the height is longer, else the width.

    """
    height = SIDE + overhang * upright
    width = SIDE + overhang * (not upright)
    original = np.full((height, width, 3), 255, dtype=np.uint8)
    top = (height - SIDE) // 2
    left = (width - SIDE) // 2
    original[top : top + SIDE, left : left + SIDE] = image_HWC
    cut_top = offset * upright
    cut_left = offset * (not upright)
    square = original[cut_top : cut_top + SIDE, cut_left : cut_left + SIDE]
    return Sized(square, (height, width, cut_top, cut_left, SIDE, SIDE))


def variants(image_HWC: np.ndarray, rng: np.random.Generator, count: int = 3) -> list[Sized]:
    """The plain picture, then ``count`` small originals, then ``count`` crops."""
    made = [plain(image_HWC)]
    for _ in range(count):
        made.append(small_original(image_HWC, int(rng.integers(SMALLEST, SIDE))))
    for _ in range(count):
        overhang = int(rng.integers(8, LARGEST_OVERHANG + 1))
        offset = int(rng.integers(overhang + 1))
        made.append(cropped(image_HWC, overhang, offset, bool(rng.integers(2))))
    return made

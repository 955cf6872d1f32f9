"""Masks to learn inpainting from: what people draw, boxes, ellipses and broad strokes."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

TRIES = 100
SHAPES = 4  # of one mask, at most


def random_mask(
    rng: np.random.Generator, height: int, width: int, coverage: tuple[float, float]
) -> np.ndarray:
    """A mask, float32 [H, W] of 0 and 1 (repaint), that covers a share of the image within ``coverage``.

    One to four shapes of random kinds (LaMa's mixture of boxes and strokes, Suvorov et al. 2022, with ellipses); a box
    of the mean coverage if none of many tries falls within.
    """
    for _ in range(TRIES):
        image = Image.new("L", (width, height))
        for _ in range(rng.integers(1, SHAPES + 1)):
            draw_shape(ImageDraw.Draw(image), rng, height, width)
        mask_HW = (np.asarray(image) > 0).astype(np.float32)
        if coverage[0] <= mask_HW.mean() <= coverage[1]:
            return mask_HW
    side = (sum(coverage) / 2) ** 0.5
    mask_HW = np.zeros((height, width), np.float32)
    mask_HW[: max(1, round(side * height)), : max(1, round(side * width))] = 1
    return mask_HW


def draw_shape(
    draw: ImageDraw.ImageDraw, rng: np.random.Generator, height: int, width: int
) -> None:
    """One white shape of random kind, place and size."""
    size, (x, y) = np.array([width, height]), rng.random(2)
    kind, extent = rng.integers(3), rng.uniform(0.1, 0.6, 2) * size
    if kind == 2:
        points = rng.random((rng.integers(2, 5), 2)) * size
        draw.line(
            [tuple(p) for p in points], fill=255, width=max(1, int(extent.min() / 3)), joint="curve"
        )
        return
    corner = np.array([x, y]) * size - extent / 2
    box = [*corner, *(corner + extent)]
    (draw.rectangle if kind == 0 else draw.ellipse)(box, fill=255)

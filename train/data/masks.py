"""Random masks for inpainting training: mixtures of boxes, ellipses and broad strokes.

Shapes: H, W height and width of the image in pixels.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

TRIES = 100  # masks drawn before the fallback; in practice a few are enough
MAX_SHAPES = 4  # of one mask
RECTANGLE = 0
STROKE = 2  # kind 1 is the ellipse


def random_mask(
    rng: np.random.Generator, height: int, width: int, coverage: tuple[float, float]
) -> np.ndarray:
    """Draw a mask whose share of repainted pixels lies within ``coverage``.

    A mask has one to four shapes of random kinds: LaMa's mixture of boxes and strokes (Suvorov et
    al. 2022), with ellipses added. If no mask of ``TRIES`` has the wanted coverage, the result is a
    box of the mean coverage in the upper left corner.

    Args:
        rng: Source of randomness; the mask depends on its state alone.
        height: Rows of the mask, in pixels.
        width: Columns of the mask, in pixels.
        coverage: Least and largest share of the image, both in (0, 1).

    Returns:
        float32 [H, W] of 0 (keep) and 1 (repaint).

    Example:
        >>> mask = random_mask(np.random.default_rng(0), 64, 64, (0.1, 0.5))
        >>> mask.shape, mask.dtype
        ((64, 64), dtype('float32'))

    """
    # Rejection sampling: the coverage of overlapping shapes is hard to know before they are drawn.
    for _ in range(TRIES):
        image = Image.new("L", (width, height))
        for _ in range(rng.integers(1, MAX_SHAPES + 1)):
            draw_shape(ImageDraw.Draw(image), rng, height, width)
        mask_HW = (np.asarray(image) > 0).astype(np.float32)
        if coverage[0] <= mask_HW.mean() <= coverage[1]:
            return mask_HW

    # A range that is too narrow, or too wide a coverage, must not stop a training.
    side = (sum(coverage) / 2) ** 0.5
    box_height = max(1, round(side * height))
    box_width = max(1, round(side * width))
    mask_HW = np.zeros((height, width), np.float32)
    mask_HW[:box_height, :box_width] = 1
    return mask_HW


def draw_shape(
    draw: ImageDraw.ImageDraw, rng: np.random.Generator, height: int, width: int
) -> None:
    """Draw one white shape of random kind, place and size.

    Args:
        draw: Canvas of a PIL image in mode 'L' (8-bit grey).
        rng: Source of randomness.
        height: Height of the canvas, in pixels.
        width: Width of the canvas, in pixels.

    """
    # The order of these draws fixes every mask of a seed: do not change it. A stroke makes no use
    # of the centre, which is drawn all the same.
    size = np.array([width, height])
    centre = rng.random(2)
    kind = rng.integers(3)
    extent = rng.uniform(0.1, 0.6, 2) * size

    # A stroke: two to four points anywhere, joined by a line about as broad as a brush.
    if kind == STROKE:
        points = rng.random((rng.integers(2, 5), 2)) * size
        line_width = max(1, int(extent.min() / 3))
        draw.line([tuple(point) for point in points], fill=255, width=line_width, joint="curve")
        return

    # A rectangle or an ellipse around the centre; it may reach beyond the border.
    corner = centre * size - extent / 2
    box = [*corner, *(corner + extent)]
    if kind == RECTANGLE:
        draw.rectangle(box, fill=255)
    else:
        draw.ellipse(box, fill=255)

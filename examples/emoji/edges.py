"""The lines of a picture: the control images that the example's ControlNet learns to follow.

A plain detector of edges, with numpy and Pillow alone. It is not OpenCV's Canny: a ControlNet that
learned Canny's lines expects those.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageFilter

BLUR = 1.0  # pixels: standard deviation of the Gaussian that the picture is smoothed with
THRESHOLD = 10.0  # of 255 levels, a pixel: a step of 40 levels is found, one of 20 is not


def find_edges(image_HWC: np.ndarray) -> np.ndarray:
    """Find the pixels on which an edge lies.

    The picture is smoothed. At each pixel the colour channel that changes most counts, by its
    central differences. A pixel is on an edge if it changes by more than THRESHOLD, and no less
    than its two neighbours across the edge: so lines are one pixel wide, or two where both change
    equally.

    Args:
        image_HWC: uint8 [H, W, 3].

    Returns:
        bool [H, W].

    """
    smooth = Image.fromarray(image_HWC).filter(ImageFilter.GaussianBlur(BLUR))
    down_HWC, across_HWC = np.gradient(np.asarray(smooth, np.float32), axis=(0, 1))
    size_HWC = np.hypot(down_HWC, across_HWC)
    strongest_HW1 = size_HWC.argmax(axis=2)[..., None]
    size_HW, down_HW, across_HW = (
        np.take_along_axis(values, strongest_HW1, axis=2)[..., 0]
        for values in (size_HWC, down_HWC, across_HWC)
    )

    # The nearest of four directions: 0 across, 1 down and across, 2 down, 3 down and back.
    direction_HW = np.rint(np.arctan2(down_HW, across_HW) / (np.pi / 4)).astype(int) % 4
    height, width = size_HW.shape
    around = np.pad(size_HW, 1)
    largest_HW = np.zeros_like(size_HW, bool)
    for number, (down, across) in enumerate(((0, 1), (1, 1), (1, 0), (1, -1))):
        after = around[1 + down : 1 + down + height, 1 + across : 1 + across + width]
        before = around[1 - down : 1 - down + height, 1 - across : 1 - across + width]
        largest_HW |= (direction_HW == number) & (size_HW >= after) & (size_HW >= before)
    return largest_HW & (size_HW > THRESHOLD)


def control_image(image_HWC: np.ndarray) -> np.ndarray:
    """The edges of a picture as white lines on black, uint8 [H, W, 3]."""
    lines_HW = np.where(find_edges(image_HWC), 255, 0).astype(np.uint8)
    return np.repeat(lines_HW[..., None], 3, axis=2)

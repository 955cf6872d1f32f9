"""Random squares of latents: what is decoded of an image where the whole would not fit in memory.

Student and teacher are cropped alike and decoded alike, so the losses compare what both decoders'
borders did to the same square. The decoder's attention and group norms see the square alone: a
square decoded by itself differs a little from that square of the whole image.

Shape suffixes: B rows, C latent channels, H W latent size, S side of a square in latents.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

CROP_STREAM = 5  # beside those of train/data/examples.py: no two choices share their randomness


def crop_corners(
    seed: int, step: int, rows: Tensor, side: int, size: tuple[int, int]
) -> list[tuple[int, int]]:
    """The top left corner of each row's square, a function of its arguments alone.

    Args:
        seed: The recipe's.
        step: Of the training.
        rows: The examples, int64 [B].
        side: S.
        size: H and W.

    Example:
        >>> crop_corners(0, 7, torch.tensor([3]), side=16, size=(16, 16))
        [(0, 0)]

    """
    height, width = size
    corners = []
    for row in rows.tolist():
        rng = np.random.default_rng((seed, CROP_STREAM, step, row))
        top = int(rng.integers(height - side + 1))
        left = int(rng.integers(width - side + 1))
        corners.append((top, left))
    return corners


def cropped(latents_BCHW: Tensor, corners: list[tuple[int, int]], side: int) -> Tensor:
    """The square of each row, [B, C, S, S]; differentiable. One of the full size is no copy."""
    if latents_BCHW.shape[2:] == (side, side):
        return latents_BCHW
    squares = []
    for latents_CHW, (top, left) in zip(latents_BCHW, corners, strict=True):
        squares.append(latents_CHW[:, top : top + side, left : left + side])
    return torch.stack(squares)

"""An image larger than the engine: where its tiles lie, and one image of them again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hipa_deploy.errors import HipaError


def tiles(height: int, width: int, tile_h: int, tile_w: int, overlap: int) -> list[tuple[int, int]]:
    """(top, left) of the fewest evenly spread tiles that cover the image.

    Neighbours overlap by at least ``overlap`` pixels.

    Raises:
        HipaError: the image is smaller than a tile, or the overlap is not in [0, tile).

    """
    tops = _offsets("height", height, tile_h, overlap)
    lefts = _offsets("width", width, tile_w, overlap)
    return [(top, left) for top in tops for left in lefts]


def _offsets(name: str, size: int, tile: int, overlap: int) -> list[int]:
    if size < tile:
        raise HipaError(
            f"{name} is {size} pixels, a tile {tile}. Expected an image of at least one tile."
        )
    if not 0 <= overlap < tile:
        raise HipaError(
            f"overlap is {overlap} pixels, a tile's {name} {tile}. Expected 0 to {tile - 1}."
        )
    # One gap fewer than tiles: the distance between the first and the last, in steps, rounded up.
    gaps = -(-(size - tile) // (tile - overlap))
    if gaps == 0:
        return [0]
    return [i * (size - tile) // gaps for i in range(gaps + 1)]


def merge_tiles(
    tiles: Sequence[np.ndarray] | np.ndarray,
    offsets: Sequence[tuple[int, int]],
    height: int,
    width: int,
) -> np.ndarray:
    """One image, uint8 [height, width, 3], of uint8 tiles [h, w, 3] at their (top, left).

    A tile weighs by the distance to its border, rows times columns, and the weights are normalised
    to a sum of 1: where two tiles overlap by no more than half of one, the one fades linearly into
    the other.

    Raises:
        HipaError: not one offset for each tile, a tile that lies outside, or pixels that no tile
        covers.

    """
    if len(tiles) != len(offsets):
        raise HipaError(
            f"{len(tiles)} tiles and {len(offsets)} offsets. Expected one offset for each tile."
        )
    total_HW1 = np.zeros((height, width, 1), np.float32)
    merged_HWC = np.zeros((height, width, 3), np.float32)
    for tile_hwC, (top, left) in zip(tiles, offsets, strict=True):
        tile_h, tile_w = tile_hwC.shape[:2]
        if min(top, left) < 0 or top + tile_h > height or left + tile_w > width:
            raise HipaError(
                f"a {tile_h}x{tile_w} tile at {top}, "
                f"{left} does not lie in an image of {height}x{width}."
            )
        weight_hw1 = (_ramp(tile_h)[:, None] * _ramp(tile_w))[..., None]
        place = np.s_[top : top + tile_h, left : left + tile_w]
        total_HW1[place] += weight_hw1
        merged_HWC[place] += weight_hw1 * tile_hwC
    if not total_HW1.all():
        raise HipaError(
            f"the tiles leave {(total_HW1 == 0).sum()} of {height * width} pixels uncovered."
        )
    return np.rint(merged_HWC / total_HW1).astype(np.uint8)


def _ramp(size: int) -> np.ndarray:
    """1, 2, … in from either end, over the half of the size: float32 [size] in (0, 1]."""
    inward = np.arange(1, size + 1, dtype=np.float32)
    return np.minimum(inward, inward[::-1]) / ((size + 1) // 2)

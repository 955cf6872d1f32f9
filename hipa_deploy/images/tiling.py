"""Tiles of an image that is larger than the engine: where they lie, and how they are merged.

Shapes: H, W height and width of the image in pixels; h, w of a tile; C = 3 colour channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hipa_deploy.errors import HipaError

BAND = 256  # rows that are merged at once


def tiles(height: int, width: int, tile_h: int, tile_w: int, overlap: int) -> list[tuple[int, int]]:
    """Return the (top, left) of the fewest evenly spread tiles that cover an image.

    Args:
        height: of the image, in pixels; so is ``width``.
        width: see ``height``.
        tile_h: height of a tile, in pixels; ``tile_w`` is its width.
        tile_w: see ``tile_h``.
        overlap: neighbouring tiles share at least this many pixels.

    Returns:
        The offsets, row by row from the top.

    Raises:
        HipaError: the image is smaller than a tile, or the overlap is not in [0, tile).

    Example:
        >>> tiles(512, 960, 512, 512, 64)
        [(0, 0), (0, 448)]

    """
    tops = _offsets("height", height, tile_h, overlap)
    lefts = _offsets("width", width, tile_w, overlap)
    return [(top, left) for top in tops for left in lefts]


def _offsets(name: str, size: int, tile: int, overlap: int) -> list[int]:
    """Return where tiles start along one axis; ``name`` is the axis in messages."""
    if size < tile:
        raise HipaError(
            f"{name} is {size} pixels, a tile {tile}. Expected an image of at least one tile."
        )
    if not 0 <= overlap < tile:
        raise HipaError(
            f"overlap is {overlap} pixels, a tile's {name} {tile}. Expected 0 to {tile - 1}."
        )
    # The gaps are one fewer than the tiles: the quotient rounded up, since a step between two tiles
    # is at most tile - overlap.
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
    """Merge tiles into one image; where tiles overlap, one fades into the other.

    A tile's weight at a pixel is the distance to the tile's border, along the rows times along the
    columns, and the weights of all tiles are normalised to a sum of 1. Where two tiles overlap by
    no more than half of one, the fade is linear.

    Args:
        tiles: uint8 [h, w, 3] each.
        offsets: (top, left) of every tile in the image.
        height: of the image, in pixels.
        width: of the image, in pixels.

    Returns:
        uint8 [height, width, 3].

    Raises:
        HipaError: there is not one offset for each tile, a tile lies outside the image, or no tile
            covers some pixels.

    """
    if len(tiles) != len(offsets):
        raise HipaError(
            f"{len(tiles)} tiles and {len(offsets)} offsets. Expected one offset for each tile."
        )

    for tile_hwC, (top, left) in zip(tiles, offsets, strict=True):
        tile_h, tile_w = tile_hwC.shape[:2]
        if min(top, left) < 0 or top + tile_h > height or left + tile_w > width:
            raise HipaError(
                f"a {tile_h}x{tile_w} tile at {top}, {left} does not lie in an image of "
                f"{height}x{width}."
            )

    # In bands of rows: the sums take 16 bytes a pixel, 4 GiB of an image of 16,384 pixels a side.
    merged_HWC = np.empty((height, width, 3), np.uint8)
    uncovered = 0
    for first in range(0, height, BAND):
        band = range(first, min(first + BAND, height))
        merged_HWC[first : band.stop], without = _merged_band(tiles, offsets, band, width)
        uncovered += without
    if uncovered:
        raise HipaError(f"the tiles leave {uncovered} of {height * width} pixels uncovered.")
    return merged_HWC


def _merged_band(
    tiles: Sequence[np.ndarray] | np.ndarray,
    offsets: Sequence[tuple[int, int]],
    band: range,
    width: int,
) -> tuple[np.ndarray, int]:
    """The rows ``band`` of the image, uint8 [rows, width, 3], and how many pixels have no tile."""
    # Sums of weights and of weighted pixels: one division at the end normalises them.
    total_HW1 = np.zeros((len(band), width, 1), np.float32)
    merged_HWC = np.zeros((len(band), width, 3), np.float32)
    for tile_hwC, (top, left) in zip(tiles, offsets, strict=True):
        tile_h, tile_w = tile_hwC.shape[:2]
        start = max(top, band.start)
        stop = min(top + tile_h, band.stop)
        if start >= stop:
            continue
        of_tile = slice(start - top, stop - top)
        weight_hw1 = (_ramp(tile_h)[of_tile, None] * _ramp(tile_w))[..., None]
        place = np.s_[start - band.start : stop - band.start, left : left + tile_w]
        total_HW1[place] += weight_hw1
        merged_HWC[place] += weight_hw1 * tile_hwC[of_tile]

    # A tile's weight is above 0 everywhere, so a total of 0 means that no tile lies there.
    uncovered = int((total_HW1 == 0).sum())
    np.maximum(total_HW1, np.finfo(np.float32).tiny, out=total_HW1)
    merged_HWC /= total_HW1
    return np.rint(merged_HWC).astype(np.uint8), uncovered


def _ramp(size: int) -> np.ndarray:
    """Return weights that rise linearly from both ends to the middle, float32 [size] in (0, 1]."""
    inward = np.arange(1, size + 1, dtype=np.float32)
    return np.minimum(inward, inward[::-1]) / ((size + 1) // 2)

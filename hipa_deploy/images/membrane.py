"""Colours of a repainted part that meet the image around it: a membrane over the hole.

The difference between the original and the generated image is known along the edge of the hole.
Inside, it is continued as smoothly as can be (a harmonic function, like a membrane that hangs in a
wire frame), and added to what was generated. So the part keeps its details, and its colours go over
into those around it. Source: Perez, Gangnet and Blake, Poisson image editing (2003); as a membrane
of differences: Farbman et al., Coordinates for instant image cloning (2009), section 2.

Shapes: H, W height and width in pixels; C = 3 colour channels.
"""

from __future__ import annotations

import numpy as np

_SWEEPS = 12  # of each level: what a coarser one has found is smoothed


def meet_edge(
    generated_HWC: np.ndarray, original_HWC: np.ndarray, hole_HW: np.ndarray
) -> np.ndarray:
    """Shift the generated image's colours within a hole, so that they meet the original around it.

    Args:
        generated_HWC: uint8 [H, W, 3].
        original_HWC: uint8 [H, W, 3].
        hole_HW: bool [H, W], true where the generated image will be shown.

    Returns:
        uint8 [H, W, 3]: the generated image, with other colours within the hole alone. Where
        nothing is around the hole, it is as it was.

    Example:
        >>> hole_HW = np.zeros((64, 64), bool)
        >>> hole_HW[16:48, 16:48] = True
        >>> darker_HWC = meet_edge(image_HWC // 2, image_HWC, hole_HW)

    """
    rows = _reach(np.asarray(hole_HW.any(axis=1)))
    columns = _reach(np.asarray(hole_HW.any(axis=0)))
    hole = hole_HW[rows, columns]
    edge = _neighbours(hole) & ~hole
    if not edge.any():
        return generated_HWC
    generated = generated_HWC[rows, columns].astype(np.float32)
    difference = original_HWC[rows, columns] - generated
    shifted = generated + membrane(difference, edge, hole)
    out_HWC = generated_HWC.copy()
    out_HWC[rows, columns][hole] = np.rint(shifted[hole]).clip(0, 255).astype(np.uint8)
    return out_HWC


def membrane(values_HWC: np.ndarray, edge_HW: np.ndarray, hole_HW: np.ndarray) -> np.ndarray:
    """Continue values along an edge into a hole, as smoothly as can be.

    Each level is solved roughly at half its size first, and smoothed at its own.

    Args:
        values_HWC: float32 [H, W, C]; those along the edge count.
        edge_HW: bool [H, W], true where the values are known.
        hole_HW: bool [H, W], true where they are wanted; not where ``edge_HW`` is.

    Returns:
        float32 [H, W, C]: the known values along the edge, and their mean or a continuation of
        them elsewhere.

    """
    known_HW1 = edge_HW[..., None]
    if min(hole_HW.shape) <= 2 or not hole_HW.any():
        mean_C = (values_HWC * known_HW1).sum(axis=(0, 1)) / max(1, edge_HW.sum())
        return np.where(known_HW1, values_HWC, mean_C).astype(np.float32)

    counts_hw = _in_fours(edge_HW.astype(np.float32))
    means_hwC = _in_fours(values_HWC * known_HW1) / np.maximum(counts_hw, 1)[..., None]
    edge_hw = counts_hw > 0
    coarse_hwC = membrane(
        means_hwC, edge_hw, (_in_fours(hole_HW.astype(np.float32)) > 0) & ~edge_hw
    )

    height, width = hole_HW.shape
    found_HWC = coarse_hwC.repeat(2, axis=0).repeat(2, axis=1)[:height, :width]
    found_HWC = np.where(known_HW1, values_HWC, found_HWC)
    return _smoothed(found_HWC, edge_HW | hole_HW, hole_HW)


def _smoothed(values_HWC: np.ndarray, counted_HW: np.ndarray, hole_HW: np.ndarray) -> np.ndarray:
    """Set each value in the hole to the mean of its neighbours that count, several times."""
    counts_HW = np.zeros(hole_HW.shape, np.float32)
    for near, far in _SIDES:
        counts_HW[near] += counted_HW[far]
    share_HW1 = (1 / np.maximum(counts_HW, 1))[..., None]
    counted_HW1 = counted_HW[..., None]
    hole_HW1 = hole_HW[..., None]
    for _ in range(_SWEEPS):
        counted_HWC = values_HWC * counted_HW1
        sums_HWC = np.zeros_like(counted_HWC)
        for near, far in _SIDES:
            sums_HWC[near] += counted_HWC[far]
        values_HWC = np.where(hole_HW1, sums_HWC * share_HW1, values_HWC)
    return values_HWC


# Where a pixel has a neighbour, and where that neighbour is: above, below, left and right.
_SIDES = (
    (np.s_[1:], np.s_[:-1]),
    (np.s_[:-1], np.s_[1:]),
    (np.s_[:, 1:], np.s_[:, :-1]),
    (np.s_[:, :-1], np.s_[:, 1:]),
)


def _neighbours(inside_HW: np.ndarray) -> np.ndarray:
    """True where a pixel above, below, left or right is inside."""
    found_HW = np.zeros_like(inside_HW)
    for near, far in _SIDES:
        found_HW[near] |= inside_HW[far]
    return found_HW


def _in_fours(values_HW: np.ndarray) -> np.ndarray:
    """The sums of each two by two pixels; what lies beyond the last row or column is zero."""
    height, width = values_HW.shape[:2]
    beyond = [(0, height % 2), (0, width % 2)] + [(0, 0)] * (values_HW.ndim - 2)
    padded = np.pad(values_HW, beyond)
    shape = (padded.shape[0] // 2, 2, padded.shape[1] // 2, 2, *values_HW.shape[2:])
    return padded.reshape(shape).sum(axis=(1, 3))


def _reach(has_hole: np.ndarray) -> slice:
    """The rows or columns of a hole, and one more on each side."""
    places = np.flatnonzero(has_hole)
    if not places.size:
        return slice(0, 0)
    return slice(max(0, places[0] - 1), places[-1] + 2)

"""What of an image is repainted: the mask on the latent grid, the hidden hole, the seam, checks."""

from __future__ import annotations

import numpy as np

from hipa_deploy.errors import HipaError

MID_GREY = 127


def check_mask(mask_HW: np.ndarray, image_HWC: np.ndarray) -> None:
    """Refuse a mask of another size, one that repaints nothing, and one that keeps nothing.

    A full mask is refused too: mostly it is an inverted or a wrong one, and generating is what it
    would ask for.

    Raises:
        HipaError: as said; sizes are height x width.

    """
    if mask_HW.shape != image_HWC.shape[:2]:
        got = "x".join(map(str, mask_HW.shape))
        expected = "x".join(map(str, image_HWC.shape[:2]))
        raise HipaError(
            f"mask is {got} pixels, image {expected} (height x width). "
            "Expected a mask of the image's size."
        )
    if not mask_HW.any():
        raise HipaError(
            "mask is empty: no pixel is white. Expected white where the image is to be repainted."
        )
    if mask_HW.all():
        raise HipaError(
            "mask is full: every pixel is white, nothing would be kept. "
            "Expected black where to keep."
        )


def latent_mask(mask_HW: np.ndarray, factor: int) -> np.ndarray:
    """The mask on the latent grid, float32 [1, H / factor, W / factor].

    A cell is 1 if any of its pixels is repainted.

    Raises:
        HipaError: height or width is no multiple of ``factor``.

    """
    height, width = mask_HW.shape
    if height % factor or width % factor:
        raise HipaError(
            f"mask is {height}x{width} pixels. "
            f"Expected multiples of {factor}; fit it to the size first."
        )
    cells_1hfwf = (mask_HW > 0).reshape(1, height // factor, factor, width // factor, factor)
    return np.asarray(cells_1hfwf.any(axis=(2, 4)), np.float32)


def hide_hole(image_HWC: np.ndarray, mask_HW: np.ndarray) -> np.ndarray:
    """A copy, uint8 [H, W, 3], with mid-grey where it is to be repainted.

    So no encoder sees what was there.
    """
    return np.where(mask_HW[..., None] > 0, np.uint8(MID_GREY), image_HWC)


def composite(
    generated_HWC: np.ndarray, original_HWC: np.ndarray, mask_HW: np.ndarray, feather: int
) -> np.ndarray:
    """Generated inside the mask, original outside, uint8 [H, W, 3].

    Over ``feather`` pixels outside the mask the generated image fades out linearly with the
    distance to the mask (Euclidean, between pixel centres). Farther away the original is bit-exact,
    as the generated one is inside; ``feather`` 0 is a hard edge.

    Raises:
        HipaError: images or mask of different sizes, or a negative ``feather``.

    """
    if not generated_HWC.shape[:2] == original_HWC.shape[:2] == mask_HW.shape:
        shapes = [generated_HWC.shape, original_HWC.shape, mask_HW.shape]
        raise HipaError(
            f"generated image, original and mask have shapes {shapes}. "
            "Expected one height and width."
        )
    if feather < 0:
        raise HipaError(f"feather is {feather}. Expected 0 (a hard edge) or more pixels.")

    # Weights of exactly 1 and 0 keep either image bit for bit, so no other branch is needed.
    weight_HW1 = seam_weight(mask_HW, feather)[..., None]
    blended = weight_HW1 * generated_HWC + (1 - weight_HW1) * original_HWC
    return np.rint(blended).astype(np.uint8)


def seam_weight(mask_HW: np.ndarray, feather: int) -> np.ndarray:
    """Share of the generated image, float32 [H, W].

    It is 1 inside the mask, 1 - d / (feather + 1) at d pixels from it, and 0 beyond ``feather``.
    """
    distance_HW = np.sqrt(_squared_distance(mask_HW > 0, feather))
    return np.where(distance_HW <= feather, 1 - distance_HW / (feather + 1), 0).astype(np.float32)


def _squared_distance(inside_HW: np.ndarray, reach: int) -> np.ndarray:
    """Squared distance to the nearest pixel inside, float32 [H, W].

    It is exact up to ``reach`` pixels and infinite beyond.

    The square separates: first along columns, then along rows (Felzenszwalb & Huttenlocher 2012,
    section 3).
    """
    squared_HW = np.where(inside_HW, np.float32(0), np.float32(np.inf))
    for axis in (0, 1):
        nearest_HW = squared_HW.copy()
        for shift in range(1, min(reach, squared_HW.shape[axis] - 1) + 1):
            here, there = _shifted(axis, shift)
            step = np.float32(shift * shift)
            for a, b in ((here, there), (there, here)):
                np.minimum(nearest_HW[a], squared_HW[b] + step, out=nearest_HW[a])
        squared_HW = nearest_HW
    return squared_HW


def _shifted(axis: int, shift: int) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Two views of [H, W] that lie ``shift`` apart along ``axis``."""
    first = slice(None, -shift)
    last = slice(shift, None)
    whole = slice(None)
    if axis == 0:
        return (first, whole), (last, whole)
    return (whole, first), (whole, last)

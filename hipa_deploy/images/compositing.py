"""Inpainting masks: checks, the mask on the latent grid, the hidden hole and the blended seam.

Shapes: H, W height and width of the image in pixels; h, w of the latent; C = 3 colour channels.
A mask is float32 [H, W], 1 where the image is repainted and 0 where it is kept.
"""

from __future__ import annotations

import numpy as np

from hipa_deploy.errors import HipaError, RequestError
from hipa_deploy.images.membrane import meet_edge

MID_GREY = 127


def check_mask(mask_HW: np.ndarray, image_HWC: np.ndarray) -> None:
    """Check that a mask has the image's size, repaints some pixels and keeps some.

    A full mask is refused too: it is mostly an inverted or a wrong one. Who wants to repaint every
    pixel wants to generate an image.

    Raises:
        HipaError: the mask has another size, is empty or is full.

    """
    image_shape = image_HWC.shape[:2]
    if mask_HW.shape != image_shape:
        got = "x".join(map(str, mask_HW.shape))
        expected = "x".join(map(str, image_shape))
        raise RequestError(
            f"mask is {got} pixels, image {expected} (height x width). "
            "Expected a mask of the image's size.",
            argument="mask",
            code="invalid_mask",
        )
    if not mask_HW.any():
        raise RequestError(
            "mask is empty: no pixel is white. Expected white where the image is to be repainted.",
            argument="mask",
            code="invalid_mask",
        )
    if mask_HW.all():
        raise RequestError(
            "mask is full: every pixel is white, nothing would be kept. "
            "Expected black where the image is to be kept.",
            argument="mask",
            code="invalid_mask",
        )


def latent_mask(mask_HW: np.ndarray, factor: int) -> np.ndarray:
    """Return the mask on the latent grid: 1 where any pixel of a cell is repainted.

    Args:
        mask_HW: the mask in pixels, [H, W].
        factor: pixels per latent, along either axis.

    Returns:
        float32 [1, H / factor, W / factor].

    Raises:
        HipaError: height or width is not a multiple of ``factor``.

    Example:
        >>> latent_mask(np.ones((512, 768), np.float32), 8).shape
        (1, 64, 96)

    """
    height, width = mask_HW.shape
    if height % factor or width % factor:
        raise HipaError(
            f"mask is {height}x{width} pixels. "
            f"Expected multiples of {factor}; fit the mask to the image's size first."
        )
    cells_1hfwf = (mask_HW > 0).reshape(1, height // factor, factor, width // factor, factor)
    return np.asarray(cells_1hfwf.any(axis=(2, 4)), np.float32)


def hide_hole(image_HWC: np.ndarray, mask_HW: np.ndarray) -> np.ndarray:
    """Return a copy, uint8 [H, W, 3], with mid-grey in place of the pixels to repaint.

    The encoder then sees nothing of what was there.
    """
    return np.where(mask_HW[..., None] > 0, np.uint8(MID_GREY), image_HWC)


def composite(
    generated_HWC: np.ndarray,
    original_HWC: np.ndarray,
    mask_HW: np.ndarray,
    feather: int,
    *,
    match: bool = False,
) -> np.ndarray:
    """Put the generated image inside the mask and the original outside, with a soft seam.

    Over ``feather`` pixels outside the mask the generated image fades out linearly with the
    distance to the mask (Euclidean, between pixel centres). Farther away the original is
    bit-exact, and without ``match`` the generated image is so inside the mask.

    Args:
        generated_HWC: uint8 [H, W, 3].
        original_HWC: uint8 [H, W, 3].
        mask_HW: [H, W], above 0 where the image is repainted.
        feather: width of the seam in pixels; 0 is a hard edge.
        match: shift the colours of the generated image, so that they meet the original's where
            the seam ends (``hipa_deploy.images.membrane``).

    Returns:
        uint8 [H, W, 3].

    Raises:
        HipaError: the images and the mask differ in size, or ``feather`` is negative.

    """
    if not generated_HWC.shape[:2] == original_HWC.shape[:2] == mask_HW.shape:
        shapes = [generated_HWC.shape, original_HWC.shape, mask_HW.shape]
        raise HipaError(
            f"generated image, original and mask have shapes {shapes}. "
            "Expected one height and width."
        )
    if feather < 0:
        raise HipaError(f"feather is {feather}. Expected 0 (a hard edge) or more pixels.")

    weight_HW1 = seam_weight(mask_HW, feather)[..., None]
    if match:
        generated_HWC = meet_edge(generated_HWC, original_HWC, weight_HW1[..., 0] > 0)
    blended_HWC = weight_HW1 * generated_HWC + (1 - weight_HW1) * original_HWC
    return np.rint(blended_HWC).astype(np.uint8)


def seam_weight(mask_HW: np.ndarray, feather: int) -> np.ndarray:
    """Return the share of the generated image at every pixel, float32 [H, W].

    The share is 1 inside the mask, 1 - d / (feather + 1) at a distance of d pixels, and 0 beyond
    ``feather``.
    """
    distance_HW = np.sqrt(_squared_distance(mask_HW > 0, feather))
    return np.where(distance_HW <= feather, 1 - distance_HW / (feather + 1), 0).astype(np.float32)


def _squared_distance(inside_HW: np.ndarray, reach: int) -> np.ndarray:
    """Return the squared distance to the nearest pixel inside, float32 [H, W].

    The distance is exact up to ``reach`` pixels and infinite beyond.
    """
    squared_HW = np.where(inside_HW, np.float32(0), np.float32(np.inf))

    # The square of the Euclidean distance separates, so one pass along the columns and one along
    # the rows give it exactly (Felzenszwalb & Huttenlocher 2012, section 3).
    for axis in (0, 1):
        nearest_HW = squared_HW.copy()
        farthest = min(reach, squared_HW.shape[axis] - 1)
        for shift in range(1, farthest + 1):
            step = np.float32(shift * shift)
            first, last = _shifted(axis, shift)
            # A pixel may be nearest to one before it or to one after it.
            for here, there in ((first, last), (last, first)):
                np.minimum(nearest_HW[here], squared_HW[there] + step, out=nearest_HW[here])
        squared_HW = nearest_HW
    return squared_HW


def _shifted(axis: int, shift: int) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Return the indices of two views of [H, W] that lie ``shift`` apart along ``axis``."""
    first = slice(None, -shift)
    last = slice(shift, None)
    whole = slice(None)
    if axis == 0:
        return (first, whole), (last, whole)
    return (whole, first), (whole, last)

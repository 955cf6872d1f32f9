"""An invisible watermark of 32 bits: its pattern, and how it is added to an image.

A spread-spectrum watermark (Cox et al., 'Secure spread spectrum watermarking for multimedia', 1997)
in a tile of 140 x 140 pixels that is repeated over the image, as Kutter and Honsinger did to
withstand crops and scaling. The tile is a sum of waves of 6.4 to 25 pixels, which JPEG and a
rescale to half the size keep. 432 of the waves carry the coded payload, four for each bit; the
others are the same in every image, and tell a reader where the tile lies and how large it has
become. The image's local activity decides the strength: little in a clear sky, more in grass.

The pattern is public. Whoever has this source can read a watermark, remove it or forge it: it
survives everyday handling, and is no proof against an opponent. docs/explanation/measured.md has
its error rates.

Shapes: B batch; H, W height and width in pixels; K waves; T = 140 the tile's side.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from hipa_deploy.errors import HipaError, RequestError, whole_number
from hipa_deploy.marks.payload_code import CODED_BITS, encode_payload

# Pixels. Pictures repeat themselves in steps of 8 (JPEG's blocks), 64 or 128 (sheets and tiles);
# the waves of such a pattern lie between those of a tile of 140.
TILE = 140
LEAST_SIDE = 256  # pixels
REPEATS = 4  # waves for each coded bit
MAX_PAYLOAD = 2**32
_CYCLES = (5.5, 22.0)  # of a wave in a tile, the least and the most
_SEED = b"hipa watermark 1"

# Grey levels that the pattern has as its standard deviation.
_LEAST_STRENGTH = 0.8
_MOST_STRENGTH = 3.6
_STRENGTH_OF_ACTIVITY = 0.11  # for each grey level of local standard deviation
_ACTIVITY_RADIUS = 4  # pixels
_REACH = 2 * _ACTIVITY_RADIUS  # rows around a pixel that its strength depends on: two means
_BAND = 4 * TILE  # rows that are marked at once
_LUMA = (0.299, 0.587, 0.114)  # of R, G, B: ITU-R BT.601, as JPEG has it


class Waves(NamedTuple):
    """The waves of the tile; the first ``REPEATS * CODED_BITS`` carry the payload.

    Attributes:
        cycles_K2: in a tile, down and across, int.
        phases_K: complex, of absolute value 1.

    """

    cycles_K2: np.ndarray
    phases_K: np.ndarray


@lru_cache(maxsize=1)
def waves() -> Waves:
    """The waves, in an order and with phases that SHA-256 draws: the same on every machine."""
    least, most = _CYCLES
    cycles = []
    for down in range(-int(most), int(most) + 1):
        for across in range(int(most) + 1):
            # A wave and its opposite are one; half the plane has all.
            in_half_plane = across > 0 or down > 0
            if in_half_plane and least <= np.hypot(down, across) <= most:
                cycles.append((down, across))

    drawn = []
    for down, across in cycles:
        drawn.append(hashlib.sha256(_SEED + b" %d %d" % (down, across)).digest())
    order = sorted(range(len(cycles)), key=lambda i: drawn[i])
    quarters = np.asarray([drawn[i][-1] % 4 for i in order])
    return Waves(np.asarray(cycles)[order], np.exp(0.5j * np.pi * quarters))


def check_side(height: int, width: int, argument: str | None = None) -> None:
    """Check that an image is large enough to carry a watermark.

    Args:
        height: in pixels.
        width: in pixels.
        argument: that the size comes from; None: the size itself is asked for.

    Raises:
        RequestError: a side is under ``LEAST_SIDE`` pixels.

    """
    if min(height, width) < LEAST_SIDE:
        short = "height" if height < LEAST_SIDE else "width"
        problem = f"an image of {width}x{height} pixels is too small for the watermark, which needs"
        raise RequestError(
            f"{problem} {LEAST_SIDE} each way. Leave the watermark out, or make a larger image.",
            argument=argument or short,
            code="image_too_small",
            told=f"{problem} {LEAST_SIDE} each way. Ask for a larger image.",
            owner="export it without a watermark",
        )


def check_payload(payload: int) -> None:
    """Raise HipaError unless ``payload`` has 32 bits."""
    if not 0 <= payload < MAX_PAYLOAD:
        raise HipaError(
            f"the watermark's number is {payload:#x}. Expected at most 8 hexadecimal digits."
        )


def add_watermark(image_HWC: np.ndarray, payload: int, strength: float = 1.0) -> np.ndarray:
    """Add a watermark to an image.

    Args:
        image_HWC: uint8 [H, W, 3], of at least ``LEAST_SIDE`` pixels each way.
        payload: what it says, in [0, 2**32).
        strength: 1 is the usual one.

    Returns:
        uint8 [H, W, 3]; equal arguments give equal pixels.

    Raises:
        HipaError: the image is too small, or the payload too large.

    Example:
        >>> marked_HWC = add_watermark(image_HWC, 0xC0FFEE)
        >>> read_watermark(marked_HWC).payload == 0xC0FFEE
        True

    """
    height, width = image_HWC.shape[:2]
    check_side(height, width)
    payload = whole_number(payload, "payload")
    check_payload(payload)

    # In bands of whole tiles: all of it at once would take 88 bytes a pixel.
    marked_HWC = np.empty_like(image_HWC)
    for first in range(0, height, _BAND):
        last = min(first + _BAND, height)
        marked_HWC[first:last] = _marked_rows(image_HWC, first, last, payload, strength)
    return marked_HWC


def _marked_rows(
    image_HWC: np.ndarray, first: int, last: int, payload: int, strength: float
) -> np.ndarray:
    """The rows from ``first`` to ``last`` with the watermark; ``first`` is where a tile begins."""
    # The strength depends on the rows around as well.
    start = max(first - _REACH, 0)
    around_HWC = image_HWC[start : last + _REACH]
    strength_HW = strength * _strength(luma(around_HWC))[first - start : last - start]
    height, width = strength_HW.shape
    repeats = (-(-height // TILE), -(-width // TILE))
    pattern_HW = strength_HW * np.tile(_tile(payload), repeats)[:height, :width]

    # One change for all channels: it is in the luma, which JPEG keeps best.
    marked_HWC = np.rint(image_HWC[first:last] + pattern_HW[..., None])
    return np.clip(marked_HWC, 0, 255).astype(np.uint8)


def luma(image_HWC: np.ndarray) -> np.ndarray:
    """The luma of an image, float64 [H, W], 0 to 255."""
    return image_HWC.astype(np.float64) @ np.asarray(_LUMA)


def box_mean(values_HW: np.ndarray, radius: int) -> np.ndarray:
    """The mean over a square of ``2 * radius + 1`` pixels around each pixel."""
    for axis in (0, 1):
        size = values_HW.shape[axis]
        margins = [(0, 0), (0, 0)]
        margins[axis] = (radius + 1, radius)
        sums = np.pad(values_HW, margins, mode="edge").cumsum(axis)
        upper = np.take(sums, range(2 * radius + 1, 2 * radius + 1 + size), axis)
        lower = np.take(sums, range(size), axis)
        values_HW = (upper - lower) / (2 * radius + 1)
    return values_HW


def _strength(luma_HW: np.ndarray) -> np.ndarray:
    """How strong the pattern is at each pixel, in grey levels."""
    mean_HW = box_mean(luma_HW, _ACTIVITY_RADIUS)
    variance_HW = box_mean(luma_HW**2, _ACTIVITY_RADIUS) - mean_HW**2
    activity_HW = np.sqrt(np.maximum(variance_HW, 0))
    wanted_HW = _LEAST_STRENGTH + _STRENGTH_OF_ACTIVITY * activity_HW
    # Smooth, so that the strength has no edges of its own.
    return box_mean(np.minimum(wanted_HW, _MOST_STRENGTH), _ACTIVITY_RADIUS)


@lru_cache(maxsize=16)
def _tile(payload: int) -> np.ndarray:
    """The tile of a payload, float64 [T, T], of mean 0 and standard deviation 1."""
    cycles_K2, phases_K = waves()
    signs_K = np.ones(len(phases_K))
    signs_K[: REPEATS * CODED_BITS] = np.tile(encode_payload(payload), REPEATS)
    spectrum_TT = np.zeros((TILE, TILE), complex)
    down, across = cycles_K2.T
    spectrum_TT[down % TILE, across % TILE] = signs_K * phases_K
    spectrum_TT[-down % TILE, -across % TILE] = (signs_K * phases_K).conj()
    tile_TT = np.fft.ifft2(spectrum_TT).real
    return tile_TT / tile_TT.std()

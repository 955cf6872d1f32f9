"""Find the watermark of ``hipa_deploy.marks.watermark`` in an image, and read it.

The image may have been compressed, scaled to 0.4 to 2.2 times its size and cropped. It may not have
been rotated or mirrored.

The repeated tile has its energy at multiples of one frequency. For each scale that is tried, the
image's spectrum is read at those frequencies. The waves that are the same in every image are
correlated with what they should be, for every place of the tile at once: that is one inverse FFT.
The best scale and place give the soft value of each coded bit.

Shapes: H, W height and width in pixels; P side of the padded spectrum; K waves; T tile.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np

from hipa_deploy.errors import HipaWarning
from hipa_deploy.marks.payload_code import CODED_BITS, decode_payload
from hipa_deploy.marks.watermark import REPEATS, TILE, add_watermark, box_mean, luma, waves

LEAST_SCORE = 7.0
"""Of the synchronisation; docs/explanation/measured.md has the scores of images without a mark."""
LEAST_READ_SIDE = 96  # pixels; a watermarked image of 256 pixels, cropped and scaled
SCALES = (0.4, 2.2)
_MAX_SIDE = 1024  # pixels of the middle of an image that are looked at
_GOOD_SCORE = 8.9  # of a new mark: what handling takes away leaves enough
_STRENGTHS = (1.0, 1.5, 2.2)
_SURE_SCORE = 12.0  # at which no other scale is tried
_USUAL_SCALES = (1.0, 0.5, 0.75, 2.0)
_BACKGROUND_RADIUS = 12  # pixels
_ACTIVITY_RADIUS = 8  # pixels
_ACTIVITY_FLOOR = 3.0  # grey levels
_TAPER = 16  # pixels
_WHITENING_RADIUS = 10  # bins of the padded spectrum
_MOST = 2.0  # magnitude of a whitened bin, whose mean square is 1
_HIGHEST = 22 / TILE  # cycles a pixel, of the shortest wave
_DATA = REPEATS * CODED_BITS


@dataclass(frozen=True)
class FoundWatermark:
    """What was found.

    Attributes:
        payload: the watermark's number; None where there is no watermark, or it cannot be read.
        score: how well the known waves fit, in standard deviations of noise. Images without a
            watermark have about 5, as the best of many tries.
        scale: (down, across), the image's size relative to the one that was marked.
        soft: the soft value of each coded bit, float64 [CODED_BITS].

    """

    payload: int | None
    score: float
    scale: tuple[float, float]
    soft: np.ndarray


@dataclass(frozen=True)
class _Spectrum:
    """The whitened spectrum of an image, with its origin in the image's middle.

    Attributes:
        values: complex [P, P / 2 + 1].
        side: P.
        step: by which factor two scales may differ before the waves lose each other.

    """

    values: np.ndarray
    side: int
    step: float

    def at(self, cycles_K2: np.ndarray, scale: tuple[float, float]) -> np.ndarray:
        """The values at the waves' frequencies, complex [K], interpolated."""
        down = cycles_K2[:, 0] / (TILE * scale[0]) * self.side
        across = cycles_K2[:, 1] / (TILE * scale[1]) * self.side
        row = np.floor(down).astype(int)
        column = np.minimum(np.floor(across).astype(int), self.side // 2 - 1)
        v = down - row
        u = across - column
        upper = self.values[row % self.side, column] * (1 - u)
        upper = upper + self.values[row % self.side, column + 1] * u
        lower = self.values[(row + 1) % self.side, column] * (1 - u)
        lower = lower + self.values[(row + 1) % self.side, column + 1] * u
        return upper * (1 - v) + lower * v


@dataclass(frozen=True)
class _Fit:
    score: float
    scale: tuple[float, float]
    place: tuple[int, int]


def read_watermark(image_HWC: np.ndarray) -> FoundWatermark:
    """Look for a watermark.

    Args:
        image_HWC: uint8 [H, W, 3].

    Example:
        >>> read_watermark(image_HWC).payload is None
        True

    """
    if min(image_HWC.shape[:2]) < LEAST_READ_SIDE:
        return FoundWatermark(None, 0.0, (1.0, 1.0), np.zeros(CODED_BITS))
    spectrum = _spectrum(_middle(image_HWC))
    fit = _best_fit(spectrum)
    soft = _soft_bits(spectrum, fit)
    payload = decode_payload(soft) if fit.score >= LEAST_SCORE else None
    return FoundWatermark(payload, fit.score, fit.scale, soft)


def mark_readably(image_HWC: np.ndarray, payload: int) -> np.ndarray:
    """Add a watermark, as strong as it must be to be read again.

    Few images need more than the usual strength: those that are full of hard detail everywhere.

    Args:
        image_HWC: uint8 [H, W, 3].
        payload: in [0, 2**32).

    Returns:
        uint8 [H, W, 3].

    Raises:
        HipaError: as ``add_watermark``.

    Warns:
        HipaWarning: the watermark cannot be read even at the greatest strength.

    """
    for strength in _STRENGTHS:
        marked_HWC = add_watermark(image_HWC, payload, strength)
        spectrum = _spectrum(_middle(marked_HWC))
        fit = _fit(spectrum, (1.0, 1.0))
        is_read = decode_payload(_soft_bits(spectrum, fit)) == payload
        if is_read and fit.score >= _GOOD_SCORE:
            return marked_HWC
    if not is_read or fit.score < LEAST_SCORE:
        warnings.warn(
            "an image is so full of detail that its watermark cannot be read.",
            HipaWarning,
            stacklevel=2,
        )
    return marked_HWC


def _middle(image_HWC: np.ndarray) -> np.ndarray:
    """The middle of a large image: what lies around it would take time and add little."""
    height, width = image_HWC.shape[:2]
    top = max(0, (height - _MAX_SIDE) // 2)
    left = max(0, (width - _MAX_SIDE) // 2)
    return image_HWC[top : top + _MAX_SIDE, left : left + _MAX_SIDE]


def _spectrum(image_HWC: np.ndarray) -> _Spectrum:
    """Take away what is the picture's own as far as possible, and transform the rest."""
    luma_HW = luma(image_HWC)
    height, width = luma_HW.shape
    detail_HW = luma_HW - box_mean(luma_HW, _BACKGROUND_RADIUS)
    # A place full of detail says little about the watermark, so it counts less.
    activity_HW = np.sqrt(box_mean(detail_HW**2, _ACTIVITY_RADIUS))
    detail_HW = detail_HW / (activity_HW + _ACTIVITY_FLOOR)
    detail_HW = detail_HW * _taper(height)[:, None] * _taper(width)

    side = 1 << (2 * max(height, width) - 1).bit_length()
    padded = np.zeros((side, side), np.float32)
    padded[:height, :width] = detail_HW
    # From the middle the phase turns slowly from bin to bin, as the interpolation needs it.
    padded = np.roll(padded, (-(height // 2), -(width // 2)), (0, 1))
    values = np.fft.rfft2(padded)

    # A bin is measured by the mean of those around it, over the edges of the half spectrum too.
    radius = _WHITENING_RADIUS
    power = np.abs(values) ** 2
    power = np.concatenate([power[:, radius:0:-1], power], axis=1)
    power = np.pad(power, ((radius, radius), (0, 0)), mode="wrap")
    mean_power = box_mean(power, radius)[radius:-radius, radius:]
    whitened = values / (np.sqrt(np.maximum(mean_power, 0)) + 1e-9)
    # A picture that repeats itself has a few huge bins; no single one shall decide.
    whitened = whitened * np.minimum(1, _MOST / (np.abs(whitened) + 1e-9))
    step = 0.25 / (_HIGHEST * max(height, width))
    return _Spectrum(whitened, side, step)


def _taper(size: int) -> np.ndarray:
    """A window that falls off at both ends, float64 [size]."""
    distance = np.minimum(np.arange(size), np.arange(size)[::-1]) + 0.5
    return np.minimum(1, distance / _TAPER)


def _best_fit(spectrum: _Spectrum) -> _Fit:
    """The scale and the place at which the known waves fit best."""
    best = max((_fit(spectrum, (s, s)) for s in _USUAL_SCALES), key=lambda fit: fit.score)
    if best.score < _SURE_SCORE:
        count = int(np.ceil(np.log(SCALES[1] / SCALES[0]) / spectrum.step))
        for scale in SCALES[0] * np.exp(np.arange(count) * spectrum.step):
            fit = _fit(spectrum, (float(scale), float(scale)))
            if fit.score > best.score:
                best = fit

    # Sides are whole pixels, so a scale down is seldom the one across.
    middle = best.scale
    for down in (-0.5, 0.0, 0.5):
        for across in (-0.5, 0.0, 0.5):
            near = (
                middle[0] * (1 + down * spectrum.step),
                middle[1] * (1 + across * spectrum.step),
            )
            fit = _fit(spectrum, near)
            if fit.score > best.score:
                best = fit
    return best


def _fit(spectrum: _Spectrum, scale: tuple[float, float]) -> _Fit:
    """How well the known waves fit at one scale, at the best place of the tile."""
    cycles_K2, phases_K = waves()
    cycles_K2 = cycles_K2[_DATA:]
    values_K = spectrum.at(cycles_K2, scale) * phases_K[_DATA:].conj()
    down, across = cycles_K2.T
    half = np.zeros((TILE, TILE // 2 + 1), complex)
    half[down % TILE, across] = values_K
    on_axis = across == 0
    half[-down[on_axis] % TILE, 0] = values_K[on_axis].conj()
    correlation_TT = np.fft.irfft2(half, (TILE, TILE)) * TILE**2
    row, column = np.unravel_index(correlation_TT.argmax(), correlation_TT.shape)
    deviation = np.sqrt(2 * np.sum(np.abs(values_K) ** 2)) + 1e-9
    score = float(correlation_TT[row, column] / deviation)
    return _Fit(score, scale, (int(row), int(column)))


def _soft_bits(spectrum: _Spectrum, fit: _Fit) -> np.ndarray:
    """The soft value of each coded bit, its waves added up."""
    cycles_K2, phases_K = waves()
    turns_K = cycles_K2 @ np.asarray(fit.place) / TILE
    values_K = spectrum.at(cycles_K2, fit.scale) * phases_K.conj() * np.exp(2j * np.pi * turns_K)
    return values_K.real[:_DATA].reshape(REPEATS, CODED_BITS).sum(axis=0)

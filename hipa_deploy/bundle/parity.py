"""The gate: how near a stage's output is to PyTorch's, and whether that is near enough.

An export and a device's self-check share it. The reference is always PyTorch in float32.
"""

from __future__ import annotations

import numpy as np

from hipa_deploy.bundle.manifest import Parity, Precision

# Lowest PSNR that passes, in dB. For FP16 it is where apple/ml-stable-diffusion draws its line
# (torch2coreml.py, ABSOLUTE_MIN_PSNR). In FP32 the same arithmetic in another order stays above 60.
MIN_PSNR_DB: dict[Precision, float] = {"fp16": 35.0, "fp32": 60.0}
# An output can be near in PSNR and still be blurred or noisy, so its fine detail is compared too.
HIGH_FREQUENCY_RATIO = (0.8, 1.25)
BEST_PSNR_DB = 200.0  # stands for no error at all


def compare(got: np.ndarray, expected: np.ndarray) -> Parity:
    """Errors of ``got`` against ``expected``, of the same shape.

    PSNR is 10 log10(peak^2 / mse), with peak the range of ``expected``; 255 for uint8.

    Example:
        >>> compare(image_BHWC, image_BHWC).psnr_db
        200.0

    """
    # In float64, so that the errors measured are the tensors' own.
    a = got.astype(np.float64).ravel()
    b = expected.astype(np.float64).ravel()
    error = np.abs(a - b)
    mse = float(np.mean(error**2))
    peak = 255.0 if expected.dtype == np.uint8 else float(np.ptp(b))

    # Two tensors of zeros have no direction; they agree, and a zero with anything else does not.
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    cosine = float(a @ b) / norms if norms else float(np.array_equal(a, b))
    has_rows_and_columns = expected.ndim == 4
    return Parity(
        max_abs=float(error.max()),
        mean_abs=float(error.mean()),
        cosine=cosine,
        psnr_db=psnr_db(mse, peak),
        high_frequency_ratio=_high_frequency_ratio(got, expected) if has_rows_and_columns else None,
    )


def _high_frequency_ratio(got: np.ndarray, expected: np.ndarray) -> float | None:
    """Energy of the Laplacian of ``got`` over that of ``expected``; None where that has none."""
    ours = _laplacian_energy(got)
    theirs = _laplacian_energy(expected)
    return ours / theirs if theirs else None


def _laplacian_energy(image: np.ndarray) -> float:
    """Mean square of the 4-neighbour Laplacian of [B, C, H, W], or of uint8 [B, H, W, 3]."""
    if image.dtype == np.uint8:
        image = image.transpose(0, 3, 1, 2)
    x_BCHW = image.astype(np.float64)
    rows = x_BCHW[:, :, :, 1:-1]
    columns = x_BCHW[:, :, 1:-1]
    laplacian = (
        4 * rows[:, :, 1:-1]
        - rows[:, :, :-2]
        - rows[:, :, 2:]
        - columns[:, :, :, :-2]
        - columns[:, :, :, 2:]
    )
    return float(np.square(laplacian).mean())


def psnr_db(mse: float, peak: float) -> float:
    """Peak signal-to-noise ratio in dB: 10 log10(peak^2 / mse), at most 200.

    A constant that is missed has no range to measure by, and gives 0.
    """
    if mse == 0:
        return BEST_PSNR_DB
    if peak == 0:
        return 0.0
    return min(BEST_PSNR_DB, 10 * float(np.log10(peak**2 / mse)))


def problem(got: np.ndarray, expected: np.ndarray, precision: Precision) -> str | None:
    """What is wrong with ``got``, in a few words; None if it passes the gate.

    Example:
        >>> problem(np.full((1, 4, 8, 8), np.nan, np.float32), latents_BCHW, "fp16")
        'gives NaN or infinity'

    """
    if not np.isfinite(got.astype(np.float32)).all():
        return "gives NaN or infinity"
    # Not by the standard deviation, whose sum overflows in float16.
    if got.min() == got.max() and expected.min() < expected.max():
        return "gives a flat output"

    found = compare(got, expected)
    least = MIN_PSNR_DB[precision]
    if found.psnr_db < least:
        return f"is {found.psnr_db:.1f} dB from PyTorch, expected at least {least:.0f} dB"

    ratio = found.high_frequency_ratio or 1.0
    low, high = HIGH_FREQUENCY_RATIO
    if not low <= ratio <= high:
        return f"has {ratio:.2f} times the high-frequency energy, expected {low} to {high}"
    return None

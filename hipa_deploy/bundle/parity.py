"""How near a stage's output is to PyTorch's, and the gate that an export and a device's self-check share."""

from __future__ import annotations

import numpy as np

from hipa_deploy.bundle.manifest import Parity, Precision

# Lowest PSNR a stage may have against PyTorch FP32. 35 dB is where apple/ml-stable-diffusion draws its line for FP16;
# in FP32 the same arithmetic in another order stays above 60 dB.
MIN_PSNR_DB: dict[Precision, float] = {"fp16": 35.0, "fp32": 60.0}
HIGH_FREQUENCY_RATIO = (0.8, 1.25)


def compare(got: np.ndarray, expected: np.ndarray) -> Parity:
    """Errors of ``got`` against ``expected``; PSNR in dB relative to the range of ``expected`` (255 for uint8)."""
    peak = 255.0 if expected.dtype == np.uint8 else float(np.ptp(expected.astype(np.float64)))
    a, b = got.astype(np.float64).ravel(), expected.astype(np.float64).ravel()
    error = np.abs(a - b)
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    mse = float(np.mean(error**2))
    return Parity(
        max_abs=float(error.max()),
        mean_abs=float(error.mean()),
        cosine=float(a @ b) / norms if norms else float(np.array_equal(a, b)),
        psnr_db=psnr_db(mse, peak),
        high_frequency_ratio=_high_frequency_ratio(got, expected) if expected.ndim == 4 else None,
    )


def _high_frequency_ratio(got: np.ndarray, expected: np.ndarray) -> float | None:
    """Energy of the 4-neighbour Laplacian of ``got`` over that of ``expected``; None where that has none."""
    if (
        expected.dtype == np.uint8
    ):  # [B, H, W, 3]; latents and samples have their channels first already
        got, expected = (image.transpose(0, 3, 1, 2) for image in (got, expected))
    ours, theirs = (
        float(np.square(_laplacian(x.astype(np.float64))).mean()) for x in (got, expected)
    )
    return ours / theirs if theirs else None


def _laplacian(x_BCHW: np.ndarray) -> np.ndarray:
    rows, columns = x_BCHW[:, :, :, 1:-1], x_BCHW[:, :, 1:-1]
    return (
        4 * rows[:, :, 1:-1]
        - rows[:, :, :-2]
        - rows[:, :, 2:]
        - columns[:, :, :, :-2]
        - columns[:, :, :, 2:]
    )


def psnr_db(mse: float, peak: float) -> float:
    """10 log10(peak**2 / mse), at most 200; a constant that is missed has no range to measure by, and gives 0."""
    if mse == 0:
        return 200.0
    return min(200.0, 10 * float(np.log10(peak**2 / mse))) if peak else 0.0


def problem(got: np.ndarray, expected: np.ndarray, precision: Precision) -> str | None:
    """What is wrong with ``got``, in a few words; None if it passes the gate."""
    if not np.isfinite(got.astype(np.float32)).all():
        return "gives NaN or infinity"
    if got.std() == 0 and expected.std() > 0:
        return "gives a flat output"
    found, least = compare(got, expected), MIN_PSNR_DB[precision]
    if found.psnr_db < least:
        return f"is {found.psnr_db:.1f} dB from PyTorch, expected at least {least:.0f} dB"
    ratio, (low, high) = found.high_frequency_ratio or 1.0, HIGH_FREQUENCY_RATIO
    return (
        None
        if low <= ratio <= high
        else f"has {ratio:.2f} times the high-frequency energy, expected {low} to {high}"
    )

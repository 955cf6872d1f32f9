"""The gate of every export: a stage that is not the model it came from stops it."""

from __future__ import annotations

import numpy as np

from hipa_deploy.bundle import Parity, Precision
from hipa_deploy.errors import HipaError

# Lowest PSNR a stage may have against PyTorch FP32. 35 dB is where apple/ml-stable-diffusion draws its line for FP16;
# in FP32 the same arithmetic in another order stays above 60 dB.
MIN_PSNR_DB: dict[Precision, float] = {"fp16": 35.0, "fp32": 60.0}


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
    )


def psnr_db(mse: float, peak: float) -> float:
    """10 log10(peak**2 / mse), at most 200; a constant that is missed has no range to measure by, and gives 0."""
    if mse == 0:
        return 200.0
    return min(200.0, 10 * float(np.log10(peak**2 / mse))) if peak else 0.0


def check(stage: str, got: np.ndarray, expected: np.ndarray, precision: Precision) -> Parity:
    """Compare, and raise HipaError where the export must not go on."""
    if not np.isfinite(got.astype(np.float32)).all():
        raise HipaError(f"{stage} in {precision} gives NaN or infinity. Export with --dtype fp32.")
    if got.std() == 0 and expected.std() > 0:
        raise HipaError(f"{stage} in {precision} gives a flat output. Export with --dtype fp32.")
    parity = compare(got, expected)
    if parity.psnr_db < MIN_PSNR_DB[precision]:
        raise HipaError(
            f"{stage} in {precision} is {parity.psnr_db:.1f} dB from PyTorch, "
            f"expected at least {MIN_PSNR_DB[precision]:.0f} dB. Export with --dtype fp32."
        )
    return parity

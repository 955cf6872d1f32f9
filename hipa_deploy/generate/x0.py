"""x0, the clean latents, from what the UNet predicts: the one home of this formula."""

from __future__ import annotations

import numpy as np

from hipa_deploy.errors import HipaError


def predict_x0(
    noise_BCHW: np.ndarray, output_BCHW: np.ndarray, alpha_bar: float, prediction_type: str
) -> np.ndarray:
    """x0 from the UNet's output at the trained timestep, in float32.

    With a = sqrt(alpha_bar), s = sqrt(1 - alpha_bar): eps (z - s eps) / a (Ho et al. 2020, equation 15),
    v a z - s v (Salimans & Ho 2022), sample: the output itself.
    """
    a, s = np.float32(alpha_bar**0.5), np.float32((1 - alpha_bar) ** 0.5)
    if prediction_type == "epsilon":
        return (noise_BCHW - s * output_BCHW.astype(np.float32)) / a
    if prediction_type == "v_prediction":
        return a * noise_BCHW - s * output_BCHW.astype(np.float32)
    if prediction_type == "sample":
        return output_BCHW.astype(np.float32)
    raise HipaError(
        f"prediction type {prediction_type!r} is unknown. Expected epsilon, v_prediction or sample."
    )

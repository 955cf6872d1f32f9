"""x0, the clean latents, from what the UNet predicts: the one home of this formula.

With a = sqrt(alpha_bar) and s = sqrt(1 - alpha_bar) at the step's timestep, and z the latents that
the UNet saw:

    epsilon       x0 = (z - s eps) / a     Ho et al. 2020, equation 15
    v_prediction  x0 = a z - s v           Salimans & Ho 2022, appendix D
    sample        x0 = the output itself

The formulas are plain arithmetic: training and export give them torch tensors, the runtime numpy
arrays. They are combined in float32: an error of eps grows by s / a, which is 14.6 at t = 999 of
Stable Diffusion's schedule.
"""

from __future__ import annotations

from typing import Any

from hipa_deploy.errors import HipaError


def predict_x0(z_BCHW: Any, output_BCHW: Any, alpha_bar: Any, prediction_type: str) -> Any:
    """x0 [B, C, h, w] in float32.

    Args:
        z_BCHW: what the UNet saw.
        output_BCHW: what it predicts.
        alpha_bar: cumulative signal power in (0, 1], a number or [B, 1, 1, 1].
        prediction_type: epsilon, v_prediction or sample.

    Raises:
        HipaError: another prediction type.

    Example:
        >>> noise = np.zeros((1, 4, 64, 64), np.float32)
        >>> predict_x0(noise, noise, 0.0046601, "epsilon").shape
        (1, 4, 64, 64)

    """
    z_BCHW = _float32(z_BCHW)
    output_BCHW = _float32(output_BCHW)
    a = alpha_bar**0.5
    s = (1 - alpha_bar) ** 0.5
    if prediction_type == "epsilon":
        return (z_BCHW - s * output_BCHW) / a
    if prediction_type == "v_prediction":
        return a * z_BCHW - s * output_BCHW
    if prediction_type == "sample":
        return output_BCHW
    raise HipaError(
        f"prediction type {prediction_type!r} is unknown. Expected epsilon, v_prediction or sample."
    )


def predict_x0_in_a_graph(
    z_BCHW: Any, output_BCHW: Any, alpha_bar: Any, prediction_type: str
) -> Any:
    """The same with its constants multiplied out: for eps, two multiplications and no division."""
    if prediction_type == "epsilon":
        a = alpha_bar**0.5
        s = (1 - alpha_bar) ** 0.5
        return z_BCHW * (1 / a) - output_BCHW * (s / a)
    return predict_x0(z_BCHW, output_BCHW, alpha_bar, prediction_type)


def _float32(tensor: Any) -> Any:
    return tensor.float() if hasattr(tensor, "float") else tensor.astype("float32")

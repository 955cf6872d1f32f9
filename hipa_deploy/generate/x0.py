"""x0, the clean latents, from what the UNet predicts: the one home of this formula.

With a = sqrt(alpha_bar) and s = sqrt(1 - alpha_bar) at the step's timestep, and z the latents that
the UNet saw:

    epsilon       x0 = (z - s eps) / a     Ho et al. 2020, equation 15
    v_prediction  x0 = a z - s v           Salimans & Ho 2022, appendix D
    sample        x0 = the output itself

Other one-step methods do not end at x0 itself: LCM mixes z in, and TCD ends at the schedule's first
timestep, where a little of eps is left. In one step all of them are linear in z and in the output,
so two factors say what they do (``hipa_deploy.models.one_step`` says where they come from).

The formulas are plain arithmetic: training and export give them torch tensors, the runtime numpy
arrays. They are combined in float32: an error of eps grows by s / a, which is 14.6 at t = 999 of
Stable Diffusion's schedule.
"""

from __future__ import annotations

from typing import Any

from hipa_deploy.bundle.manifest import StepMethod
from hipa_deploy.errors import HipaError


def predict_x0(
    z_BCHW: Any,
    output_BCHW: Any,
    alpha_bar: Any,
    prediction_type: str,
    method: StepMethod | None = None,
) -> Any:
    """x0 [B, C, h, w] in float32, or what another method gives in its place.

    Args:
        z_BCHW: what the UNet saw.
        output_BCHW: what it predicts.
        alpha_bar: cumulative signal power in (0, 1], a number or [B, 1, 1, 1].
        prediction_type: epsilon, v_prediction or sample.
        method: its two factors are used in place of the formulas.

    Raises:
        HipaError: another prediction type.

    Example:
        >>> noise = np.zeros((1, 4, 64, 64), np.float32)
        >>> predict_x0(noise, noise, 0.0046601, "epsilon").shape
        (1, 4, 64, 64)

    """
    z_BCHW = _float32(z_BCHW)
    output_BCHW = _float32(output_BCHW)
    if method is not None:
        return method.sample_factor * z_BCHW + method.output_factor * output_BCHW
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
    z_BCHW: Any,
    output_BCHW: Any,
    alpha_bar: Any,
    prediction_type: str,
    method: StepMethod | None = None,
) -> Any:
    """The same with its constants multiplied out: for eps, two multiplications and no division."""
    if prediction_type == "epsilon" and method is None:
        a = alpha_bar**0.5
        s = (1 - alpha_bar) ** 0.5
        return z_BCHW * (1 / a) - output_BCHW * (s / a)
    return predict_x0(z_BCHW, output_BCHW, alpha_bar, prediction_type, method)


def _float32(tensor: Any) -> Any:
    return tensor.float() if hasattr(tensor, "float") else tensor.astype("float32")

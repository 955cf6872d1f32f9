"""Deterministic samplers of the probability-flow ODE, in numpy.

Both give what diffusers' schedulers give with the settings of ``hipa-train``'s teacher: spacing
'trailing', so that the first step is at the last timestep, and an end at x0 itself.

    dpmsolver++   DPMSolverMultistepScheduler, order 2, 'midpoint'. Lu et al. 2022, algorithm 2
    ddim          DDIMScheduler, eta 0. Song et al. 2020, equation 12

Constants are float64 numbers, latents float32.

Shapes: B batch, C latent channels, h, w latent height and width, T timesteps of the schedule.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from hipa_deploy.bundle.manifest import RefineSettings
from hipa_deploy.generate.x0 import predict_x0

# A schedule rescaled to no signal at its end has none for DPM-Solver++ to divide by. diffusers
# takes this in its place (scheduling_dpmsolver_multistep.py, rescale_betas_zero_snr).
_LEAST_ALPHA_BAR = 2.0**-24


class Solver(Protocol):
    """Steps from noise to x0. One solver makes one trajectory."""

    timesteps: Sequence[int]
    """Where the UNet is asked, descending."""

    def step(self, index: int, sample_BCHW: np.ndarray, output_BCHW: np.ndarray) -> np.ndarray:
        """The next latents.

        Args:
            index: of the step, from 0; every step in turn.
            sample_BCHW: float32, what the UNet saw.
            output_BCHW: float32, what it predicts, guided.

        """


def make_solver(settings: RefineSettings, alpha_bars_T: np.ndarray, prediction_type: str) -> Solver:
    """A new solver of ``settings.sampler``.

    Args:
        settings: sampler and steps; at most T steps.
        alpha_bars_T: cumulative signal power of each timestep, descending, in [0, 1].
        prediction_type: what the UNet predicts: epsilon, v_prediction or sample.

    Example:
        >>> solver = make_solver(RefineSettings(steps=4), np.linspace(0.99, 0.01, 1000), "epsilon")
        >>> solver.timesteps
        [999, 749, 499, 249]

    """
    kind = DpmSolver if settings.sampler == "dpmsolver++" else Ddim
    return kind(alpha_bars_T, settings.steps, prediction_type)


def trailing_timesteps(count: int, steps: int) -> list[int]:
    """``steps`` of ``count`` timesteps, evenly spaced from the last one down."""
    # By rounding, the last number can come out as another one, at 0.
    spaced = np.arange(count, 0, -count / steps)[:steps].round()
    return [int(timestep) - 1 for timestep in spaced]


class DpmSolver:
    """DPM-Solver++ of second order, multi-step; the first and the last step are of first order.

    Args:
        alpha_bars_T: as ``make_solver`` takes it.
        steps: UNet steps.
        prediction_type: what the UNet predicts.

    """

    def __init__(self, alpha_bars_T: np.ndarray, steps: int, prediction_type: str) -> None:
        self.timesteps: Sequence[int] = trailing_timesteps(len(alpha_bars_T), steps)
        self._prediction_type = prediction_type
        alpha_bars = [
            max(float(alpha_bars_T[timestep]), _LEAST_ALPHA_BAR) for timestep in self.timesteps
        ]
        alpha_bars.append(1.0)  # after the last step: x0, without noise
        self._alpha_bars = alpha_bars
        self._before_BCHW: np.ndarray | None = None  # x0, as the step before predicted it

    def step(self, index: int, sample_BCHW: np.ndarray, output_BCHW: np.ndarray) -> np.ndarray:
        """The next latents; see ``Solver.step``."""
        alpha_bar = self._alpha_bars[index]
        x0_BCHW = predict_x0(sample_BCHW, output_BCHW, alpha_bar, self._prediction_type)
        before_BCHW = self._before_BCHW
        self._before_BCHW = x0_BCHW
        if index == len(self.timesteps) - 1:
            return np.asarray(x0_BCHW)

        next_alpha_bar = self._alpha_bars[index + 1]
        # In half the log of signal over noise, the ODE is almost linear.
        width = _log_ratio(next_alpha_bar) - _log_ratio(alpha_bar)
        shrink = math.sqrt((1 - next_alpha_bar) / (1 - alpha_bar))
        gain = -math.sqrt(next_alpha_bar) * math.expm1(-width)
        if before_BCHW is None:
            towards_BCHW = x0_BCHW
        else:
            # x0 half way through this step, along the line through the last two predictions.
            width_before = _log_ratio(alpha_bar) - _log_ratio(self._alpha_bars[index - 1])
            share = np.float32(width / (2 * width_before))
            towards_BCHW = x0_BCHW + share * (x0_BCHW - before_BCHW)
        return np.asarray(np.float32(shrink) * sample_BCHW + np.float32(gain) * towards_BCHW)


class Ddim:
    """DDIM without added noise.

    Args:
        alpha_bars_T: as ``make_solver`` takes it.
        steps: UNet steps.
        prediction_type: what the UNet predicts.

    """

    def __init__(self, alpha_bars_T: np.ndarray, steps: int, prediction_type: str) -> None:
        self.timesteps: Sequence[int] = trailing_timesteps(len(alpha_bars_T), steps)
        self._prediction_type = prediction_type
        self._alpha_bars_T = alpha_bars_T
        # diffusers goes this far down, and not to the next timestep. The two differ by rounding
        # where T is no multiple of the steps.
        self._stride = len(alpha_bars_T) // steps

    def step(self, index: int, sample_BCHW: np.ndarray, output_BCHW: np.ndarray) -> np.ndarray:
        """The next latents; see ``Solver.step``."""
        timestep = self.timesteps[index]
        alpha_bar = float(self._alpha_bars_T[timestep])
        next_timestep = timestep - self._stride
        next_alpha_bar = float(self._alpha_bars_T[next_timestep]) if next_timestep >= 0 else 1.0
        signal = math.sqrt(alpha_bar)
        noise = math.sqrt(1 - alpha_bar)
        x0_BCHW = predict_x0(sample_BCHW, output_BCHW, alpha_bar, self._prediction_type)
        if self._prediction_type == "epsilon":
            eps_BCHW = output_BCHW
        elif self._prediction_type == "v_prediction":
            eps_BCHW = np.float32(signal) * output_BCHW + np.float32(noise) * sample_BCHW
        else:
            eps_BCHW = (sample_BCHW - np.float32(signal) * x0_BCHW) / np.float32(noise)
        signal_left = np.float32(math.sqrt(next_alpha_bar))
        noise_left = np.float32(math.sqrt(1 - next_alpha_bar))
        return np.asarray(signal_left * x0_BCHW + noise_left * eps_BCHW)


def _log_ratio(alpha_bar: float) -> float:
    """Half the logarithm of signal power over noise power."""
    return 0.5 * (math.log(alpha_bar) - math.log1p(-alpha_bar))

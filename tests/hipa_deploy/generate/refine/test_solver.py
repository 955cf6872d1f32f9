"""The samplers against diffusers' schedulers, as the teacher of a training sets them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given
from hypothesis import strategies as st

from hipa_deploy.bundle.manifest import RefineSettings
from hipa_deploy.generate.refine.solver import make_solver, trailing_timesteps
from hipa_deploy.train.data.teacher_pairs import teacher_scheduler

SHAPE = (2, 4, 8, 8)
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def random_model(seed: int) -> Callable[[np.ndarray, int], np.ndarray]:
    """A prediction that depends on every latent channel and on the timestep."""
    mix = np.random.default_rng(seed).normal(size=(4, 4)).astype(np.float32)

    def predict(x_BCHW: np.ndarray, timestep: int) -> np.ndarray:
        mixed_BCHW = np.einsum("dc,bchw->bdhw", mix, x_BCHW)
        return np.tanh(mixed_BCHW + np.float32(timestep / 500)).astype(np.float32)

    return predict


def largest_difference(sampler: str, steps: int, schedule: dict[str, Any], seed: int) -> float:
    """Between the latents of both after any step, relative to the largest latent."""
    scheduler = teacher_scheduler(schedule, sampler)
    scheduler.set_timesteps(steps)
    alpha_bars_T = DDIMScheduler(**schedule).alphas_cumprod.numpy()
    settings = RefineSettings(sampler=sampler, steps=steps)
    solver = make_solver(settings, alpha_bars_T, schedule["prediction_type"])
    assert list(solver.timesteps) == scheduler.timesteps.tolist()

    predict = random_model(seed)
    ours_BCHW = np.random.default_rng(seed).normal(size=SHAPE).astype(np.float32)
    theirs_BCHW = torch.from_numpy(ours_BCHW.copy())
    worst = 0.0
    for index, timestep in enumerate(solver.timesteps):
        ours_BCHW = solver.step(index, ours_BCHW, predict(ours_BCHW, timestep))
        output_BCHW = torch.from_numpy(predict(theirs_BCHW.numpy(), timestep))
        theirs_BCHW = scheduler.step(output_BCHW, timestep, theirs_BCHW).prev_sample
        scale = max(1.0, float(np.abs(ours_BCHW).max()))
        worst = max(worst, float(np.abs(ours_BCHW - theirs_BCHW.numpy()).max()) / scale)
    assert ours_BCHW.dtype == np.float32
    return worst


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("steps", [2, 4, 7, 10, 25])
@pytest.mark.parametrize("sampler", ["dpmsolver++", "ddim"])
def test_latents_are_those_of_diffusers(sampler: str, steps: int, prediction_type: str) -> None:
    schedule = {**SCHEDULE, "prediction_type": prediction_type}
    assert largest_difference(sampler, steps, schedule, seed=steps) < 1e-5


@pytest.mark.parametrize("sampler", ["dpmsolver++", "ddim"])
def test_a_schedule_that_ends_without_signal(sampler: str) -> None:
    schedule = {
        **SCHEDULE,
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
    }
    assert largest_difference(sampler, 10, schedule, seed=1) < 1e-5


@given(count=st.integers(2, 1000), data=st.data())
def test_timesteps_descend_from_the_last_one(count: int, data: st.DataObject) -> None:
    steps = data.draw(st.integers(2, count))
    timesteps = trailing_timesteps(count, steps)
    assert len(timesteps) == steps
    assert timesteps[0] == count - 1
    assert timesteps[-1] >= 0
    assert all(first > second for first, second in itertools.pairwise(timesteps))

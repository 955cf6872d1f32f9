from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler

from hipa_deploy.generate.x0 import predict_x0
from hipa_deploy.models.one_step.own_step import one_step_scheduler
from hipa_deploy.train.model.diffusion_model import DiffusionModel
from hipa_deploy.train.model.one_step import one_step_latents

SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
ALPHA_BAR = 0.0046601  # at timestep 999


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_x0_inverts_the_forward_process(kind: str) -> None:
    x0, eps = torch.randn(2, 1, 4, 8, 8, dtype=torch.float64)
    signal = ALPHA_BAR**0.5
    sigma = (1 - ALPHA_BAR) ** 0.5
    output = eps if kind == "epsilon" else signal * eps - sigma * x0
    got = predict_x0(signal * x0 + sigma * eps, output, ALPHA_BAR, kind)
    assert torch.allclose(got.double(), x0, atol=1e-4)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    ("timestep", "call"),
    [
        (999, {"num_inference_steps": 1}),
        (998, {"num_inference_steps": 1}),
        (600, {"num_inference_steps": 1}),
        (600, {"timesteps": [600]}),
        (500, {"num_inference_steps": 1}),
        (499, {"timesteps": [499]}),
        (249, {"timesteps": [249]}),
    ],
)
def test_shipped_scheduler_takes_exactly_this_step(
    kind: str, timestep: int, call: dict[str, Any]
) -> None:
    scheduler = one_step_scheduler({**SCHEDULE, "prediction_type": kind}, timestep)
    scheduler.set_timesteps(**call)
    assert scheduler.timesteps.tolist() == [timestep]
    noise, output = torch.randn(2, 1, 4, 8, 8)
    got = scheduler.step(output, scheduler.timesteps[0], noise, return_dict=False)[0]
    expected = predict_x0(noise, output, float(scheduler.alphas_cumprod[timestep]), kind)
    assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("timestep", [999, 600, 499, 249])
def test_ddim_reads_the_same_step_from_the_file(timestep: int) -> None:
    """Whoever takes the usual scheduler of one step must not get another image without a word."""
    config = one_step_scheduler({**SCHEDULE, "prediction_type": "epsilon"}, timestep).config
    scheduler = DDIMScheduler.from_config(config)
    scheduler.set_timesteps(1)
    assert scheduler.timesteps.tolist() == [timestep]
    noise, output = torch.randn(2, 1, 4, 8, 8)
    got = scheduler.step(output, scheduler.timesteps[0], noise, return_dict=False)[0]
    expected = predict_x0(noise, output, float(scheduler.alphas_cumprod[timestep]), "epsilon")
    assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_diffusers_pipeline_gives_the_same_latents(model: DiffusionModel) -> None:
    noise = model.noise([5])
    conditions = model.conditions(["a red apple"])
    with torch.no_grad():
        expected = one_step_latents(
            model.unet,
            noise,
            conditions,
            timestep=999,
            alpha_bar=model.alpha_bar(999),
            prediction_type=model.prediction_type,
        )
    model.pipe.scheduler = one_step_scheduler(model.schedule, 999)
    got = model.pipe(
        "a red apple", latents=noise, num_inference_steps=1, guidance_scale=0, output_type="latent"
    )
    assert torch.allclose(got.images, expected, rtol=1e-5, atol=1e-5)

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hipa_deploy.errors import HipaError
from hipa_deploy.generate.x0 import predict_x0
from hipa_deploy.train.model.diffusion_model import DiffusionModel
from hipa_deploy.train.model.one_step import one_step_latents
from hipa_deploy.train.model.unet_adaptor import one_step_scheduler

SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
ALPHA_BAR = 0.0046601


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_inverts_the_forward_process(kind: str) -> None:
    x0, eps = torch.randn(2, 1, 4, 8, 8, dtype=torch.float64)
    a, s = ALPHA_BAR**0.5, (1 - ALPHA_BAR) ** 0.5
    output = eps if kind == "epsilon" else a * eps - s * x0
    assert torch.allclose(
        predict_x0(a * x0 + s * eps, output, ALPHA_BAR, kind).double(), x0, atol=1e-4
    )


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("timestep", [999, 799])
def test_shipped_scheduler_takes_exactly_this_step(kind: str, timestep: int) -> None:
    scheduler = one_step_scheduler({**SCHEDULE, "prediction_type": kind}, timestep)
    if timestep == 999:
        scheduler.set_timesteps(1)
    else:
        scheduler.set_timesteps(timesteps=[timestep])
    assert scheduler.timesteps.tolist() == [timestep]
    noise, output = torch.randn(2, 1, 4, 8, 8)
    got = scheduler.step(output, scheduler.timesteps[0], noise, return_dict=False)[0]
    expected = predict_x0(noise, output, float(scheduler.alphas_cumprod[timestep]), kind)
    assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_pipeline_gives_the_same_latents(model: DiffusionModel) -> None:
    noise, context = model.noise([5]), model.context(["a red apple"])
    constants = {"alpha_bar": model.alpha_bar(999), "prediction_type": model.prediction_type}
    with torch.no_grad():
        expected = one_step_latents(model.unet, noise, context, timestep=999, **constants)
    model.pipe.scheduler = one_step_scheduler(model.schedule, 999)
    got = model.pipe(
        "a red apple", latents=noise, num_inference_steps=1, guidance_scale=0, output_type="latent"
    )
    assert torch.allclose(got.images, expected, rtol=1e-5, atol=1e-5)


def test_what_the_model_says(model: DiffusionModel, v_model_dir: Path) -> None:
    assert model.latent_shape_CHW == (4, 8, 8)
    assert model.resolution == (32, 32)
    assert model.alpha_bar(999) == pytest.approx(ALPHA_BAR, rel=1e-4)
    assert DiffusionModel.load(v_model_dir, "cpu").prediction_type == "v_prediction"
    with pytest.raises(HipaError, match="timestep 1000 is out of range"):
        model.alpha_bar(1000)

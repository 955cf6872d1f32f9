from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from hipa_deploy.errors import HipaError
from hipa_deploy.generate.x0 import predict_x0
from hipa_deploy.train import train_adaptor as loop
from hipa_deploy.train.loop.run import Run
from hipa_deploy.train.losses.hipa_loss import HipaLoss
from hipa_deploy.train.model.diffusion_model import DiffusionModel
from hipa_deploy.train.model.mixed_precision import DTYPES, in_precision
from hipa_deploy.train.model.unet_adaptor import WEIGHTS
from hipa_deploy.train.recipes.recipe import Recipe
from hipa_deploy.train.train_adaptor import train_adaptor


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_networks_in_half_the_rest_in_float32(
    precision: str,
    recipe: Recipe,
    model_dir: Path,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both run for real on a CPU: autocast, and for fp16 the loss scale."""
    seen = {}

    def x0(noise: torch.Tensor, output: torch.Tensor, *more: object) -> torch.Tensor:
        latents = predict_x0(noise, output, *more)
        seen["unet"], seen["x0"], seen["autocast"] = (
            output.dtype,
            latents.dtype,
            torch.is_autocast_enabled("cpu"),
        )
        return latents

    def loss(self: HipaLoss, *images_and_latents: torch.Tensor) -> tuple[torch.Tensor, dict]:
        seen["loss"] = {tensor.dtype for tensor in images_and_latents}
        return original(self, *images_and_latents)

    original = HipaLoss.forward
    monkeypatch.setattr("hipa_deploy.train.model.one_step.predict_x0", x0)
    monkeypatch.setattr(HipaLoss, "forward", loss)
    half = recipe.model_copy(update={"mixed_precision": precision, "steps": 2})
    folder = train_adaptor(
        half, model_dir, tmp_path / "half", cache=cache, device="cpu", console=Console(quiet=True)
    )
    expected = {
        "unet": DTYPES[precision],
        "x0": torch.float32,
        "autocast": False,
        "loss": {torch.float32},
    }
    assert seen == expected
    weights = load_file(folder / WEIGHTS)
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert (
        sum(float(weight.abs().sum()) for name, weight in weights.items() if "lora_B" in name) > 0
    )


def test_a_gradient_beyond_fp16_is_a_step_skipped_and_a_smaller_scale(
    recipe: Recipe, model_dir: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, scales = Run.accumulate, []

    def overflow(run: Run, *arguments: object) -> dict[str, float]:
        values = original(run, *arguments)
        scales.append(run.scaler.get_scale())
        if run.step == 0:
            next(iter(run.weights.values())).grad[0] = torch.inf
        return values

    monkeypatch.setattr(Run, "accumulate", overflow)
    half = recipe.model_copy(update={"mixed_precision": "fp16", "steps": 2})
    train_adaptor(
        half, model_dir, tmp_path / "half", cache=cache, device="cpu", console=Console(quiet=True)
    )
    assert scales == [65536.0, 32768.0]
    state = torch.load(tmp_path / "half.run" / "state.pt", weights_only=True)
    assert state["scaler"]["scale"] == 32768.0
    assert next(iter(state["optimizer"]["state"].values()))["step"] == 1


def test_a_scale_that_cannot_fall_is_divergence(
    recipe: Recipe, model_dir: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.amp.GradScaler, "get_scale", lambda self: 0.5)
    monkeypatch.setattr(loop, "hipa_loss", lambda settings: Exploding())
    half = recipe.model_copy(
        update={
            "mixed_precision": "fp16",
            "loss": recipe.loss.model_copy(update={"latent_warmup_steps": 0}),
        }
    )
    with pytest.raises(HipaError, match="training diverged: loss 0, gradient norm"):
        train_adaptor(
            half,
            model_dir,
            tmp_path / "half",
            cache=cache,
            device="cpu",
            console=Console(quiet=True),
        )


class Exploding(torch.nn.Module):
    """A finite loss whose gradient is not: the square root at zero."""

    decodes = True
    state: ClassVar[dict] = {}
    trained: ClassVar[dict] = {}
    balance = None

    def forward(self, image: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor, dict]:
        return (image - image.detach()).sqrt().mean(), {}


def test_float32_is_left_alone(model: DiffusionModel) -> None:
    assert in_precision(model.unet, "no", model.device) is model.unet

from __future__ import annotations

import io
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from hipa_deploy.errors import HipaError
from hipa_deploy.generate.x0 import predict_x0
from hipa_deploy.train import train_adaptor as train_adaptor_module
from hipa_deploy.train.loop.run import Run
from hipa_deploy.train.losses.hipa_loss import HipaLoss
from hipa_deploy.train.model import mixed_precision
from hipa_deploy.train.model.diffusion_model import DiffusionModel
from hipa_deploy.train.model.mixed_precision import (
    DTYPES,
    computed_precision,
    in_precision,
    precision_note,
)
from hipa_deploy.train.model.unet_adaptor import WEIGHTS
from hipa_deploy.train.recipes.recipe import Recipe
from hipa_deploy.train.train_adaptor import train_adaptor

QUIET = Console(quiet=True)
pytestmark = pytest.mark.usefixtures("half_precision")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_networks_run_in_half_precision_and_all_else_in_float32(
    precision: str,
    recipe: Recipe,
    model_dir: Path,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A CPU really runs both: autocast, and the loss scale of fp16."""
    seen = {}
    original = HipaLoss.forward

    def x0(noise: torch.Tensor, output: torch.Tensor, *more: object) -> torch.Tensor:
        latents = predict_x0(noise, output, *more)
        seen["unet"] = output.dtype
        seen["x0"] = latents.dtype
        seen["autocast"] = torch.is_autocast_enabled("cpu")
        return latents

    def loss(self: HipaLoss, *images_and_latents: torch.Tensor) -> tuple[torch.Tensor, dict]:
        seen["loss"] = {tensor.dtype for tensor in images_and_latents}
        return original(self, *images_and_latents)

    monkeypatch.setattr("hipa_deploy.train.model.one_step.predict_x0", x0)
    monkeypatch.setattr(HipaLoss, "forward", loss)
    half = recipe.model_copy(update={"mixed_precision": precision, "steps": 2})
    folder = train_adaptor(
        half, model_dir, tmp_path / "half", cache=cache, device="cpu", console=QUIET
    )
    assert seen == {
        "unet": DTYPES[precision],
        "x0": torch.float32,
        "autocast": False,
        "loss": {torch.float32},
    }
    weights = load_file(folder / WEIGHTS)
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    trained = [weight for name, weight in weights.items() if "lora_B" in name]
    assert sum(float(weight.abs().sum()) for weight in trained) > 0


def test_a_gradient_beyond_fp16_skips_the_step_and_halves_the_scale(
    recipe: Recipe, model_dir: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Run.accumulate
    scales = []

    def overflow(run: Run, *arguments: object) -> dict[str, float]:
        values = original(run, *arguments)
        scales.append(run.scaler.get_scale())
        if run.step == 0:
            next(iter(run.weights.values())).grad[0] = torch.inf
        return values

    monkeypatch.setattr(Run, "accumulate", overflow)
    half = recipe.model_copy(update={"mixed_precision": "fp16", "steps": 2})
    train_adaptor(half, model_dir, tmp_path / "half", cache=cache, device="cpu", console=QUIET)
    assert scales == [65536.0, 32768.0]
    state = torch.load(tmp_path / "half.run" / "state.pt", weights_only=True)
    assert state["scaler"]["scale"] == 32768.0
    assert next(iter(state["optimizer"]["state"].values()))["step"] == 1


def test_at_the_smallest_scale_an_infinite_gradient_is_divergence(
    recipe: Recipe, model_dir: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.amp.GradScaler, "get_scale", lambda self: 0.5)
    monkeypatch.setattr(train_adaptor_module, "hipa_loss", lambda settings, **_: Exploding())
    loss = recipe.loss.model_copy(update={"latent_warmup_steps": 0})
    half = recipe.model_copy(update={"mixed_precision": "fp16", "loss": loss})
    with pytest.raises(HipaError, match="training diverged: loss 0, gradient norm"):
        train_adaptor(half, model_dir, tmp_path / "half", cache=cache, device="cpu", console=QUIET)


class Exploding(torch.nn.Module):
    """A finite loss whose gradient is not: the square root at zero."""

    needs_images = True
    state: ClassVar[dict] = {}
    trained_parameters: ClassVar[dict] = {}
    balance = None

    def forward(self, image: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor, dict]:
        return (image - image.detach()).sqrt().mean(), {}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_cpu_without_the_instructions_computes_in_float32_and_says_so(
    precision: str,
    recipe: Recipe,
    model_dir: Path,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It would have to emulate them: 17 to 79 times as slow, on a Zen 3."""
    monkeypatch.setattr(mixed_precision, "_cpu_computes_in", lambda precision: False)
    teacher = recipe.teacher.model_copy(update={"mixed_precision": precision})
    changes = {"mixed_precision": precision, "teacher": teacher, "steps": 2}
    weights = {}
    for name, asked in (("half", recipe.model_copy(update=changes)), ("float32", recipe)):
        said = io.StringIO()
        two = asked.model_copy(update={"steps": 2})
        console = Console(file=said, width=200)
        folder = train_adaptor(
            two, model_dir, tmp_path / name, cache=cache, device="cpu", console=console
        )
        weights[name] = load_file(folder / WEIGHTS)
        assert ("It computes in float32" in said.getvalue()) == (name == "half")
    assert weights["half"].keys() == weights["float32"].keys()
    for name, weight in weights["half"].items():
        torch.testing.assert_close(weight, weights["float32"][name], rtol=0, atol=1e-6)


def test_only_a_cpu_that_lacks_the_instructions_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    gpu = torch.device("cuda")
    monkeypatch.setattr(mixed_precision, "_cpu_computes_in", lambda precision: precision == "bf16")
    assert computed_precision("bf16", cpu) == "bf16"
    assert computed_precision("fp16", cpu) == "no"
    assert computed_precision("fp16", gpu) == "fp16"
    assert precision_note(["bf16", "no"], cpu) is None
    assert precision_note(["fp16"], gpu) is None
    note = precision_note(["fp16", "bf16", "fp16"], cpu)
    assert note is not None
    assert "no instructions for float16, which" in note


def test_what_is_counted_for_another_device_keeps_its_precision(
    model: DiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mixed_precision, "_cpu_computes_in", lambda precision: False)
    cpu = torch.device("cpu")
    assert in_precision(model.unet, "bf16", cpu) is model.unet
    emulated = in_precision(model.unet, "bf16", cpu, emulated=True)
    z = torch.zeros(1, *model.latent_shape_CHW)
    with torch.no_grad():
        assert emulated(z, 999, model.context(["a boat"])).sample.dtype == torch.bfloat16


def test_without_mixed_precision_the_function_itself_is_returned(model: DiffusionModel) -> None:
    assert in_precision(model.unet, "no", model.device) is model.unet

"""A user's own loss: the documented example trains, and what is no loss is refused in one line."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from rich.console import Console

from hipa_deploy.errors import HipaError
from hipa_deploy.models.adaptor_folder import WEIGHTS
from hipa_deploy.train.losses.custom_loss import load_custom_loss
from hipa_deploy.train.losses.hipa_loss import hipa_loss
from hipa_deploy.train.prediction.simulated_training import SimulatedTraining, unloaded_model
from hipa_deploy.train.recipes.loss_settings import DecoderLossSettings, LossSettings
from hipa_deploy.train.recipes.recipe import Recipe
from hipa_deploy.train.train_adaptor import train_adaptor
from hipa_deploy.user_code import code_allowed
from tests.weights import read_weights

PAGE = Path(__file__).parents[3] / "docs/how-to/your-own-loss.md"
ALONE: dict[str, Any] = {"perceptual": "none", "hf_weight": 0, "custom_weight": 2.0}
BAD = """
import torch

def fails(): raise RuntimeError("no weights")
def number(): return 3
def one_argument(): return lambda image: image.mean()
def map_(): return lambda image, target: image - target
def text(): return lambda image, target: "0.5"
def infinite(): return lambda image, target: (image - target).mean() / 0
def constant(): return lambda image, target: torch.tensor(1.0)
def of_target(): return lambda image, target: target.requires_grad_().mean()
def rounded(): return lambda image, target: (image.detach() - target).abs().mean() + 0 * image.sum()
def root(): return lambda image, target: (0 * (image - target)).sqrt().mean()
"""


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The page's module my_losses, and bad_losses, on Python's path."""
    (example,) = re.findall(r"```py\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "my_losses.py").write_text(example)
    (tmp_path / "bad_losses.py").write_text(BAD)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("my_losses", "bad_losses"):
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("modules")
def test_the_documented_example_is_a_term_of_the_loss() -> None:
    settings = LossSettings(custom="my_losses:charbonnier", **ALONE)
    with code_allowed():
        loss = hipa_loss(settings)
        decoder_loss = hipa_loss(DecoderLossSettings(custom="my_losses:charbonnier", **ALONE))
    image, target = torch.rand(2, 2, 3, 16, 16)
    latents = torch.zeros(2, 4, 2, 2)
    total, terms = loss(image, target, latents, latents)
    expected = ((image - target).square() + 1e-6).sqrt().mean()
    assert terms["custom"] == pytest.approx(float(expected))
    assert total == pytest.approx(2 * float(expected))
    assert "custom" in decoder_loss.image_loss(image, target)[1]
    assert loss.needs_images


@pytest.mark.usefixtures("modules")
def test_the_documented_example_trains(
    recipe: Recipe, model_dir: Path, cache: Path, tmp_path: Path
) -> None:
    update = {"custom": "my_losses:charbonnier", "latent_warmup_steps": 0, "latent_weight": 0.0}
    loss = recipe.loss.model_copy(update=ALONE | update)
    changed = recipe.model_copy(update={"loss": loss, "steps": 2})
    quiet = Console(quiet=True)
    with code_allowed():
        out = train_adaptor(
            changed, model_dir, tmp_path / "a", cache=cache, device="cpu", console=quiet
        )
    weights = read_weights(out / WEIGHTS)
    assert any(weight.any() for name, weight in weights.items() if "lora_B" in name)

    # The dry run counts the decoding that it needs, without running its code.
    assert SimulatedTraining(unloaded_model(model_dir), changed).loss.needs_images


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:f", "cannot be made (ModuleNotFoundError"),
        ("bad_losses:f", "cannot be made (AttributeError"),
        ("bad_losses:fails", "cannot be made (RuntimeError: no weights)"),
        ("bad_losses:number", "is int"),
        ("bad_losses:one_argument", "fails on two images (TypeError"),
        ("bad_losses:map_", "gives a tensor [2, 3, 64, 64]"),
        ("bad_losses:text", "gives str"),
        ("bad_losses:infinite", "not finite"),
        ("bad_losses:constant", "has no gradient"),
        ("bad_losses:of_target", "has no gradient"),
        ("bad_losses:rounded", "has no gradient"),
        ("bad_losses:root", "gradient that is not finite"),
    ],
)
@pytest.mark.usefixtures("modules")
def test_what_is_no_loss_is_refused_in_one_line(name: str, message: str) -> None:
    with code_allowed(), pytest.raises(HipaError, match=re.escape(message)) as error:
        load_custom_loss(name)
    assert "\n" not in str(error.value)
    assert name in str(error.value)


@pytest.mark.usefixtures("modules")
def test_code_that_was_not_allowed_is_not_imported(recipe: Recipe, tmp_path: Path) -> None:
    loss = recipe.loss.model_copy(update={"custom": "my_losses:charbonnier"})
    changed = recipe.model_copy(update={"loss": loss})
    with pytest.raises(HipaError, match=r"code of the module my_losses.*--allow-code"):
        # Before the model is looked for.
        train_adaptor(changed, tmp_path / "no model", tmp_path / "a", device="cpu")
    assert "my_losses" not in sys.modules
    with pytest.raises(ValidationError, match="custom"):
        LossSettings(custom="my_losses.py")

"""The terms in a training: exact resuming, whose weights learn, and what switches them off."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from hipa_deploy.errors import HipaError
from hipa_deploy.train.data import teacher_pairs
from hipa_deploy.train.distribution import fake_score, terms
from hipa_deploy.train.distribution.draws import row_draws
from hipa_deploy.train.distribution.terms import (
    DistributionTerms,
    distribution_terms,
    with_gradient,
)
from hipa_deploy.train.loop.optimizer import new_optimizer
from hipa_deploy.train.losses.hipa_loss import HipaLoss
from hipa_deploy.train.model.conditions import Conditions
from hipa_deploy.train.model.diffusion_model import DiffusionModel
from hipa_deploy.train.model.unet_adaptor import WEIGHTS, add_adaptors, trained_parameters
from hipa_deploy.train.recipes.loss_settings import LossSettings
from hipa_deploy.train.recipes.recipe import Recipe
from hipa_deploy.train.train_adaptor import train_adaptor
from tests.tiny_model import make_model
from tests.weights import differences, read_weights

BOTH = {
    "score": {"weight": 0.5, "rank": 2, "steps": 2, "delay": 1, "learning_rate": 1e-2},
    "latent_discriminator": {"weight": 0.1, "r1": 0.1},
}
SCORE_ALONE = {
    "score": {"weight": 1.0, "rank": 2},
    "loss": {"perceptual": "none", "hf_weight": 0, "latent_weight": 0},
}


def changed(recipe: Recipe, **changes: Any) -> Recipe:
    return Recipe.model_validate(recipe.model_dump() | changes)


def train(
    recipe: Recipe, model_dir: Path, out: Path, cache: Path, console: Console | None = None
) -> dict[str, torch.Tensor]:
    quiet = Console(file=io.StringIO())
    folder = train_adaptor(
        recipe, model_dir, out, cache=cache, console=console or quiet, device="cpu"
    )
    return read_weights(folder / WEIGHTS)


@pytest.fixture
def both(recipe: Recipe) -> Recipe:
    return changed(recipe, **BOTH)


@pytest.fixture
def prepared(model: DiffusionModel, both: Recipe) -> DistributionTerms:
    """The terms on the tiny model, whose adaptors have been moved away from zero."""
    add_adaptors(model, both)
    made = distribution_terms(model, both)
    assert made is not None
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in model.unet.named_parameters():
            if "lora_B" in name:
                weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    return made


def step(
    made: DistributionTerms, model: DiffusionModel, rows: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """One call at a step where both terms are on; the student's latents follow its adaptor."""
    noise = torch.randn(6, *model.latent_shape_CHW, generator=torch.Generator().manual_seed(0))
    conditions = model.conditions(["a red apple"] * len(rows))
    output = model.unet(noise[rows], 999, conditions.context_BLD).sample
    return made(noise[rows] - output, 0.5 * noise[rows], conditions, rows, 5)


def test_a_resumed_training_equals_an_unbroken_one(
    both: Recipe, model_dir: Path, cache: Path, tmp_path: Path, stop_after
) -> None:
    everything = changed(both, batch=3, micro_batch=2, ema_decay=0.9, gradient_checkpointing=True)
    unbroken = train(everything, model_dir, tmp_path / "unbroken", cache)
    stop_after(3)
    with pytest.raises(HipaError, match="stopped at step 3"):
        train(everything, model_dir, tmp_path / "broken", cache)
    stop_after(None)
    assert not differences(train(everything, model_dir, tmp_path / "broken", cache), unbroken)


@pytest.mark.usefixtures("half_precision")
@pytest.mark.parametrize("precision", ["no", "fp16"])
def test_a_score_that_waits_and_is_alone_moves_nothing_yet(
    recipe: Recipe, model_dir: Path, cache: Path, tmp_path: Path, precision: str
) -> None:
    settings = {**SCORE_ALONE, "mixed_precision": precision}
    waiting = changed(recipe, **settings | {"score": {**SCORE_ALONE["score"], "delay": 2}})
    for steps, moved in ((2, False), (3, True)):
        weights = train(changed(waiting, steps=steps), model_dir, tmp_path / str(steps), cache)
        second = [weight for name, weight in weights.items() if "lora_B" in name]
        assert any(weight.any() for weight in second) is moved


@pytest.mark.usefixtures("half_precision")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_both_terms_in_mixed_precision_learn_nearly_the_same(
    both: Recipe, model_dir: Path, cache: Path, tmp_path: Path, precision: str
) -> None:
    # One step: a few steps of AdamW would enlarge the rounding of small gradients.
    one = changed(both, steps=1, score=BOTH["score"] | {"delay": 0}, loss={"perceptual": "none"})
    exact = train(one, model_dir, tmp_path / "exact", cache)
    mixed = changed(one, mixed_precision=precision)
    got = train(mixed, model_dir, tmp_path / "mixed", cache)
    exact_N = torch.cat([weight.flatten() for weight in exact.values()])
    got_N = torch.cat([weight.flatten() for weight in got.values()])
    assert torch.isfinite(got_N).all()
    # All matrices A and what one step made of B; AdamW's first step is as long everywhere.
    assert torch.nn.functional.cosine_similarity(exact_N, got_N, dim=0) > 0.97

    state = torch.load(tmp_path / "mixed.run" / "state.pt", weights_only=True)["weights"]
    fake = [weight for name, weight in state.items() if ".fake." in name and "lora_B" in name]
    assert any(weight.abs().sum() > 0 for weight in fake)


@pytest.mark.parametrize("table", ["score", "latent_discriminator"])
def test_each_term_changes_what_is_learned_and_is_reported(
    recipe: Recipe, model_dir: Path, cache: Path, tmp_path: Path, table: str
) -> None:
    plain = train(recipe, model_dir, tmp_path / "plain", cache)
    lines = io.StringIO()
    only = changed(recipe, **{table: BOTH[table]})
    shown = Console(file=lines, width=250)
    assert differences(train(only, model_dir, tmp_path / "only", cache, shown), plain)
    names = {
        "score": ("score", "fake_score"),
        "latent_discriminator": ("latent_adversarial", "latent_discriminator"),
    }
    for name in names[table]:
        assert f"  {name} " in lines.getvalue()


def test_guidance_alone_needs_no_second_adaptor(
    recipe: Recipe, model_dir: Path, cache: Path, tmp_path: Path
) -> None:
    alone = changed(recipe, score={"weight": 1.0, "guidance": 4.0, "steps": 0})
    lines = io.StringIO()
    shown = Console(file=lines, width=250)
    got = train(alone, model_dir, tmp_path / "alone", cache, shown)
    assert "  score " in lines.getvalue()
    assert "fake_score" not in lines.getvalue()
    state = torch.load(tmp_path / "alone.run" / "state.pt", weights_only=True)["weights"]
    assert not [name for name in state if ".fake." in name]

    # A fake score that hardly learns is the frozen model.
    still = {"weight": 1.0, "guidance": 4.0, "learning_rate": 1e-12}
    expected = train(changed(recipe, score=still), model_dir, tmp_path / "still", cache)
    plain = train(recipe, model_dir, tmp_path / "plain", cache)
    nearest = max((weight - expected[name]).abs().max() for name, weight in got.items())
    away = max((weight - plain[name]).abs().max() for name, weight in got.items())
    assert nearest < 1e-3 < 1e-2 < away


def test_weights_of_zero_make_the_training_that_was(
    recipe: Recipe, model_dir: Path, cache: Path, tmp_path: Path, monkeypatch
) -> None:
    off = changed(recipe, score={"rank": 7}, latent_discriminator={"r1": 3.0})
    expected = train(recipe, model_dir, tmp_path / "plain", cache)
    monkeypatch.setattr(terms, "DistributionTerms", None)
    assert not differences(train(off, model_dir, tmp_path / "off", cache), expected)


def test_score_distillation_alone_makes_no_pairs_but_those_it_shows(
    recipe: Recipe, model_dir: Path, tmp_path: Path, monkeypatch
) -> None:
    made = []
    original = teacher_pairs.teacher_latents

    def counted(model: DiffusionModel, noise: torch.Tensor, *more: Any) -> torch.Tensor:
        made.append(len(noise))
        return original(model, noise, *more)

    monkeypatch.setattr(teacher_pairs, "teacher_latents", counted)
    loss = {**SCORE_ALONE["loss"], "latent_warmup_steps": 0}
    alone = changed(recipe, score=SCORE_ALONE["score"], loss=loss)
    weights = train(alone, model_dir, tmp_path / "alone", tmp_path / "cache")
    assert sum(made) == alone.samples
    assert any(weight.abs().sum() > 0 for name, weight in weights.items() if "lora_B" in name)


def test_the_student_learns_from_its_own_terms_alone(
    prepared: DistributionTerms, model: DiffusionModel
) -> None:
    total, _ = step(prepared, model, torch.tensor([0, 1]))
    total.backward()
    student = trained_parameters(model)
    assert all(weight.grad is not None for weight in student.values())
    assert all(weight.grad is None for weight in prepared.fake_weights.values())
    assert all(weight.grad is not None for weight in prepared.head_weights.values())
    base = [weight for name, weight in model.unet.named_parameters() if "lora_" not in name]
    assert all(weight.grad is None for weight in base)


def test_the_fake_score_learns_alone(prepared: DistributionTerms, model: DiffusionModel) -> None:
    rows = torch.tensor([0, 1])
    step(prepared, model, rows)
    assert prepared.following_steps == 2
    with prepared.following():
        loss, _ = prepared.fake_loss(rows, 5, 0)
        loss.backward()
    fake = prepared.fake_weights
    assert fake
    assert all(weight.grad is not None for weight in fake.values())
    for name, weight in model.unet.named_parameters():
        assert (weight.grad is not None) == (name in fake)
    assert prepared.following_steps == 0


def test_recomputed_activations_have_the_same_gradients(both: Recipe, model_dir: Path) -> None:
    # In the backward pass the UNet must be in the state of the forward pass.
    gradients = []
    for checkpointing in (False, True):
        model = DiffusionModel.load(model_dir, "cpu")
        recipe = changed(both, gradient_checkpointing=checkpointing)
        add_adaptors(model, recipe)
        made = distribution_terms(model, recipe)
        assert made is not None
        with torch.no_grad():
            for name, weight in model.unet.named_parameters():
                if "lora_B" in name:
                    weight.fill_(0.05)
        rows = torch.tensor([0, 1])
        total, _ = step(made, model, rows)
        total.backward()
        with made.following():
            loss, _ = made.fake_loss(rows, 5, 0)
            loss.backward()
        both_kinds = [*trained_parameters(model).values(), *made.fake_weights.values()]
        gradients.append([weight.grad.clone() for weight in both_kinds])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_the_discriminators_gradient_is_that_of_autograd(
    model: DiffusionModel, recipe: Recipe
) -> None:
    only = changed(recipe, latent_discriminator={"weight": 1.0, "timesteps": [300, 300]})
    add_adaptors(model, only)
    made = distribution_terms(model, only)
    assert made is not None
    assert made.discriminator is not None
    rows = torch.tensor([0, 4])
    latents = torch.randn(2, *model.latent_shape_CHW, requires_grad=True)
    conditions = model.conditions(["a red apple", "a boat"])
    total, _ = made(latents, torch.zeros(latents.shape), conditions, rows, 5)
    total.backward()

    # The same by one graph, with the UNet's own forward pass up to the middle block.
    _, noise = row_draws(0, 17, 5, rows, (300, 300), model.latent_shape_CHW)
    seen: list[torch.Tensor] = []
    for block in model.unet.down_blocks:
        block.register_forward_hook(lambda module, args, output: seen.append(output[1][0]))
    model.unet.mid_block.register_forward_hook(lambda module, args, output: seen.append(output))
    model.unet.disable_adapters()
    own = latents.detach().requires_grad_(True)
    alpha_bar = model.alpha_bar(300)
    z = alpha_bar**0.5 * own + (1 - alpha_bar) ** 0.5 * noise
    model.unet(z, 300, conditions.context_BLD)
    judged = made.discriminator(seen)
    (-(judged[0].mean() + judged[1].mean() + judged[2].mean()) / 3).backward()
    torch.testing.assert_close(latents.grad, own.grad, rtol=1e-4, atol=1e-7)


def test_pieces_of_a_batch_draw_what_the_batch_draws() -> None:
    shape = (4, 2, 2)
    whole = row_draws(0, 16, 3, torch.tensor([5, 2, 9]), (20, 980), shape)
    piece = row_draws(0, 16, 3, torch.tensor([9]), (20, 980), shape)
    assert torch.equal(whole[0][2:], piece[0])
    assert torch.equal(whole[1][2:], piece[1])
    other = row_draws(0, 16, 4, torch.tensor([9]), (20, 980), shape)
    assert not torch.equal(other[1], piece[1])
    many, _ = row_draws(0, 16, 3, torch.arange(2000), (20, 22), (1, 1, 1))
    assert sorted(many.unique().tolist()) == [20, 21, 22]


def test_the_fake_score_has_a_learning_rate_of_its_own(
    prepared: DistributionTerms, model: DiffusionModel, both: Recipe
) -> None:
    loss = HipaLoss(LossSettings(perceptual="none"))
    optimizer = new_optimizer(trained_parameters(model), loss, both.optimiser, prepared)
    student, heads, fake = optimizer.param_groups
    assert len(heads["params"]) == len(prepared.head_weights)
    assert fake["own_rate"] == 1e-2
    assert len(fake["params"]) == len(prepared.fake_weights)
    assert "own_rate" not in student


def test_the_fake_score_starts_as_the_frozen_model(model: DiffusionModel, both: Recipe) -> None:
    z = torch.randn(1, *model.latent_shape_CHW)
    conditions = model.conditions(["a boat"])
    with torch.no_grad():
        frozen = model.unet(z, 500, conditions.context_BLD).sample
        student_weights = add_adaptors(model, both)
        fake = fake_score.add_fake_score(model.unet, 3, seed=0)
        for weight in student_weights.values():
            weight.fill_(0.1)
        with fake_score.as_fake_score(model.unet):
            torch.testing.assert_close(model.unet(z, 500, conditions.context_BLD).sample, frozen)
        assert not torch.allclose(model.unet(z, 500, conditions.context_BLD).sample, frozen)
    assert not set(fake) & set(student_weights)
    # The student alone is what a training stores.
    assert trained_parameters(model).keys() == student_weights.keys()


def test_real_images_are_a_share_of_what_the_heads_take_for_true(
    both: Recipe, model: DiffusionModel, model_dir: Path, cache: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        pixels = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"photo {name}")
    judge = {"weight": 0.1, "real_images": str(folder), "real_share": 0.5}
    real = changed(both, score={}, latent_discriminator=judge)
    teachers = changed(both, score={}, latent_discriminator={"weight": 0.1})
    expected = train(teachers, model_dir, tmp_path / "teachers", cache)
    assert differences(train(real, model_dir, tmp_path / "real", cache), expected)

    add_adaptors(model, real)
    made = distribution_terms(model, real)
    assert made is not None
    rows = torch.arange(400)
    target = torch.zeros(400, *model.latent_shape_CHW)
    conditions = model.conditions([""]).repeated(400)
    of_real = Conditions(conditions.context_BLD[:1] + 1.0)
    made.real = terms.RealLatents(
        2, lambda chosen: torch.ones(len(chosen), 4, 8, 8), lambda chosen: of_real
    )
    latents, chosen = made._true_latents(target, conditions, rows, 0)
    is_real = latents[:, 0, 0, 0] == 1
    assert 0.4 < is_real.float().mean() < 0.6
    assert torch.equal(chosen.context_BLD[:, 0, 0] != conditions.context_BLD[:, 0, 0], is_real)


def test_a_value_with_a_gradient_of_its_own() -> None:
    at = torch.tensor([1.0, 2.0], requires_grad=True)
    value = with_gradient(torch.tensor(5.0), at, torch.tensor([3.0, 4.0]))
    value.backward()
    assert value.item() == 5.0
    assert at.grad.tolist() == [3.0, 4.0]


def test_what_a_model_cannot_have_is_refused(
    model: DiffusionModel, both: Recipe, tmp_path: Path
) -> None:
    late = changed(both, score={"weight": 1.0, "timesteps": [20, 1000]})
    with pytest.raises(HipaError, match=r"score\.timesteps = \[20, 1000\]: expected timesteps be"):
        distribution_terms(model, late)
    inpainting = make_model(tmp_path / "nine", in_channels=9)
    with pytest.raises(HipaError, match="fills holes only, and makes no whole images"):
        distribution_terms(DiffusionModel.load(inpainting, "cpu", "inpaint"), both)


def test_settings_that_contradict_each_other_are_refused(both: Recipe) -> None:
    with pytest.raises(ValueError, match="expected the first timestep, then the last"):
        changed(both, score={"weight": 1, "timesteps": [30, 20]})
    with pytest.raises(ValueError, match=r"leaves guidance alone, and the guidance is 1"):
        changed(both, score={"weight": 1, "steps": 0, "guidance": 1.0})
    late = {"weight": 1, "steps": 0, "timesteps": [200, 980], "guidance_below": 200}
    with pytest.raises(ValueError, match=r"score\.guidance_below = 200 switches off"):
        changed(both, score=late | {"guidance": 3.0})
    with pytest.raises(ValueError, match="real_images needs a weight above 0"):
        changed(both, latent_discriminator={"real_images": "photos"})


def test_whether_targets_are_needed_is_what_the_loss_says(recipe: Recipe) -> None:
    for loss in (
        {"perceptual": "none", "hf_weight": 0.0, "latent_weight": 0.0},
        {"perceptual": "none", "hf_weight": 0.0, "latent_weight": 0.0, "pixel_weight": 1.0},
        {"perceptual": "none", "fourier_weight": 0.0, "latent_weight": 0.0},
        {"perceptual_weight": 0.0, "hf_weight": 0.0, "latent_weight": 0.0},
        {"hf_weight": 0.0, "latent_weight": 0.0},
    ):
        made = changed(recipe, loss=loss)
        assert made.needs_targets == HipaLoss(made.loss).needs_images

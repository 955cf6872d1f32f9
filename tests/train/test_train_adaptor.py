"""Training an adaptor on the tiny model: exact resuming, and what each setting changes."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from rich.console import Console
from typer.testing import CliRunner

from hipa_deploy.bundle.text_settings import TextSettings
from hipa_deploy.commands.app import app
from hipa_deploy.disk.hashing import file_sha256
from hipa_deploy.errors import HipaError, StoppedError
from hipa_deploy.models.adaptor_folder import read_metadata
from hipa_deploy.train.loop.run import Run
from hipa_deploy.train.model.diffusion_model import DiffusionModel
from hipa_deploy.train.model.unet_adaptor import METADATA, WEIGHTS, start_note
from hipa_deploy.train.prediction.dry_run import to_toml
from hipa_deploy.train.recipes.recipe import OptimiserSettings, Recipe
from hipa_deploy.train.train_adaptor import train_adaptor
from tests.weights import differences, read_weights

QUIET = Console(file=io.StringIO())


def train(
    recipe: Recipe, model_dir: Path, out: Path, cache: Path, **options: Any
) -> dict[str, torch.Tensor]:
    """The adaptor's weights after training."""
    folder = train_adaptor(
        recipe, model_dir, out, cache=cache, console=QUIET, device="cpu", **options
    )
    return read_weights(folder / WEIGHTS)


def with_loss(recipe: Recipe, **settings: Any) -> Recipe:
    """The recipe with other settings of its loss."""
    return recipe.model_copy(update={"loss": recipe.loss.model_copy(update=settings)})


def absolute_sum(weights: dict[str, torch.Tensor]) -> float:
    """Sum of the absolute values of all B matrices, which start at zero."""
    return sum(float(weight.abs().sum()) for name, weight in weights.items() if "lora_B" in name)


def test_resumed_equals_unbroken(
    recipe: Recipe, model_dir: Path, cache: Path, tmp_path: Path, stop_after
) -> None:
    unbroken = train(recipe, model_dir, tmp_path / "unbroken", cache)
    for step in (1, 3):
        stop_after(step)
        expected = f"stopped at step {step} of 4. Run the same command to resume"
        with pytest.raises(StoppedError, match=expected) as stopped:
            train(recipe, model_dir, tmp_path / "broken", cache)
        assert stopped.value.exit_code == 130
        assert not (tmp_path / "broken").exists()
    stop_after(None)
    assert not differences(train(recipe, model_dir, tmp_path / "broken", cache), unbroken)
    reseeded = recipe.model_copy(update={"seed": 1})
    assert differences(train(reseeded, model_dir, tmp_path / "reseeded", cache), unbroken)


@pytest.mark.usefixtures("half_precision")
def test_resumed_equals_unbroken_with_everything_on(
    recipe: Recipe, model_dir: Path, cache: Path, tmp_path: Path, stop_after
) -> None:
    changes = {"batch": 3, "micro_batch": 2, "ema_decay": 0.9, "mixed_precision": "bf16"}
    everything = with_loss(recipe, adversarial_weight=0.1).model_copy(update=changes)
    unbroken = train(everything, model_dir, tmp_path / "unbroken", cache)
    stop_after(3)
    with pytest.raises(HipaError, match="stopped at step 3"):
        train(everything, model_dir, tmp_path / "broken", cache)
    stop_after(None)
    assert not differences(train(everything, model_dir, tmp_path / "broken", cache), unbroken)


def test_micro_batches_give_the_gradient_of_the_batch(
    recipe: Recipe, model_dir: Path, cache: Path, tmp_path: Path
) -> None:
    whole = recipe.model_copy(update={"batch": 3, "steps": 2})
    divided = whole.model_copy(update={"micro_batch": 2})
    expected = train(whole, model_dir, tmp_path / "whole", cache)
    got = train(divided, model_dir, tmp_path / "divided", cache)
    # Adam takes full steps along gradients that are zero but for rounding, so single weights may
    # differ: all of them are compared as one vector.
    expected_N = torch.cat([weight.flatten() for weight in expected.values()])
    got_N = torch.cat([weight.flatten() for weight in got.values()])
    assert (got_N - expected_N).norm() < 1e-2 * expected_N.norm()


def test_the_averaged_weights_are_stored(
    recipe: Recipe, model_dir: Path, cache: Path, tmp_path: Path
) -> None:
    averaged = recipe.model_copy(update={"ema_decay": 0.9})
    stored = train(averaged, model_dir, tmp_path / "adaptor", cache)
    state = torch.load(tmp_path / "adaptor.run" / "state.pt", weights_only=True)
    assert absolute_sum(stored) == pytest.approx(absolute_sum(state["average"]), rel=1e-5)
    assert absolute_sum(stored) < 0.95 * absolute_sum(state["weights"])


def test_the_last_weights_are_stored_where_the_recipe_says_so(
    recipe: Recipe, model_dir: Path, cache: Path, tmp_path: Path
) -> None:
    last = recipe.model_copy(update={"ema_decay": 0.9, "written": "last"})
    stored = train(last, model_dir, tmp_path / "adaptor", cache)
    state = torch.load(tmp_path / "adaptor.run" / "state.pt", weights_only=True)
    assert absolute_sum(stored) == pytest.approx(absolute_sum(state["weights"]), rel=1e-5)

    # A finished run can write the other one too.
    shutil.rmtree(tmp_path / "adaptor")
    average = last.model_copy(update={"written": "average"})
    stored = train(average, model_dir, tmp_path / "adaptor", cache)
    assert absolute_sum(stored) == pytest.approx(absolute_sum(state["average"]), rel=1e-5)


def test_sample_grids_show_the_weights_that_would_be_written(
    recipe: Recipe, model_dir: Path, cache: Path, tmp_path: Path
) -> None:
    grids = {}
    for decay, written in ((0.0, "average"), (0.9, "last"), (0.9, "average")):
        out = tmp_path / f"{decay}-{written}"
        changes = {"ema_decay": decay, "written": written}
        train(recipe.model_copy(update=changes), model_dir, out, cache)
        samples = out.with_name(f"{out.name}.run") / "samples"
        grids[decay, written] = (samples / "step-00000004.png").read_bytes()
    assert grids[0.9, "last"] == grids[0.0, "average"]
    assert grids[0.9, "average"] != grids[0.0, "average"]


def test_balanced_loss_resumes_exactly(
    recipe: Recipe, model_dir: Path, cache: Path, tmp_path: Path, stop_after
) -> None:
    balanced = with_loss(
        recipe, latent_warmup_steps=0, balance="gradient", balance_every=3, pixel_weight=1.0
    )
    unbroken = train(balanced, model_dir, tmp_path / "unbroken", cache)
    stop_after(2)  # between two measurements
    with pytest.raises(HipaError, match="stopped at step 2"):
        train(balanced, model_dir, tmp_path / "broken", cache)
    stop_after(None)
    assert not differences(train(balanced, model_dir, tmp_path / "broken", cache), unbroken)
    fixed = with_loss(balanced, balance="fixed")
    assert differences(train(fixed, model_dir, tmp_path / "fixed", cache), unbroken)


def test_a_balanced_loss_needs_whole_batches(
    recipe: Recipe, model_dir: Path, cache: Path, tmp_path: Path
) -> None:
    divided = with_loss(recipe, balance="gradient").model_copy(update={"micro_batch": 1})
    with pytest.raises(HipaError, match="one process, and no micro_batch"):
        train(divided, model_dir, tmp_path / "out", cache)


def test_steps_with_latent_terms_alone_never_decode(
    recipe: Recipe, model_dir: Path, cache: Path, tmp_path: Path, monkeypatch
) -> None:
    latent_terms = with_loss(
        recipe,
        latent_warmup_steps=1,
        perceptual="none",
        hf_weight=0.0,
        latent="huber",
        latent_hf_weight=1.0,
    )
    original = DiffusionModel.decode
    with_gradient = []

    def recorded(model: DiffusionModel, latents: torch.Tensor) -> torch.Tensor:
        with_gradient.append(torch.is_grad_enabled())
        return original(model, latents)

    monkeypatch.setattr(DiffusionModel, "decode", recorded)
    rarely_sampled = latent_terms.model_copy(update={"sample_every": 100})
    train(rarely_sampled, model_dir, tmp_path / "adaptor", cache)
    assert with_gradient  # the sample grid is decoded
    assert not any(with_gradient)


def test_weights_and_metadata_of_an_adaptor(
    recipe: Recipe, model_dir: Path, cache: Path, tmp_path: Path
) -> None:
    weights = train(recipe, model_dir, tmp_path / "adaptor", cache)
    assert absolute_sum(weights) > 0
    metadata = json.loads((tmp_path / "adaptor" / METADATA).read_text())
    assert (metadata["rank"], metadata["alpha"], metadata["timestep"]) == (2, 2, 999)
    assert metadata["recipe"]["teacher"]["guidance"] == 5.0
    with pytest.raises(HipaError, match="is not empty"):
        train(recipe, model_dir, tmp_path / "adaptor", cache)


def test_an_adaptor_says_how_its_prompts_were_encoded(
    recipe: Recipe, model_dir: Path, cache: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a (red:1.3) apple\n" + "w" * 151 + "\n")
    text = TextSettings(context_tokens=154, prompt_weights=True)
    recipe = recipe.model_copy(update={"prompts": str(prompts), "text": text})
    console = Console(file=io.StringIO(), width=500)
    train_adaptor(recipe, model_dir, tmp_path / "out", cache=cache, console=console, device="cpu")
    assert read_metadata(tmp_path / "out", model_dir).text == text
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "1 of 2 prompts have more tokens than a context of 154 holds" in said


def test_v_prediction_and_a_start_from_another_adaptor(
    recipe: Recipe, v_model_dir: Path, model_dir: Path, cache: Path, tmp_path: Path
) -> None:
    # A step of nearly no length from the first adaptor ends at the first adaptor.
    initial = tmp_path / "first"
    first = train(recipe, v_model_dir, initial, cache)
    short = recipe.model_copy(update={"steps": 1, "gradient_checkpointing": True})
    tiny_rate = short.model_copy(update={"optimiser": OptimiserSettings(learning_rate=1e-9)})
    second = train(tiny_rate, v_model_dir, tmp_path / "second", cache, initial_adaptor=initial)
    assert all(torch.allclose(second[name], first[name], atol=1e-6) for name in first)
    assert read_metadata(initial).initial_sha256 is None
    assert read_metadata(tmp_path / "second").initial_sha256 == file_sha256(initial / WEIGHTS)
    known = read_metadata(initial).prompts_sha256
    assert read_metadata(tmp_path / "second").earlier_prompts_sha256 == (known,)

    # The start belongs to the run's identity, and must fit the model.
    (tmp_path / "second").rename(tmp_path / "elsewhere")
    expected = r"second\.run was started with another adaptor to start from"
    with pytest.raises(HipaError, match=expected):
        train(tiny_rate, v_model_dir, tmp_path / "second", cache)
    unused = tmp_path / "unused"
    with pytest.raises(HipaError, match="trained on another base model"):
        train(short, model_dir, tmp_path / "third", unused, initial_adaptor=initial)
    assert not unused.exists()  # refused before any teacher pair was made


def test_a_start_that_inference_would_refuse(
    recipe: Recipe, v_model_dir: Path, cache: Path, tmp_path: Path
) -> None:
    """The noise schedule and the clip skip of the adaptor to start from are those of the run."""
    initial = tmp_path / "first"
    train(recipe, v_model_dir, initial, cache)
    other = tmp_path / "zero-snr"
    shutil.copytree(v_model_dir, other)
    scheduler = other / "scheduler" / "scheduler_config.json"
    values = json.loads(scheduler.read_text())
    scheduler.write_text(json.dumps(values | {"rescale_betas_zero_snr": True}))
    unused = tmp_path / "unused"
    with pytest.raises(HipaError, match=r"trained with another noise schedule: .* rescale_betas"):
        train(recipe, other, tmp_path / "second", unused, initial_adaptor=initial)

    record = json.loads((initial / METADATA).read_text())
    (initial / METADATA).write_text(json.dumps(record | {"text": {"clip_skip": 1}}))
    with pytest.raises(HipaError, match=r"with clip skip 1, and the recipe has 0\. Set clip_skip"):
        train(recipe, v_model_dir, tmp_path / "second", unused, initial_adaptor=initial)
    assert not unused.exists()


def test_a_start_at_another_timestep_is_said(
    recipe: Recipe, model_dir: Path, cache: Path, tmp_path: Path
) -> None:
    initial = tmp_path / "first"
    train(recipe, model_dir, initial, cache)
    moved = recipe.model_copy(update={"timestep": 600, "steps": 1})
    console = Console(file=io.StringIO(), width=500)
    out = tmp_path / "second"
    train_adaptor(
        moved, model_dir, out, initial_adaptor=initial, cache=cache, console=console, device="cpu"
    )
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert f"was trained for timestep {recipe.timestep}, and the recipe asks it at 600" in said
    assert f"set timestep = {recipe.timestep} in the recipe" in said
    assert read_metadata(out).timestep == 600

    path = tmp_path / "moved.toml"
    path.write_text(to_toml(moved), encoding="utf-8")
    command = ["train", "--model", str(model_dir), "--recipe", str(path), "--from", str(initial)]
    done = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "unused"), "--dry-run"])
    assert "the recipe asks it at 600" in done.output

    # Another task has a timestep of its own, and an edit one for each strength.
    assert start_note(recipe, initial) is None
    assert start_note(moved.model_copy(update={"task": "inpaint"}), initial) is None


def test_loss_goes_down(
    recipe: Recipe, model_dir: Path, cache: Path, tmp_path: Path, monkeypatch
) -> None:
    totals = []
    monkeypatch.setattr(Run, "check_finite", lambda run, loss, norm: totals.append(loss))
    changes = {"steps": 12, "batch": 6, "sample_every": 12, "checkpoint_every": 12}
    longer = with_loss(recipe, latent_warmup_steps=0).model_copy(update=changes)
    train(longer, model_dir, tmp_path / "adaptor", cache)
    assert totals[-1] < 0.9 * totals[0]


def test_gradient_checkpointing_changes_no_weight(
    recipe: Recipe, model_dir: Path, cache: Path, tmp_path: Path
) -> None:
    short = recipe.model_copy(update={"steps": 2})
    checkpointed = short.model_copy(update={"gradient_checkpointing": True})
    expected = train(short, model_dir, tmp_path / "plain", cache)
    weights = train(checkpointed, model_dir, tmp_path / "checkpointed", cache)
    assert all(torch.allclose(weights[name], expected[name], atol=1e-5) for name in expected)


def test_gradient_checkpointing_reaches_the_decoder(
    recipe: Recipe, model_dir: Path, cache: Path, tmp_path: Path, monkeypatch
) -> None:
    """A checkpointed block runs once forward and once more in the backward pass."""
    original = ResnetBlock2D.forward
    calls = []

    def count(block: ResnetBlock2D, *arguments: Any, **options: Any) -> torch.Tensor:
        # Blocks without a time embedding are the VAE's.
        calls[-1] += torch.is_grad_enabled() and block.time_emb_proj is None
        return original(block, *arguments, **options)

    monkeypatch.setattr(ResnetBlock2D, "forward", count)
    one_step = with_loss(recipe, latent_warmup_steps=0).model_copy(update={"steps": 1})
    for checkpointing in (False, True):
        calls.append(0)
        changed = one_step.model_copy(update={"gradient_checkpointing": checkpointing})
        train(changed, model_dir, tmp_path / str(checkpointing), cache)
    assert calls[0] > 0
    assert calls[1] == 2 * calls[0]

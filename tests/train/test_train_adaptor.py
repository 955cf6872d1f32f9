from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from PIL import Image
from rich.console import Console

from hipa_deploy.errors import HipaError
from hipa_deploy.hashing import file_sha256
from hipa_deploy.models.adaptor_folder import read_metadata
from hipa_deploy.train import train_adaptor as loop
from hipa_deploy.train.loop.run import Run, Scalars, batch_rows, learning_rate
from hipa_deploy.train.model.unet_adaptor import METADATA, WEIGHTS
from hipa_deploy.train.recipes.recipe import OptimiserSettings, Recipe
from hipa_deploy.train.train_adaptor import train_adaptor
from tests.weights import differences, read_weights

QUIET = Console(file=io.StringIO())


def train(
    recipe: Recipe, model_dir: Path, out: Path, cache: Path, **more: Any
) -> dict[str, torch.Tensor]:
    """The weights after training."""
    folder = train_adaptor(recipe, model_dir, out, cache=cache, console=QUIET, device="cpu", **more)
    return read_weights(folder / WEIGHTS)


def test_resumed_equals_unbroken(
    recipe: Recipe, model_dir: Path, cache: Path, tmp_path: Path, stop_after
) -> None:
    unbroken = train(recipe, model_dir, tmp_path / "unbroken", cache)
    for step in (1, 3):
        stop_after(step)
        with pytest.raises(
            HipaError, match=f"stopped at step {step} of 4. Run the same command to resume"
        ):
            train(recipe, model_dir, tmp_path / "broken", cache)
        assert not (tmp_path / "broken").exists()
    stop_after(None)
    assert not differences(train(recipe, model_dir, tmp_path / "broken", cache), unbroken)
    reseeded = recipe.model_copy(update={"seed": 1})
    assert differences(train(reseeded, model_dir, tmp_path / "reseeded", cache), unbroken)


def test_resumed_equals_unbroken_with_everything_on(
    recipe: Recipe, model_dir: Path, cache: Path, tmp_path: Path, stop_after
) -> None:
    loss = recipe.loss.model_copy(update={"adversarial_weight": 0.1})
    changes = {
        "batch": 3,
        "micro_batch": 2,
        "ema_decay": 0.9,
        "mixed_precision": "bf16",
        "loss": loss,
    }
    everything = recipe.model_copy(update=changes)
    unbroken = train(everything, model_dir, tmp_path / "unbroken", cache)
    stop_after(3)
    with pytest.raises(HipaError, match="stopped at step 3"):
        train(everything, model_dir, tmp_path / "broken", cache)
    stop_after(None)
    assert not differences(train(everything, model_dir, tmp_path / "broken", cache), unbroken)


def test_a_batch_in_pieces_is_the_same_batch(
    recipe: Recipe, model_dir: Path, cache: Path, tmp_path: Path
) -> None:
    whole = recipe.model_copy(update={"batch": 3, "steps": 2})
    expected = train(whole, model_dir, tmp_path / "whole", cache)
    pieces = train(
        whole.model_copy(update={"micro_batch": 2}), model_dir, tmp_path / "pieces", cache
    )
    # Adam makes whole steps of gradients that are zero but for rounding: compare them all, not each.
    pieces_N, expected_N = (
        torch.cat([w.flatten() for w in weights.values()]) for weights in (pieces, expected)
    )
    assert (pieces_N - expected_N).norm() < 1e-2 * expected_N.norm()


def test_the_average_is_what_is_stored(
    recipe: Recipe, model_dir: Path, cache: Path, tmp_path: Path
) -> None:
    stored = train(
        recipe.model_copy(update={"ema_decay": 0.9}), model_dir, tmp_path / "adaptor", cache
    )
    state = torch.load(tmp_path / "adaptor.run" / "state.pt", weights_only=True)
    raw, mean = (
        sum(float(w.abs().sum()) for n, w in state[k].items() if "lora_B" in n)
        for k in ("weights", "average")
    )
    found = sum(float(weight.abs().sum()) for name, weight in stored.items() if "lora_B" in name)
    assert found == pytest.approx(mean, rel=1e-5)
    assert found < 0.95 * raw


def test_balanced_loss_resumes_exactly(
    recipe: Recipe, model_dir: Path, cache: Path, tmp_path: Path, stop_after
) -> None:
    loss = {
        "latent_warmup_steps": 0,
        "balance": "gradient",
        "balance_every": 3,
        "pixel_weight": 1.0,
    }
    recipe = recipe.model_copy(update={"loss": recipe.loss.model_copy(update=loss)})
    unbroken = train(recipe, model_dir, tmp_path / "unbroken", cache)
    stop_after(2)  # between two measurements
    with pytest.raises(HipaError, match="stopped at step 2"):
        train(recipe, model_dir, tmp_path / "broken", cache)
    stop_after(None)
    assert not differences(train(recipe, model_dir, tmp_path / "broken", cache), unbroken)
    plain = recipe.model_copy(update={"loss": recipe.loss.model_copy(update={"balance": "fixed"})})
    assert differences(train(plain, model_dir, tmp_path / "plain", cache), unbroken)


def test_latent_terms_alone_never_decode(
    recipe: Recipe, model_dir: Path, cache: Path, tmp_path: Path, monkeypatch
) -> None:
    loss = {
        "latent_warmup_steps": 1,
        "perceptual": "none",
        "hf_weight": 0.0,
        "latent": "huber",
        "latent_hf_weight": 1.0,
    }
    recipe = recipe.model_copy(
        update={"loss": recipe.loss.model_copy(update=loss), "sample_every": 100}
    )
    decode, calls = loop.DiffusionModel.decode, []

    def counted(model: loop.DiffusionModel, latents: torch.Tensor) -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        return decode(model, latents)

    monkeypatch.setattr(loop.DiffusionModel, "decode", counted)
    train(recipe, model_dir, tmp_path / "adaptor", cache)
    assert calls
    assert not any(calls)


def test_what_a_run_leaves(recipe: Recipe, model_dir: Path, cache: Path, tmp_path: Path) -> None:
    weights = train(recipe, model_dir, tmp_path / "adaptor", cache)
    assert any(
        weight.abs().sum() > 0
        for name, weight in weights.items()
        if "lora_B" in name or "lora.up" in name
    )
    metadata = json.loads((tmp_path / "adaptor" / METADATA).read_text())
    assert (metadata["rank"], metadata["alpha"], metadata["timestep"]) == (2, 2, 999)
    assert metadata["recipe"]["teacher"]["guidance"] == 5.0
    run = tmp_path / "adaptor.run"
    assert {path.name for path in run.iterdir()} == {"state.pt", "samples", "tensorboard"}
    assert {path.name for path in (run / "samples").iterdir()} == {
        "step-00000002.png",
        "step-00000004.png",
    }
    assert Image.open(run / "samples" / "step-00000004.png").size == (3 * 34, 2 * 34)
    with pytest.raises(HipaError, match="is not empty"):
        train(recipe, model_dir, tmp_path / "adaptor", cache)


def test_v_prediction_and_a_start_from_another_adaptor(
    recipe: Recipe, v_model_dir: Path, model_dir: Path, cache: Path, tmp_path: Path
) -> None:
    first = train(recipe, v_model_dir, tmp_path / "first", cache)
    short = recipe.model_copy(update={"steps": 1, "gradient_checkpointing": True})
    tiny_rate = short.model_copy(update={"optimiser": OptimiserSettings(learning_rate=1e-9)})
    second = train(
        tiny_rate, v_model_dir, tmp_path / "second", cache, initial_adaptor=tmp_path / "first"
    )
    assert all(torch.allclose(second[name], first[name], atol=1e-6) for name in first)
    assert read_metadata(tmp_path / "first").initial_sha256 is None
    assert read_metadata(tmp_path / "second").initial_sha256 == file_sha256(
        tmp_path / "first" / WEIGHTS
    )
    (tmp_path / "second").rename(tmp_path / "elsewhere")
    with pytest.raises(
        HipaError, match=r"second\.run was started with another adaptor to start from"
    ):
        train(tiny_rate, v_model_dir, tmp_path / "second", cache)
    with pytest.raises(HipaError, match="trained on another base model"):
        train(
            short,
            model_dir,
            tmp_path / "third",
            tmp_path / "unused",
            initial_adaptor=tmp_path / "first",
        )
    assert not (tmp_path / "unused").exists()  # refused before any teacher pair was made


def test_loss_goes_down(
    recipe: Recipe, model_dir: Path, cache: Path, tmp_path: Path, monkeypatch
) -> None:
    totals = []
    monkeypatch.setattr(Run, "check_finite", lambda run, loss, norm: totals.append(loss))
    longer = {
        "steps": 12,
        "batch": 6,
        "sample_every": 12,
        "checkpoint_every": 12,
        "loss": recipe.loss.model_copy(update={"latent_warmup_steps": 0}),
    }
    train(recipe.model_copy(update=longer), model_dir, tmp_path / "adaptor", cache)
    assert totals[-1] < 0.9 * totals[0]


def test_gradient_checkpointing_changes_nothing(
    recipe: Recipe, model_dir: Path, cache: Path, tmp_path: Path
) -> None:
    short = recipe.model_copy(update={"steps": 2})
    plain = train(short, model_dir, tmp_path / "plain", cache)
    frugal = short.model_copy(update={"gradient_checkpointing": True})
    weights = train(frugal, model_dir, tmp_path / "frugal", cache)
    assert all(torch.allclose(weights[name], plain[name], atol=1e-5) for name in plain)


def test_gradient_checkpointing_reaches_the_decoder(
    recipe: Recipe, model_dir: Path, cache: Path, tmp_path: Path, monkeypatch
) -> None:
    """A checkpointed block runs once forward and once more in the backward pass."""
    calls, original = [], ResnetBlock2D.forward

    def count(block: ResnetBlock2D, *arguments: Any, **more: Any) -> torch.Tensor:
        calls[-1] += (
            torch.is_grad_enabled() and block.time_emb_proj is None
        )  # without time: the decoder's
        return original(block, *arguments, **more)

    monkeypatch.setattr(ResnetBlock2D, "forward", count)
    decoded = recipe.model_copy(
        update={"steps": 1, "loss": recipe.loss.model_copy(update={"latent_warmup_steps": 0})}
    )
    for frugal in (False, True):
        calls.append(0)
        train(
            decoded.model_copy(update={"gradient_checkpointing": frugal}),
            model_dir,
            tmp_path / str(frugal),
            cache,
        )
    assert calls[0] > 0
    assert calls[1] == 2 * calls[0]


@pytest.fixture
def stopped_run(recipe: Recipe, model_dir: Path, cache: Path, tmp_path: Path, stop_after) -> Path:
    """The checkpoint of a run to ``tmp_path / "adaptor"`` that was stopped after a step."""
    stop_after(1)
    with pytest.raises(HipaError, match="stopped"):
        train(recipe, model_dir, tmp_path / "adaptor", cache)
    stop_after(None)
    return tmp_path / "adaptor.run" / "state.pt"


def test_another_recipe_does_not_resume(
    recipe: Recipe, model_dir: Path, cache: Path, tmp_path: Path, stopped_run: Path
) -> None:
    changed = recipe.model_copy(update={"loss": recipe.loss.model_copy(update={"hf_weight": 2.0})})
    with pytest.raises(HipaError, match=r"another recipe: loss.hf_weight was 1.0, is 2.0"):
        train(changed, model_dir, tmp_path / "adaptor", cache)
    stopped_run.write_bytes(b"PK")
    with pytest.raises(HipaError, match="is damaged"):
        train(recipe, model_dir, tmp_path / "adaptor", cache)


def test_a_run_from_before_a_setting_came_resumes(
    recipe: Recipe, model_dir: Path, cache: Path, tmp_path: Path, stopped_run: Path
) -> None:
    state = torch.load(stopped_run, weights_only=True)
    identity = json.loads(state["identity"])
    del identity["recipe"]["adaptor"]["encoder_rank"]
    torch.save(state | {"identity": json.dumps(identity)}, stopped_run)
    assert train(recipe, model_dir, tmp_path / "adaptor", cache)


def test_divergence_stops_and_keeps_the_checkpoint(
    recipe: Recipe, model_dir: Path, cache: Path, tmp_path: Path, monkeypatch
) -> None:
    original = loop.task_latents
    calls = []

    def explode(*args: Any, **constants: Any) -> torch.Tensor:
        calls.append(1)
        latents = original(*args, **constants)
        return (
            latents * float("nan") if len(calls) == 5 else latents
        )  # base samples, 1, 2, samples, 3

    monkeypatch.setattr(loop, "task_latents", explode)
    with pytest.raises(
        HipaError, match=r"diverged: loss nan.*at step 3. The checkpoint of step 2 is kept"
    ):
        train(recipe, model_dir, tmp_path / "adaptor", cache)
    assert torch.load(tmp_path / "adaptor.run" / "state.pt", weights_only=True)["step"] == 2
    assert not (tmp_path / "adaptor").exists()


def test_a_full_disk_keeps_the_last_checkpoint(
    recipe: Recipe, model_dir: Path, cache: Path, tmp_path: Path, monkeypatch
) -> None:
    original = Run.accumulate
    scratch = tmp_path / "adaptor.run" / "state.tmp"

    def fill(run: Run, *arguments: Any) -> dict[str, float]:
        if run.step == 3:  # the next checkpoint goes where every write ends as on a full disk
            scratch.symlink_to("/dev/full")
        return original(run, *arguments)

    monkeypatch.setattr(Run, "accumulate", fill)
    with pytest.raises(
        HipaError, match=r"state.pt cannot be written: .*The checkpoint of step 2 is kept"
    ):
        train(recipe, model_dir, tmp_path / "adaptor", cache)
    assert torch.load(tmp_path / "adaptor.run" / "state.pt", weights_only=True)["step"] == 2
    assert not scratch.is_symlink()
    monkeypatch.undo()
    again = train(recipe, model_dir, tmp_path / "again", cache)
    assert not differences(train(recipe, model_dir, tmp_path / "adaptor", cache), again)


def test_scalars_that_cannot_be_closed_do_not_hide_what_happened(
    tmp_path: Path, monkeypatch
) -> None:
    def full(self: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.close", full)
    with pytest.raises(HipaError, match="the cause"), Scalars(tmp_path, 0):
        raise HipaError("the cause")
    with pytest.raises(OSError, match="No space"), Scalars(tmp_path, 0):
        pass


def test_batches_depend_on_seed_and_step() -> None:
    assert torch.equal(batch_rows(100, 8, 0, 5), batch_rows(100, 8, 0, 5))
    assert not torch.equal(batch_rows(100, 8, 0, 5), batch_rows(100, 8, 0, 6))
    assert len(set(batch_rows(8, 8, 0, 0).tolist())) == 8
    assert len(batch_rows(2, 8, 0, 0)) == 8


def test_learning_rate() -> None:
    settings = OptimiserSettings(learning_rate=1.0, warmup_steps=4, decay="cosine")
    assert [learning_rate(settings, step, 104) for step in (0, 3)] == [0.25, 1.0]
    assert learning_rate(settings, 54, 104) == pytest.approx(0.505)
    assert learning_rate(settings, 104, 104) == pytest.approx(0.01)
    assert learning_rate(OptimiserSettings(learning_rate=1.0), 50, 100) == 1.0

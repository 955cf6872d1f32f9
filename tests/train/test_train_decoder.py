from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hipa_deploy.errors import HipaError
from hipa_deploy.export.model_parts import ModelParts
from hipa_deploy.models.decoder_folder import read_decoder_metadata, vae_sha256
from hipa_deploy.train import train_decoder as module
from hipa_deploy.train.data import teacher_pairs
from hipa_deploy.train.loop.run import Run
from hipa_deploy.train.model.diffusion_model import DiffusionModel
from hipa_deploy.train.model.unet_adaptor import one_step_model
from hipa_deploy.train.recipes.held_out_settings import HeldOutSettings
from hipa_deploy.train.recipes.recipe import DecoderRecipe, Recipe
from hipa_deploy.train.train_adaptor import train_adaptor
from hipa_deploy.train.train_decoder import (
    HELD_OUT,
    TRAINING,
    decoder_examples,
    draw_latents,
    measure_fidelity,
    perturbed,
    split_prompts,
    train_decoder,
)
from tests.tiny_sdxl import make_sdxl
from tests.weights import differences, read_weights

QUIET = Console(file=io.StringIO())


@pytest.fixture
def decoder_recipe() -> DecoderRecipe:
    return DecoderRecipe.model_validate(
        {
            "kind": "decoder",
            "prompts": "model:prompts.txt",
            "steps": 4,
            "batch": 2,
            "checkpoint_every": 2,
            "sample_every": 2,
            "samples": 2,
            "decoder": {"channels": 8, "blocks": [1, 1, 0]},
            "latents": {"count": 6, "held_out": 4},
            "optimiser": {"learning_rate": 1e-2},
        }
    )


@pytest.fixture(scope="module")
def adaptor(model_dir: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = {
        "prompts": "model:prompts.txt",
        "steps": 1,
        "batch": 2,
        "adaptor": {"rank": 2},
        "teacher": {"steps": 2, "pairs": 2},
        "optimiser": {"learning_rate": 0.1},
    }
    recipe = Recipe.model_validate(settings)
    out = tmp_path_factory.mktemp("adaptor") / "adaptor"
    return train_adaptor(recipe, model_dir, out, cache=cache, device="cpu", console=QUIET)


def train(
    recipe: DecoderRecipe, model_dir: Path, out: Path, **options: Any
) -> dict[str, torch.Tensor]:
    """The stored weights after training."""
    folder = train_decoder(recipe, model_dir, out, console=QUIET, device="cpu", **options)
    return read_weights(folder / "diffusion_pytorch_model.safetensors")


def test_a_decoder_for_the_latents_of_sdxl(decoder_recipe: DecoderRecipe, tmp_path: Path) -> None:
    """It learns the VAE's images of latents as SDXL's UNet gives them, and an export takes it."""
    base = make_sdxl(tmp_path / "sdxl")
    short = train(decoder_recipe, base, tmp_path / "short")
    long = train(decoder_recipe.model_copy(update={"steps": 20}), base, tmp_path / "long")
    assert differences(short, long)
    fidelity = read_decoder_metadata(tmp_path / "long").fidelity
    assert fidelity.psnr_db > read_decoder_metadata(tmp_path / "short").fidelity.psnr_db
    assert read_decoder_metadata(tmp_path / "long").base_vae_sha256 == vae_sha256(base)

    # Its targets are the pipeline's own: the VAE's image of the latents over its own factor.
    model = DiffusionModel.load(base, "cpu")
    generate = one_step_model(model, decoder_recipe.timestep, None)
    prompts = (base / "prompts.txt").read_text().splitlines()
    rows = draw_latents(model, generate, prompts, 2, 0, TRAINING)
    latents = rows(torch.tensor([0]))
    vae = AutoencoderKL.from_pretrained(base, subfolder="vae")
    with torch.no_grad():
        expected = vae.decode(latents / 0.13025).sample / 2 + 0.5
    assert torch.allclose(model.decode(latents), expected, atol=1e-5)

    parts = ModelParts.open(str(base))
    assert parts.tiny_decoder(tmp_path / "long").config.scaling_factor == 1.0
    other = make_sdxl(tmp_path / "other", seed=1)
    with pytest.raises(HipaError, match="another VAE"):
        ModelParts.open(str(other)).tiny_decoder(tmp_path / "long")


def test_a_run_leaves_a_decoder_and_its_run_folder(
    decoder_recipe: DecoderRecipe, model_dir: Path, tmp_path: Path
) -> None:
    weights = train(decoder_recipe, model_dir, tmp_path / "tiny")
    assert {weight.dtype for weight in weights.values()} == {torch.float16}
    tiny = AutoencoderTiny.from_pretrained(tmp_path / "tiny", torch_dtype=torch.float32)
    assert tiny.config.scaling_factor == 1.0
    with torch.no_grad():
        assert tiny.decode(torch.zeros(2, 4, 8, 8)).sample.shape == (2, 3, 32, 32)
        assert tiny.encode(torch.zeros(2, 3, 32, 32)).latents.shape == (2, 4, 8, 8)
    metadata = read_decoder_metadata(tmp_path / "tiny")
    assert metadata.base_vae_sha256 == vae_sha256(model_dir)
    assert (metadata.latent_channels, metadata.factor, metadata.steps_trained) == (4, 4, 4)
    assert metadata.recipe["decoder"] == {"channels": 8, "blocks": [1, 1, 0]}
    assert metadata.fidelity.images == 4
    run = tmp_path / "tiny.run"
    assert {path.name for path in run.iterdir()} == {"state.pt", "samples", "tensorboard"}
    assert Image.open(run / "samples" / "step-00000004.png").size == (268, 306)
    with pytest.raises(HipaError, match="is not empty"):
        train(decoder_recipe, model_dir, tmp_path / "tiny")


def test_resumed_equals_unbroken(
    decoder_recipe: DecoderRecipe, model_dir: Path, tmp_path: Path, stop_after
) -> None:
    unbroken = train(decoder_recipe, model_dir, tmp_path / "unbroken")
    stop_after(3)
    expected = r"stopped at step 3 of 4. Run the same command to resume"
    with pytest.raises(HipaError, match=expected):
        train(decoder_recipe, model_dir, tmp_path / "broken")
    assert not (tmp_path / "broken").exists()
    stop_after(None)
    assert not differences(train(decoder_recipe, model_dir, tmp_path / "broken"), unbroken)

    # So does a finished run that is extended.
    shorter = decoder_recipe.model_copy(update={"steps": 2})
    train(shorter, model_dir, tmp_path / "short")
    assert not differences(train(decoder_recipe, model_dir, tmp_path / "short"), unbroken)
    (spent,) = read_decoder_metadata(tmp_path / "short").training
    assert spent.steps == 4
    assert (tmp_path / "short.run" / "finished" / "step-00000002").is_dir()
    adaptor_recipe = Recipe.model_validate(
        {"prompts": "model:prompts.txt", "steps": 8, "teacher": {"pairs": 2}}
    )
    with pytest.raises(HipaError, match="it is a decoder, and the recipe is of kind adaptor"):
        train_adaptor(adaptor_recipe, model_dir, tmp_path / "short", device="cpu")


def test_the_last_weights_are_written_where_the_recipe_says_so(
    decoder_recipe: DecoderRecipe, model_dir: Path, tmp_path: Path
) -> None:
    averaged = decoder_recipe.model_copy(update={"ema_decay": 0.9})
    last = averaged.model_copy(update={"written": "last"})
    written = {
        recipe.written: train(recipe, model_dir, tmp_path / recipe.written)
        for recipe in (averaged, last)
    }
    assert differences(written["average"], written["last"])
    plain = train(decoder_recipe, model_dir, tmp_path / "plain")
    assert not differences(written["last"], plain)


def test_training_raises_the_fidelity(
    decoder_recipe: DecoderRecipe, model_dir: Path, tmp_path: Path
) -> None:
    changes = {"steps": 40, "batch": 6, "sample_every": 40, "checkpoint_every": 40}
    longer = decoder_recipe.model_copy(update=changes)
    train(decoder_recipe, model_dir, tmp_path / "short")
    train(longer, model_dir, tmp_path / "long")
    short = read_decoder_metadata(tmp_path / "short").fidelity
    long = read_decoder_metadata(tmp_path / "long").fidelity
    assert long.psnr_db > short.psnr_db + 3
    assert long.perceptual_distance < short.perceptual_distance


def test_the_held_out_measure_keeps_the_best_decoder(
    decoder_recipe: DecoderRecipe, model_dir: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "held-out.txt"
    prompts.write_text("a red house\na blue boat\na tree\n")
    held_out = HeldOutSettings(prompts=str(prompts), count=3, every=1)
    watched = decoder_recipe.model_copy(update={"held_out": held_out, "steps": 3})
    train_decoder(watched, model_dir, tmp_path / "watched", console=QUIET, device="cpu")

    # It changes no step: the weights are those of a training without it.
    plain = decoder_recipe.model_copy(update={"steps": 3})
    train_decoder(plain, model_dir, tmp_path / "plain", console=QUIET, device="cpu")
    weights = "diffusion_pytorch_model.safetensors"
    found = [read_weights(tmp_path / name / weights) for name in ("watched", "plain")]
    assert not differences(*found)

    run = tmp_path / "watched.run"
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    measured = events.Scalars("held_out/feature_distance")
    assert [event.step for event in measured] == [0, 1, 2, 3]
    best = min(measured, key=lambda event: event.value)
    kept = list(run.glob("best-step-*"))
    assert [path.name for path in kept] == ([f"best-step-{best.step:08d}"] if best.step else [])
    for path in kept:
        assert read_decoder_metadata(path).steps_trained == best.step

    # A plateau ends the training.
    patient = held_out.model_copy(update={"patience": 1, "min_delta": 10.0})
    short = watched.model_copy(update={"held_out": patient})
    out = train_decoder(short, model_dir, tmp_path / "short", console=QUIET, device="cpu")
    assert read_decoder_metadata(out).steps_trained == 1


def test_with_an_adaptor_it_learns_the_adapted_models_latents(
    decoder_recipe: DecoderRecipe, model_dir: Path, adaptor: Path, tmp_path: Path
) -> None:
    base = train(decoder_recipe, model_dir, tmp_path / "base")
    adapted = train(decoder_recipe, model_dir, tmp_path / "tiny", adaptor=adaptor)
    assert differences(adapted, base)
    (tmp_path / "tiny").rename(tmp_path / "done")
    with pytest.raises(HipaError, match="started with another adaptor"):
        train(decoder_recipe, model_dir, tmp_path / "tiny")


def test_latents_depend_on_row_and_stream_alone(model: DiffusionModel) -> None:
    generate = one_step_model(model, 999, None)
    training = draw_latents(model, generate, ["a", "b"], 6, 0, TRAINING)
    held_out = draw_latents(model, generate, ["a", "b"], 6, 0, HELD_OUT)
    row = torch.tensor([4])
    all_BCHW = training(torch.arange(6))
    assert torch.allclose(training(row), all_BCHW[4:5], atol=1e-4)
    assert not torch.allclose(held_out(row), all_BCHW[4:5], atol=1e-2)


def test_a_share_of_the_latents_is_perturbed(
    decoder_recipe: DecoderRecipe, model: DiffusionModel
) -> None:
    changes = {"count": 1000, "perturbed": 0.3, "noise": 0.5}
    settings = decoder_recipe.latents.model_copy(update=changes)
    recipe = decoder_recipe.model_copy(update={"latents": settings})

    def zeros(rows: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(rows), 4, 8, 8)

    noise_BCHW = perturbed(model, zeros, recipe)(torch.arange(1000))
    has_noise_B = noise_BCHW.abs().amax(dim=(1, 2, 3)) > 0
    assert has_noise_B.float().mean() == pytest.approx(0.3, abs=0.05)
    assert noise_BCHW[has_noise_B].std() == pytest.approx(0.5, rel=0.05)


def test_few_large_images_are_decoded_at_once(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Sixteen of SDXL's images at once would take 48 GiB, and of SD 2.1's 27.
    model = DiffusionModel.load(model_dir, "cpu", size=(400, 400))
    latents = torch.randn(8, *model.latent_shape_CHW)
    decoded = []

    def decode(latents_BCHW: torch.Tensor) -> torch.Tensor:
        decoded.append(len(latents_BCHW))
        return torch.zeros(len(latents_BCHW), 3, *model.resolution)

    monkeypatch.setattr(DiffusionModel, "decode", lambda self, latents: decode(latents))
    monkeypatch.setattr(module, "decode_tiny", lambda tiny, latents: decode(latents))
    monkeypatch.setattr(module, "paired_distance", lambda *sets: 0.0)
    examples = decoder_examples(model, lambda rows: latents[rows], 8, Console(quiet=True))
    assert decoded == [1, 6, 2]  # the first says how large all are
    decoded.clear()
    assert measure_fidelity(None, examples).images == 8
    assert decoded == [6, 2]

    # The same where the images are too many to be kept.
    decoded.clear()
    monkeypatch.setattr(teacher_pairs, "TABLE_BYTES", 0)
    examples = decoder_examples(model, lambda rows: latents[rows], 8, Console(quiet=True))
    assert examples.images(torch.arange(8)).shape == (8, 3, 400, 400)
    assert max(decoded) == 6


def test_held_out_prompts_are_not_trained_on() -> None:
    prompts = [str(i) for i in range(25)]
    trained, held_out = split_prompts(prompts, seed=0)
    assert sorted(trained + held_out) == sorted(prompts)
    assert len(held_out) == 2
    assert split_prompts(prompts, seed=1) != (trained, held_out)
    assert split_prompts(["one"], seed=0) == (["one"], ["one"])


def test_levels_that_enlarge_otherwise_than_the_vae_are_refused(
    decoder_recipe: DecoderRecipe, model_dir: Path, tmp_path: Path
) -> None:
    settings = decoder_recipe.decoder.model_copy(update={"blocks": (1, 1)})
    wrong = decoder_recipe.model_copy(update={"decoder": settings})
    expected = r"2 levels, which enlarge 2 times. Expected 3 for the 4 times"
    with pytest.raises(HipaError, match=expected):
        train(wrong, model_dir, tmp_path / "tiny")


def test_an_adaptor_of_another_model_is_refused(
    decoder_recipe: DecoderRecipe, v_model_dir: Path, adaptor: Path, tmp_path: Path
) -> None:
    with pytest.raises(HipaError, match="trained on another base model"):
        train(decoder_recipe, v_model_dir, tmp_path / "tiny", adaptor=adaptor)


def test_divergence_stops_and_keeps_the_checkpoint(
    decoder_recipe: DecoderRecipe, model_dir: Path, tmp_path: Path, monkeypatch
) -> None:
    original = Run.take_step

    def explode_in_step_3(run: Run, loss: float) -> dict[str, float]:
        return original(run, float("nan") if run.step == 2 else loss)

    monkeypatch.setattr(Run, "take_step", explode_in_step_3)
    expected = r"diverged: loss nan.*at step 3. The checkpoint of step 2 is kept"
    with pytest.raises(HipaError, match=expected):
        train(decoder_recipe, model_dir, tmp_path / "tiny")
    assert torch.load(tmp_path / "tiny.run" / "state.pt", weights_only=True)["step"] == 2
    assert not (tmp_path / "tiny").exists()

"""The adaptor's part on the VAE's encoder: training, resuming, storing, loading, refusing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from pydantic import ValidationError
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hipa_deploy.disk.hashing import file_sha256
from hipa_deploy.errors import HipaError
from hipa_deploy.images.example_source import example_image
from hipa_deploy.models.adaptor_folder import (
    ENCODER_WEIGHTS,
    WEIGHTS,
    read_metadata,
    weights_sha256,
)
from hipa_deploy.train.data import teacher_pairs as teacher_pairs_module
from hipa_deploy.train.data.source_images import folder_source_images
from hipa_deploy.train.evaluation.task_images import one_step_task_images
from hipa_deploy.train.model.diffusion_model import DiffusionModel
from hipa_deploy.train.model.encoder_adaptor import (
    add_encoder_adaptor,
    attach_encoder_adaptor,
    load_encoder_weights,
    save_encoder_adaptor,
)
from hipa_deploy.train.model.unet_adaptor import (
    adaptor_parameters,
    trained_parameters,
    without_adaptor,
)
from hipa_deploy.train.prediction.training_cost import predict_training
from hipa_deploy.train.recipes.recipe import Recipe
from hipa_deploy.train.train_adaptor import train_adaptor
from tests.weights import differences, read_weights

QUIET = Console(quiet=True)


def upscaling(recipe: Recipe, **adaptor: int) -> Recipe:
    """The recipe for super-resolution, with an adaptor of rank 2 on the encoder."""
    values = recipe.model_dump() | {"task": "upscale"}
    values["adaptor"] |= {"encoder_rank": 2} | adaptor
    return Recipe.model_validate(values)


@pytest.fixture(scope="module")
def trained_once(model_dir: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory):
    """A function that trains once for all tests of this module, with the recipe of the first."""
    folders: list[Path] = []

    def train(recipe: Recipe) -> Path:
        if not folders:
            out = tmp_path_factory.mktemp("encoder") / "adaptor"
            train_adaptor(
                upscaling(recipe), model_dir, out, cache=cache, device="cpu", console=QUIET
            )
            folders.append(out)
        return folders[0]

    return train


@pytest.fixture
def folder(trained_once, recipe: Recipe) -> Path:
    return trained_once(recipe)


def encoded(vae: AutoencoderKL) -> torch.Tensor:
    """The encoder's latents of an example image."""
    image = torch.from_numpy(example_image(32, 32)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        return vae.encode(image).latent_dist.mean


def test_both_parts_are_trained_and_stored(folder: Path, model: DiffusionModel) -> None:
    weights = read_weights(folder / ENCODER_WEIGHTS)
    assert all(name.startswith("encoder.") for name in weights)
    assert any(".downsamplers.0.conv." in name for name in weights)
    assert all(weight.abs().max() > 0 for name, weight in weights.items() if "lora_B" in name)
    assert read_metadata(folder).encoder_rank == 2
    plain = encoded(model.vae)

    # As a user of diffusers loads them; two files of weights in the folder do not confuse it.
    model.vae.load_lora_adapter(str(folder), prefix=None, weight_name=ENCODER_WEIGHTS)
    adapted = encoded(model.vae)
    assert (adapted - plain).abs().max() > 1e-4
    model.pipe.load_lora_weights(folder)


def test_the_encoder_changes_the_image_of_one_step(
    folder: Path, model_dir: Path, tmp_path: Path
) -> None:
    without_encoder = shutil.copytree(folder, tmp_path / "without_encoder")
    path = without_encoder / ENCODER_WEIGHTS
    zeros = {name: torch.zeros_like(weight) for name, weight in read_weights(path).items()}
    save_file(zeros, path)
    small = example_image(8, 8)[None]
    images = one_step_task_images(model_dir, folder, "upscale", small, ["a"], [0])
    others = one_step_task_images(model_dir, without_encoder, "upscale", small, ["a"], [0])
    assert (images != others).any()


def test_resumed_equals_unbroken(
    folder: Path, recipe: Recipe, model_dir: Path, cache: Path, tmp_path: Path, stop_after
) -> None:
    stop_after(3)
    broken = tmp_path / "broken"
    options = {"cache": cache, "device": "cpu", "console": QUIET}
    with pytest.raises(HipaError, match="stopped at step 3 of 4"):
        train_adaptor(upscaling(recipe), model_dir, broken, **options)
    stop_after(None)
    train_adaptor(upscaling(recipe), model_dir, broken, **options)
    for name in (WEIGHTS, ENCODER_WEIGHTS):
        assert not differences(read_weights(broken / name), read_weights(folder / name))


def test_without_adaptor_gives_the_base_encoder(model: DiffusionModel) -> None:
    plain = encoded(model.vae)
    add_encoder_adaptor(model.vae, 2, seed=0)
    assert torch.equal(encoded(model.vae), plain)  # B = 0
    with torch.no_grad():
        for weight in adaptor_parameters(model.vae).values():
            weight.normal_()
    assert all(name.startswith("vae.encoder.") for name in trained_parameters(model))
    assert not torch.equal(encoded(model.vae), plain)
    with without_adaptor(model.unet, model.vae):
        assert torch.equal(encoded(model.vae), plain)


def test_training_starts_from_both_parts(folder: Path, model: DiffusionModel) -> None:
    add_encoder_adaptor(model.vae, 2, seed=1)
    load_encoder_weights(model.vae, folder)
    other = DiffusionModel.load(model.folder, "cpu")
    attach_encoder_adaptor(other.vae, folder)
    assert torch.equal(encoded(model.vae), encoded(other.vae))


@pytest.mark.parametrize("rank", [0, 3])
def test_another_rank_is_refused(rank: int, folder: Path, model: DiffusionModel) -> None:
    if rank:
        add_encoder_adaptor(model.vae, rank, seed=0)
    expected = r"has encoder_rank 2, the recipe another. Set adaptor.encoder_rank = 2"
    with pytest.raises(HipaError, match=expected):
        load_encoder_weights(model.vae, folder)


def test_a_damaged_file_is_refused(folder: Path, model: DiffusionModel, tmp_path: Path) -> None:
    (tmp_path / ENCODER_WEIGHTS).write_bytes((folder / ENCODER_WEIGHTS).read_bytes()[:100])
    with pytest.raises(HipaError, match=rf"{ENCODER_WEIGHTS} cannot be read: "):
        attach_encoder_adaptor(model.vae, tmp_path)
    with pytest.raises(HipaError, match=rf"{ENCODER_WEIGHTS} is damaged: "):
        load_encoder_weights(model.vae, tmp_path)


def test_weights_that_are_not_finite_are_not_written(model: DiffusionModel, tmp_path: Path) -> None:
    add_encoder_adaptor(model.vae, 2, seed=0)
    with torch.no_grad():
        next(iter(adaptor_parameters(model.vae).values())).fill_(float("inf"))
    with pytest.raises(HipaError, match=r"adaptor weight vae\.encoder\..* is not finite"):
        save_encoder_adaptor(model.vae, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_half_precision_keeps_the_header(
    folder: Path, model: DiffusionModel, tmp_path: Path
) -> None:
    add_encoder_adaptor(model.vae, 2, seed=1)
    load_encoder_weights(model.vae, folder)
    save_encoder_adaptor(model.vae, tmp_path, torch.float16)
    stored = load_file(tmp_path / ENCODER_WEIGHTS)
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    files = [safe_open(path / ENCODER_WEIGHTS, "pt") for path in (tmp_path, folder)]
    assert files[0].metadata() == files[1].metadata()
    other = DiffusionModel.load(model.folder, "cpu")
    attach_encoder_adaptor(other.vae, tmp_path)
    assert torch.allclose(encoded(other.vae), encoded(model.vae), atol=2e-3)


def test_other_tasks_refuse_an_encoder_rank(recipe: Recipe) -> None:
    expected = r"adaptor.encoder_rank is for the task upscale, this is generate"
    with pytest.raises(ValidationError, match=expected):
        Recipe.model_validate(recipe.model_dump() | {"adaptor": {"encoder_rank": 2}})


@pytest.mark.thorough
def test_the_predicted_cost_includes_the_encoder(
    folder: Path, recipe: Recipe, model_dir: Path
) -> None:
    both = predict_training(upscaling(recipe, encoder_rank=2), model_dir)
    alone = predict_training(upscaling(recipe, encoder_rank=0), model_dir)
    stored = 0
    for name in (WEIGHTS, ENCODER_WEIGHTS):
        stored += sum(weight.numel() for weight in read_weights(folder / name).values())
    assert both.trainable == stored > alone.trainable
    assert both.parameters == alone.parameters
    assert both.warm_up.flops > alone.warm_up.flops


def test_targets_do_not_depend_on_the_encoder_adaptor(
    recipe: Recipe, model: DiffusionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where they do not fit in memory, and are made anew while the encoder learns."""
    monkeypatch.setattr(teacher_pairs_module, "TABLE_BYTES", 0)
    Image.fromarray(example_image(32, 32)).save(tmp_path / "a.png")
    originals, _ = folder_source_images(model, tmp_path, [], QUIET, captions=False)
    before = originals.latents(torch.tensor([0]))
    add_encoder_adaptor(model.vae, 2, seed=0)
    for weight in adaptor_parameters(model.vae).values():
        weight.data.normal_()
    after = originals.latents(torch.tensor([0]))
    assert not after.requires_grad
    assert torch.equal(before, after)


@pytest.mark.usefixtures("half_precision")
def test_with_everything_on_and_from_an_adaptor(
    folder: Path, recipe: Recipe, model_dir: Path, cache: Path, tmp_path: Path
) -> None:
    changes = {
        "ema_decay": 0.5,
        "mixed_precision": "bf16",
        "micro_batch": 1,
        "gradient_checkpointing": True,
    }
    everything = upscaling(recipe).model_copy(update=changes)
    out = tmp_path / "more"
    options = {"initial_adaptor": folder, "cache": cache, "device": "cpu", "console": QUIET}
    train_adaptor(everything, model_dir, out, **options)
    assert differences(read_weights(out / ENCODER_WEIGHTS), read_weights(folder / ENCODER_WEIGHTS))
    initial_sha256 = read_metadata(out).initial_sha256
    assert initial_sha256 == weights_sha256(folder) != file_sha256(folder / WEIGHTS)


def test_an_adaptor_is_refused_with_another_vae_or_without_its_encoder_file(
    folder: Path, model_dir: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(model_dir, tmp_path / "model")
    vae = AutoencoderKL.from_pretrained(other, subfolder="vae")
    vae.encoder.conv_in.bias.data += 1
    vae.save_pretrained(other / "vae")
    read_metadata(folder, model_dir)
    with pytest.raises(HipaError, match=r"was trained with another VAE than .*model's"):
        read_metadata(folder, other)
    shutil.copytree(folder, tmp_path / "half")
    (tmp_path / "half" / ENCODER_WEIGHTS).unlink()
    expected = rf"half lacks {ENCODER_WEIGHTS}, the adapter weights of the VAE's encoder"
    with pytest.raises(HipaError, match=expected):
        read_metadata(tmp_path / "half")

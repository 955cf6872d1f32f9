"""The adaptor's part on the VAE's encoder: trained, resumed, stored, loaded by diffusers, and what it refuses."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from pydantic import ValidationError
from rich.console import Console
from safetensors.torch import save_file

from hipa_deploy.errors import HipaError
from hipa_deploy.hashing import file_sha256
from hipa_deploy.images.example_source import example_image
from hipa_deploy.models.adaptor_folder import (
    ENCODER_WEIGHTS,
    WEIGHTS,
    read_metadata,
    weights_sha256,
)
from hipa_deploy.train.data import teacher_pairs as pairs
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
    values = recipe.model_dump() | {"task": "upscale"}
    values["adaptor"] |= {"encoder_rank": 2} | adaptor
    return Recipe.model_validate(values)


@pytest.fixture(scope="module")
def trained_once(model_dir: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory):
    """Train once for all tests: the recipe is a fixture of each."""
    folders: list[Path] = []

    def train(recipe: Recipe) -> Path:
        if not folders:
            out = tmp_path_factory.mktemp("encoder") / "adaptor"
            folders.append(
                train_adaptor(
                    upscaling(recipe), model_dir, out, cache=cache, device="cpu", console=QUIET
                )
            )
        return folders[0]

    return train


@pytest.fixture
def folder(trained_once, recipe: Recipe) -> Path:
    return trained_once(recipe)


def encoded(vae: AutoencoderKL) -> torch.Tensor:
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
    model.vae.load_lora_adapter(
        str(folder), prefix=None, weight_name=ENCODER_WEIGHTS
    )  # as a diffusers user would
    adapted = encoded(model.vae)
    assert (adapted - plain).abs().max() > 1e-4
    model.pipe.load_lora_weights(folder)  # two files of weights do not confuse it


def test_the_encoder_changes_what_one_step_makes(
    folder: Path, model_dir: Path, tmp_path: Path
) -> None:
    half = shutil.copytree(folder, tmp_path / "half") / ENCODER_WEIGHTS
    save_file({name: torch.zeros_like(weight) for name, weight in read_weights(half).items()}, half)
    small = example_image(8, 8)[None]
    whole, half = (
        one_step_task_images(model_dir, f, "upscale", small, ["a"], [0])
        for f in (folder, tmp_path / "half")
    )
    assert (whole != half).any()


def test_resumed_equals_unbroken(
    folder: Path, recipe: Recipe, model_dir: Path, cache: Path, tmp_path: Path, stop_after
) -> None:
    stop_after(3)
    arguments = upscaling(recipe), model_dir, tmp_path / "broken"
    with pytest.raises(HipaError, match="stopped at step 3 of 4"):
        train_adaptor(*arguments, cache=cache, device="cpu", console=QUIET)
    stop_after(None)
    train_adaptor(*arguments, cache=cache, device="cpu", console=QUIET)
    for name in (WEIGHTS, ENCODER_WEIGHTS):
        assert not differences(
            read_weights(tmp_path / "broken" / name), read_weights(folder / name)
        )


def test_the_base_is_there_without_it(model: DiffusionModel) -> None:
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
    with pytest.raises(
        HipaError, match=r"has encoder_rank 2, the recipe another. Set adaptor.encoder_rank = 2"
    ):
        load_encoder_weights(model.vae, folder)


def test_a_damaged_file_is_one_line(folder: Path, model: DiffusionModel, tmp_path: Path) -> None:
    (tmp_path / ENCODER_WEIGHTS).write_bytes((folder / ENCODER_WEIGHTS).read_bytes()[:100])
    with pytest.raises(HipaError, match=rf"{ENCODER_WEIGHTS} cannot be loaded: "):
        attach_encoder_adaptor(model.vae, tmp_path)
    with pytest.raises(HipaError, match=rf"{ENCODER_WEIGHTS} cannot be read: "):
        load_encoder_weights(model.vae, tmp_path)


def test_what_is_not_finite_is_not_written(model: DiffusionModel, tmp_path: Path) -> None:
    add_encoder_adaptor(model.vae, 2, seed=0)
    with torch.no_grad():
        next(iter(adaptor_parameters(model.vae).values())).fill_(float("inf"))
    with pytest.raises(HipaError, match=r"adaptor weight vae\.encoder\..* is not finite"):
        save_encoder_adaptor(model.vae, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_other_tasks_have_no_use_for_it(recipe: Recipe) -> None:
    with pytest.raises(
        ValidationError, match=r"adaptor.encoder_rank is for the task upscale, this is generate"
    ):
        Recipe.model_validate(recipe.model_dump() | {"adaptor": {"encoder_rank": 2}})


def test_the_prediction_counts_it(folder: Path, recipe: Recipe, model_dir: Path) -> None:
    both, alone = (
        predict_training(upscaling(recipe, encoder_rank=rank), model_dir) for rank in (2, 0)
    )
    stored = sum(
        weight.numel()
        for name in (WEIGHTS, ENCODER_WEIGHTS)
        for weight in read_weights(folder / name).values()
    )
    assert both.trainable == stored > alone.trainable
    assert both.parameters == alone.parameters
    assert both.warm_up.flops > alone.warm_up.flops


def test_targets_do_not_learn_along(
    recipe: Recipe, model: DiffusionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where they do not fit in memory, and a step asks for them while the encoder learns."""
    monkeypatch.setattr(pairs, "TABLE_BYTES", 0)
    Image.fromarray(example_image(32, 32)).save(tmp_path / "a.png")
    originals, _ = folder_source_images(model, tmp_path, [], QUIET)
    before = originals.latents(torch.tensor([0]))
    add_encoder_adaptor(model.vae, 2, seed=0)
    for weight in adaptor_parameters(model.vae).values():
        weight.data.normal_()
    after = originals.latents(torch.tensor([0]))
    assert not after.requires_grad
    assert torch.equal(before, after)


def test_with_everything_on_and_from_an_adaptor(
    folder: Path, recipe: Recipe, model_dir: Path, cache: Path, tmp_path: Path
) -> None:
    more = {
        "ema_decay": 0.5,
        "mixed_precision": "bf16",
        "micro_batch": 1,
        "gradient_checkpointing": True,
    }
    chosen = upscaling(recipe).model_copy(update=more)
    made = train_adaptor(
        chosen,
        model_dir,
        tmp_path / "more",
        initial_adaptor=folder,
        cache=cache,
        device="cpu",
        console=QUIET,
    )
    assert differences(read_weights(made / ENCODER_WEIGHTS), read_weights(folder / ENCODER_WEIGHTS))
    assert (
        read_metadata(made).initial_sha256
        == weights_sha256(folder)
        != file_sha256(folder / WEIGHTS)
    )


def test_it_belongs_to_its_vae_and_comes_whole(
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
    with pytest.raises(
        HipaError, match=rf"half lacks {ENCODER_WEIGHTS}, its part on the VAE's encoder"
    ):
        read_metadata(tmp_path / "half")

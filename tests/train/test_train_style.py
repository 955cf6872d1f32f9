"""Training on a model with LoRAs and embeddings: teacher and student have them alike."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from hipa_deploy.commands.app import app
from hipa_deploy.errors import HipaError
from hipa_deploy.models.adaptor_folder import WEIGHTS, read_metadata, unet_sha256
from hipa_deploy.models.style import EmbeddingChoice, LoraChoice, Style
from hipa_deploy.train.data.teacher_pairs import cache_folder
from hipa_deploy.train.evaluation.quality import one_step_images, teacher_images
from hipa_deploy.train.model.diffusion_model import DiffusionModel
from hipa_deploy.train.prediction.dry_run import to_toml
from hipa_deploy.train.recipes.recipe import Recipe, TeacherSettings
from hipa_deploy.train.train_adaptor import train_adaptor
from tests.style_samples import write_embedding, write_lora
from tests.weights import differences, read_weights

QUIET = Console(file=io.StringIO())


@pytest.fixture(scope="module")
def style(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Style:
    folder = tmp_path_factory.mktemp("style")
    lora = write_lora(model_dir, folder / "style.safetensors", seed=1)
    cat = write_embedding(folder / "cat.safetensors", "<cat>", count=2)
    return Style((LoraChoice(lora, 0.5),), (EmbeddingChoice(cat),))


def test_an_adaptor_of_a_styled_model(
    recipe: Recipe, model_dir: Path, cache: Path, tmp_path: Path, style: Style
) -> None:
    def train(out: Path, added: Style | None) -> Path:
        return train_adaptor(
            recipe, model_dir, out, style=added, cache=cache, console=QUIET, device="cpu"
        )

    plain = train(tmp_path / "plain", None)
    styled = train(tmp_path / "styled", style)
    assert differences(read_weights(styled / WEIGHTS), read_weights(plain / WEIGHTS))

    metadata = read_metadata(styled, model_dir)
    assert metadata.base_unet_sha256 == unet_sha256(model_dir)
    assert [(lora.name, lora.scale) for lora in metadata.loras] == [("style.safetensors", 0.5)]
    assert [word.token for word in metadata.embeddings] == ["<cat>"]
    assert read_metadata(plain).loras == ()

    # With its LoRAs it makes images; without them, or at another scale, it is refused.
    one_step_images(model_dir, styled, ["a <cat>"], [0], device="cpu", style=style)
    weaker = Style((LoraChoice(style.loras[0].path, 0.4),))
    for added in (None, weaker):
        with pytest.raises(HipaError, match=r"Give the same files .* --lora style\.safetensors:0"):
            one_step_images(model_dir, styled, ["a pear"], [0], device="cpu", style=added)


def test_a_start_needs_the_loras_that_it_was_trained_with(
    recipe: Recipe, model_dir: Path, cache: Path, tmp_path: Path, style: Style
) -> None:
    def train(out: Path, added: Style | None, start: Path | None = None) -> Path:
        return train_adaptor(
            recipe, model_dir, out, initial_adaptor=start, style=added, cache=cache,
            console=QUIET, device="cpu",
        )  # fmt: skip

    styled = train(tmp_path / "styled", style)
    unused = tmp_path / "further"
    for added in (None, Style((LoraChoice(style.loras[0].path, 0.4),))):
        with pytest.raises(HipaError, match=r"Give the same files .* --lora style\.safetensors:0"):
            train(unused, added, styled)
    command = ["train", "--model", str(model_dir), "--recipe", str(written(recipe, tmp_path))]
    command += ["--from", str(styled), "--out", str(unused), "--dry-run"]
    done = CliRunner().invoke(app, command)
    assert "Give the same files" in str(done.exception)

    # With them it goes on, also with others after them.
    assert read_metadata(train(tmp_path / "more", style, styled)).initial_sha256
    other = LoraChoice(write_lora(model_dir, tmp_path / "other.safetensors", seed=2))
    both = Style((*style.loras, other), style.embeddings)
    assert len(read_metadata(train(tmp_path / "both", both, styled)).loras) == 2


def written(recipe: Recipe, folder: Path) -> Path:
    """The recipe as a file."""
    path = folder / "recipe.toml"
    path.write_text(to_toml(recipe), encoding="utf-8")
    return path


def test_a_run_goes_on_with_its_own_style_only(
    recipe: Recipe, model_dir: Path, cache: Path, tmp_path: Path, style: Style, stop_after
) -> None:
    stop_after(1)
    with pytest.raises(HipaError, match="stopped at step 1"):
        train_adaptor(
            recipe, model_dir, tmp_path / "a", style=style, cache=cache, console=QUIET, device="cpu"
        )
    with pytest.raises(HipaError, match="was started with other LoRAs"):
        train_adaptor(recipe, model_dir, tmp_path / "a", cache=cache, console=QUIET, device="cpu")


def test_teacher_and_contexts_have_the_style(
    model: DiffusionModel, model_dir: Path, tmp_path: Path, style: Style
) -> None:
    styled = DiffusionModel.load(model_dir, "cpu", style=style)
    prompts = ["a <cat>"]
    assert not torch.equal(styled.context(prompts), model.context(prompts))
    assert not styled.pipe.text_encoder.get_input_embeddings().weight.requires_grad

    teacher = TeacherSettings(pairs=4, steps=2, guidance=1.0)
    plain = teacher_images(model_dir, ["a pear"], [0], teacher, device="cpu")
    other = teacher_images(model_dir, ["a pear"], [0], teacher, device="cpu", style=style)
    assert (plain != other).any()

    # Pairs of one are never taken for the other's.
    folders = {
        cache_folder(each, prompts, teacher, 0, tmp_path)
        for each in (model, styled, DiffusionModel.load(model_dir, "cpu", style=Style(style.loras)))
    }
    assert len(folders) == 3

"""What is checked of a training's request before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from hipa_deploy.embedded import ADAPTORS, MODEL
from hipa_deploy.errors import HipaError
from hipa_deploy.models.early_config import early_config
from hipa_deploy.models.style import Style
from hipa_deploy.train.recipes.recipe import DecoderRecipe, Recipe, load_any_recipe
from hipa_deploy.train.training_request import check_dry_run, check_request

BEYOND = r"timestep 1000 is out of range. Expected 0 to 999"


def test_a_timestep_that_the_schedule_does_not_have(recipe: Recipe, model_dir: Path) -> None:
    beyond = recipe.model_copy(update={"timestep": 1000})
    for check in (check_request, check_dry_run):
        with pytest.raises(HipaError, match=BEYOND):
            check(beyond, model_dir, None, Style())

    # An edit starts at the timesteps of its strengths, whatever the recipe's is.
    source = recipe.source.model_copy(update={"strengths": (1.0,)})
    edit = beyond.model_copy(update={"task": "edit", "source": source})
    check_request(edit, model_dir, None, Style())


def test_the_timestep_of_a_decoders_latents(model_dir: Path) -> None:
    values = {"kind": "decoder", "prompts": "model:prompts.txt", "steps": 1, "timestep": 1000}
    decoder = DecoderRecipe.model_validate(values)
    with pytest.raises(HipaError, match=BEYOND):
        check_request(decoder, model_dir, None, Style())


def test_what_does_not_fit_the_model_is_said_before_it_is_loaded(
    recipe: Recipe, model_dir: Path
) -> None:
    smallest = min(early_config(model_dir).native_latents[1:])
    crop = Recipe.model_validate(recipe.model_dump() | {"decode_crop": smallest + 8})
    with pytest.raises(HipaError, match=rf"decode_crop = {smallest + 8} is larger than the model"):
        check_request(crop, model_dir, None, Style())
    for name in ("score", "latent_discriminator"):
        late = recipe.model_dump() | {name: {"weight": 1.0, "timesteps": (20, 1000)}}
        with pytest.raises(HipaError, match=rf"{name}.timesteps = \[20, 1000\]: expected"):
            check_request(Recipe.model_validate(late), model_dir, None, Style())

    values = {"kind": "decoder", "prompts": "model:prompts.txt", "steps": 1}
    decoder = DecoderRecipe.model_validate(values | {"decoder": {"blocks": (1, 1)}})
    with pytest.raises(HipaError, match=r"2 levels, which enlarge 2 times. Expected 3 for the 4"):
        check_request(decoder, model_dir, None, Style())


def test_a_decoder_is_not_for_an_adaptor_of_another_task() -> None:
    decoder = load_any_recipe("emoji-decoder")
    with pytest.raises(HipaError, match=r"is for the task edit. Expected one for text to image"):
        check_request(decoder, MODEL, ADAPTORS["emoji-edit"], Style())
    check_request(decoder, MODEL, ADAPTORS["emoji"], Style())


def test_edits_that_lead_nowhere(recipe: Recipe, model_dir: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("3d emoji of a cat\nflat emoji of a cat\n3d emoji of a dog\n", "utf-8")
    strengths = {"strengths": (1.0,)}
    edit = recipe.model_copy(
        update={
            "task": "edit",
            "prompts": str(prompts),
            "source": recipe.source.model_copy(update=strengths | {"same": "emoji of a (.*)"}),
        }
    )
    check_request(edit, model_dir, None, Style())

    # A prompt twice is no other prompt.
    prompts.write_text("3d emoji of a cat\n3d emoji of a dog\n3d emoji of a dog\n", "utf-8")
    with pytest.raises(
        HipaError, match=r"relates no prompt to another one.* Expected an expression"
    ):
        check_request(edit, model_dir, None, Style())
    # Without an expression every prompt follows from every other, and a single one from itself.
    free = edit.model_copy(update={"source": recipe.source.model_copy(update=strengths)})
    check_request(free, model_dir, None, Style())
    prompts.write_text("a watercolour\n", "utf-8")
    check_request(free, model_dir, None, Style())

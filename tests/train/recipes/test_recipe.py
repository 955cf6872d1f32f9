from __future__ import annotations

from pathlib import Path

import pytest

from hipa_deploy.errors import HipaError
from hipa_deploy.tasks import strength_timestep
from hipa_deploy.train.data.teacher_pairs import teacher_scheduler
from hipa_deploy.train.model.diffusion_model import DiffusionModel
from hipa_deploy.train.recipes.recipe import (
    SHIPPED,
    DecoderRecipe,
    Recipe,
    load_any_recipe,
    load_recipe,
    read_prompts,
)

MINIMAL = 'prompts = "words.txt"\nsteps = 5\n[teacher]\npairs = 3\n'
DECODER = 'kind = "decoder"\nprompts = "words.txt"\nsteps = 5\n'


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_recipes_are_valid_and_state_their_command(path: Path) -> None:
    assert load_any_recipe(path.stem) == load_any_recipe(path)
    assert path.read_text().startswith("# hipa-train ")
    assert "Expected cost" in path.read_text()


def test_prompts_are_relative_to_the_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL))
    (tmp_path / "words.txt").write_text("a cat\n\n  a dog \na cat\n")
    assert read_prompts(recipe, tmp_path / "model") == ["a cat", "a dog"]


def test_prompts_of_a_shipped_recipe_are_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "captions.txt").write_text("a cat\n")
    assert read_prompts(load_recipe("sd15"), tmp_path / "model") == ["a cat"]


def test_the_column_of_the_prompts(tmp_path: Path) -> None:
    recipe = load_recipe(
        write(tmp_path, 'prompts_column = "title"\n' + MINIMAL.replace("words.txt", "words.csv"))
    )
    (tmp_path / "words.csv").write_text("caption,title\nno,a cat\n")
    assert read_prompts(recipe, tmp_path / "model") == ["a cat"]


def test_overrides_reach_into_tables(tmp_path: Path) -> None:
    recipe = load_recipe(
        write(tmp_path, MINIMAL), {"steps": 7, "teacher.pairs": 9, "loss.hf_weight": 0}
    )
    assert (recipe.steps, recipe.teacher.pairs, recipe.loss.hf_weight) == (7, 9, 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MINIMAL + "pears = 3\n", "unknown key 'teacher.pears'"),
        ("stepz = 3\n" + MINIMAL, "unknown key 'stepz'"),
        (MINIMAL.replace("pairs", "steps"), "key 'teacher.pairs' is missing"),
        (MINIMAL.replace("5", "-5"), "steps = -5: input should be greater than or equal to 1"),
        (MINIMAL.replace("5", '"many"'), "steps = 'many'"),
        (MINIMAL + "[adaptor]\npreset = 'big'\n", "adaptor.preset = 'big'.*'paper' or 'full'"),
        (MINIMAL + "[adaptor]\nrank = 0\nalpha = 0\n", "adaptor.rank = 0.*and 1 more"),
        ("prompts = ", "cannot be read"),
        (DECODER.replace("decoder", "vae"), "kind = 'vae': expected one of: adaptor, decoder"),
        (DECODER.replace('"decoder"', "[1]"), r"kind = \[1\]: expected one of"),
        (DECODER + "[teacher]\npairs = 3\n", "unknown key 'teacher'"),
        (DECODER + "[adaptor]\nrank = 3\n", "unknown key 'adaptor'"),
        (DECODER + "[loss]\nlatent_weight = 1\n", "unknown key 'loss.latent_weight'"),
        (DECODER + "[decoder]\nchannels = 2\n", "decoder.channels = 2: input should be greater"),
        (
            DECODER + "[decoder]\nblocks = [1, -1]\n",
            "decoder.blocks.1 = -1: input should be greater",
        ),
        (DECODER + "[latents]\nperturbed = 2\n", "latents.perturbed = 2: input should be less"),
        (
            MINIMAL + "[loss]\nadversarial_weight = 1\nperceptual = 'none'\n",
            "needs a perceptual distance with a weight",
        ),
        (
            MINIMAL + "[loss]\nadversarial_weight = 1\nperceptual_weight = 0\n",
            "needs a perceptual distance",
        ),
        ('kind = "adaptor"\n' + MINIMAL + "[latents]\ncount = 2\n", "unknown key 'latents'"),
    ],
)
def test_mistakes_are_named_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(HipaError, match=message) as error:
        load_any_recipe(write(tmp_path, text))
    assert "\n" not in str(error.value)


def test_the_kind_says_what_is_trained(tmp_path: Path) -> None:
    assert isinstance(load_any_recipe(write(tmp_path, MINIMAL)), Recipe)
    assert load_recipe(write(tmp_path, 'kind = "adaptor"\n' + MINIMAL)).kind == "adaptor"
    path = write(tmp_path, DECODER)
    decoder = load_any_recipe(path, {"latents.count": 9})
    assert isinstance(decoder, DecoderRecipe)
    assert (decoder.latents.count, decoder.decoder.blocks) == (9, (3, 3, 3, 1))
    with pytest.raises(HipaError, match=r"is of kind decoder. Expected one of kind adaptor"):
        load_recipe(path)


def test_override_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(HipaError, match=r"unknown key 'teacher.pear'"):
        load_recipe(write(tmp_path, MINIMAL), {"teacher.pear": 1})
    with pytest.raises(HipaError, match=r"'steps.x' .*'steps' is not a table"):
        load_recipe(write(tmp_path, MINIMAL), {"steps.x": 1})


def test_unknown_recipe_lists_the_shipped_ones() -> None:
    with pytest.raises(HipaError, match=r"Expected a .toml file or one of: .*emoji"):
        load_recipe("emojis")


def test_bad_prompt_files(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(HipaError, match="cannot be read: No such file"):
        read_prompts(recipe, tmp_path)
    (tmp_path / "prompts.txt").write_text("\n \n")
    with pytest.raises(HipaError, match="is empty"):
        read_prompts(recipe, tmp_path)
    (tmp_path / "prompts.txt").write_bytes(b"caf\xe9")
    with pytest.raises(HipaError, match=r"is not UTF-8 \(byte 3\)"):
        read_prompts(recipe, tmp_path)


def test_every_field_is_described() -> None:
    def undescribed(model: type, prefix: str = "") -> list[str]:
        missing = []
        for name, field in model.model_fields.items():
            missing += [] if field.description else [prefix + name]
            if hasattr(field.annotation, "model_fields"):
                missing += undescribed(field.annotation, f"{prefix}{name}.")
        return missing

    assert undescribed(Recipe) + undescribed(DecoderRecipe) == []


@pytest.mark.parametrize(("sampler", "steps"), [("ddim", 25), ("dpmsolver++", 15), ("ddim", 30)])
def test_an_edit_starts_where_a_step_of_the_teacher_does(
    model_dir: Path, sampler: str, steps: int
) -> None:
    schedule = DiffusionModel.load(model_dir).schedule
    scheduler = teacher_scheduler(schedule, sampler)
    scheduler.set_timesteps(steps)
    strengths = [n / steps for n in range(1, steps + 1) if (1000 * n) % steps == 0]
    for strength in strengths:
        load_recipe("emoji-edit", {"source.strengths": [strength], "teacher.steps": steps})
        assert strength_timestep(strength) in scheduler.timesteps.tolist()
    assert len(strengths) >= 5


def test_settings_that_contradict_each_other_are_named_without_the_whole_recipe() -> None:
    with pytest.raises(HipaError, match=r"emoji-edit.toml: strength 0\.63 is no whole number"):
        load_recipe("emoji-edit", {"source.strengths": [0.63]})

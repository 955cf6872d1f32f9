from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from hipa_deploy.embedded import MODEL
from hipa_deploy.errors import HipaError
from hipa_deploy.generate.prompt_files import read_prompt_file
from hipa_deploy.images.compositing import latent_mask
from hipa_deploy.models.adaptor_folder import read_metadata
from hipa_deploy.models.style import Style
from hipa_deploy.train.data import examples as examples_module
from hipa_deploy.train.data.edit_prompts import edit_starts, related_prompts
from hipa_deploy.train.data.examples import (
    TaskExamples,
    task_examples,
)
from hipa_deploy.train.data.teacher_pairs import noise_seeds, teacher_latents
from hipa_deploy.train.model.diffusion_model import DiffusionModel, to_float
from hipa_deploy.train.recipes.recipe import Recipe, SourceSettings, read_prompts
from hipa_deploy.train.train_adaptor import train_adaptor
from hipa_deploy.train.training_request import check_dry_run, check_request
from tests.tiny_model import make_model

QUIET = Console(quiet=True)


def of_task(recipe: Recipe, task: str, **source: Any) -> Recipe:
    values = recipe.model_dump() | {"task": task, "source": source}
    values["teacher"] |= {"steps": 4}
    return Recipe.model_validate(values)


def examples_of(model: DiffusionModel, recipe: Recipe, cache: Path) -> TaskExamples:
    return task_examples(
        model, recipe, read_prompts(recipe, model.folder), cache=cache, console=QUIET
    )


ROWS = torch.arange(3)


def test_generate_starts_from_noise(model: DiffusionModel, recipe: Recipe, cache: Path) -> None:
    examples = examples_of(model, of_task(recipe, "generate"), cache)
    assert examples.count == recipe.teacher.pairs
    assert list(examples.step_inputs(ROWS)) == ["noise"]
    assert examples.source is None
    decoded = model.decode(examples.latents(ROWS)).clamp(0, 1)
    assert torch.allclose(examples.images(ROWS), decoded, atol=0.51 / 255)


def test_edits_follow_another_prompt_from_the_encoded_source(
    model: DiffusionModel, recipe: Recipe, cache: Path
) -> None:
    examples = examples_of(model, of_task(recipe, "edit", strengths=[0.5, 1.0], per_image=2), cache)
    assert examples.count == 2 * recipe.teacher.pairs
    assert examples.timestep(torch.arange(4)).tolist() == [999, 499, 999, 499]
    sources = examples.source(ROWS)
    assert torch.equal(sources[0], sources[1])
    assert torch.allclose(
        examples.step_inputs(ROWS)["source"], model.encode(to_float(sources)), atol=1e-5
    )
    assert examples.images(ROWS).shape == (3, 3, *model.resolution)


@pytest.mark.parametrize("per_image", [1, 2])
def test_edits_of_the_teachers_images_have_other_noise_than_made_them(
    model: DiffusionModel, recipe: Recipe, cache: Path, per_image: int
) -> None:
    """Its own noise would lead the teacher back to the source; a user's image has none of it."""
    edit = of_task(recipe, "edit", strengths=[0.5], per_image=per_image)
    made_them = model.noise(noise_seeds(torch.arange(edit.teacher.pairs), edit.seed).tolist())
    edits = examples_of(model, edit, cache)
    added = edits.step_inputs(torch.arange(edits.count))["noise"]
    both = torch.cat([made_them, added]).flatten(1)
    assert len(both.unique(dim=0)) == len(both)

    # The target is the teacher's edit with that very noise.
    inputs = edits.step_inputs(ROWS)
    timestep = int(edits.timestep(ROWS)[0])
    signal = model.alpha_bar(timestep)
    start = signal**0.5 * inputs["source"] + (1 - signal) ** 0.5 * inputs["noise"]
    expected = teacher_latents(
        model, start, edits.conditions(ROWS), model.unguided(), edit.teacher, timestep
    )
    assert torch.allclose(edits.latents(ROWS), expected, atol=2e-2)  # stored in float16


def test_the_teachers_edit_of_full_strength_is_close_to_its_image_from_the_noise(
    model: DiffusionModel, recipe: Recipe, cache: Path
) -> None:
    """At strength 1 the noise hides nearly all of the source: a = 0.068."""
    examples = examples_of(model, of_task(recipe, "edit", strengths=[1.0]), cache)
    inputs = examples.step_inputs(ROWS)
    edit = of_task(recipe, "edit", strengths=[1.0])
    start = 0.0682649 * inputs["source"] + 0.9976672 * inputs["noise"]
    expected = teacher_latents(
        model, start, examples.conditions(ROWS), model.unguided(), edit.teacher
    )
    assert torch.allclose(examples.latents(ROWS), expected, atol=2e-2)  # stored in float16


@pytest.mark.usefixtures("half_precision")
def test_edits_in_the_cache_are_of_their_own_sources(
    model: DiffusionModel, recipe: Recipe, tmp_path: Path
) -> None:
    def folders(changed: Recipe) -> int:
        examples_of(model, changed, tmp_path / "cache")
        return len(list((tmp_path / "cache" / "pairs").iterdir()))

    chosen = of_task(recipe, "edit", strengths=[0.5])
    assert folders(chosen) == 2  # the sources and their edits
    # The same sources, decoded in another precision.
    assert folders(chosen.model_copy(update={"vae_precision": "bf16"})) == 3
    assert folders(chosen.model_copy(update={"vae_precision": "no"})) == 3
    # Other sources, among the same prompts.
    path = tmp_path / "sources.txt"
    path.write_text(read_prompts(chosen, model.folder)[0] + "\n")
    assert folders(of_task(recipe, "edit", strengths=[0.5], prompts=str(path))) == 5


def test_inpainting_hides_the_hole_and_keeps_what_is_around_it(
    model: DiffusionModel, recipe: Recipe, cache: Path
) -> None:
    examples = examples_of(model, of_task(recipe, "inpaint", coverage=[0.2, 0.6]), cache)
    inputs = examples.step_inputs(ROWS)
    source = examples.source(ROWS)
    images = examples.images(ROWS)
    hidden = (source == 127).all(dim=-1)
    cell_size = model.pipe.vae_scale_factor
    expected = np.stack([latent_mask(hole.numpy(), cell_size) for hole in hidden.float()])
    assert np.array_equal(inputs["mask"].numpy(), expected)
    coverage = hidden.float().mean(dim=(1, 2))
    assert ((coverage > 0.19) & (coverage < 0.61)).all()

    # A white image shows in the hole alone.
    white = examples.composite(torch.ones_like(images), ROWS)
    inside = hidden[:, None].expand_as(white)
    assert torch.equal(white[~inside], images[~inside])
    assert (white[inside] == 1).all()
    assert not torch.equal(inputs["noise"][0], inputs["noise"][1])


def test_upscaling_starts_from_the_small_image(
    model: DiffusionModel, recipe: Recipe, cache: Path
) -> None:
    examples = examples_of(model, of_task(recipe, "upscale", factor=2, without_prompt=1.0), cache)
    assert list(examples.step_inputs(ROWS)) == ["source"]
    error = (to_float(examples.source(ROWS)) - examples.images(ROWS)).abs().mean()
    assert 0 < error < 0.2
    assert torch.allclose(examples.conditions(ROWS).context_BLD, model.context([""] * 3), atol=1e-6)


def test_a_factor_that_does_not_divide_the_size_is_refused_before_any_pair_is_made(
    model: DiffusionModel, recipe: Recipe, tmp_path: Path
) -> None:
    odd = of_task(recipe, "upscale", factor=3)
    with pytest.raises(HipaError, match=r"source.factor = 3 does not divide 32x32"):
        examples_of(model, odd, tmp_path)
    assert not list(tmp_path.iterdir())
    for check in (check_request, check_dry_run):
        with pytest.raises(HipaError, match=r"source.factor = 3 does not divide 32x32"):
            check(odd, model.folder, None, Style())
    check_request(odd.model_copy(update={"resolution": 48}), model.folder, None, Style())


def test_edits_start_from_the_same_thing() -> None:
    training = read_prompt_file(MODEL / "prompts.txt")
    unknown = ["noto emoji of an unknown thing", "3d emoji of an unknown thing"]
    starts = edit_starts(["twemoji emoji of a grinning face", *unknown], training, r"emoji of (.*)")
    assert starts == ["3d emoji of a grinning face", *unknown]


def test_prompts_without_another_are_told(
    model: DiffusionModel, recipe: Recipe, cache: Path
) -> None:
    prompts = read_prompts(recipe, model.folder)
    edit = of_task(recipe, "edit", strengths=[1.0], same="no prompt has this (.*)")
    screen = io.StringIO()
    task_examples(model, edit, prompts, cache=cache, console=Console(file=screen, width=80))
    told = f"relates {len(prompts)} of {len(prompts)} prompts to no other"
    assert screen.getvalue().count(told) == 1


def test_related_prompts() -> None:
    prompts = ["3d emoji of a cat", "flat emoji of a cat", "3d emoji of a dog", "a tree"]
    related = related_prompts(prompts, r"emoji of (.*)")
    assert [related(i) for i in range(4)] == [[0, 1], [0, 1], [2], [3]]
    assert related_prompts(prompts, None)(2) == [0, 1, 2, 3]


@pytest.mark.parametrize("task", ["edit", "inpaint", "upscale"])
def test_an_adaptor_of_each_task_trains(
    task: str, recipe: Recipe, model_dir: Path, cache: Path, tmp_path: Path
) -> None:
    chosen = of_task(recipe, task, strengths=[0.5])
    path = train_adaptor(
        chosen, model_dir, tmp_path / "adaptor", cache=cache, device="cpu", console=QUIET
    )
    metadata = read_metadata(path)
    assert (metadata.task, metadata.timestep) == (task, 499 if task == "edit" else 999)
    assert metadata.strengths == ((0.5,) if task == "edit" else ())
    assert metadata.upscale == 4
    samples = Image.open(tmp_path / "adaptor.run" / "samples" / "step-00000004.png")
    assert samples.width > 4 * 8  # source, target, base and adapted


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    for name, colour in {"a.png": "red", "b.jpg": "blue", "more/c.png": "white"}.items():
        Image.new("RGB", (40, 30), colour).save(folder / name)
    (folder / "metadata.csv").write_text("file_name,text\na.png,a red wall\nmore/c.png,snow\n")
    return folder


def test_real_images_with_captions(
    model: DiffusionModel, recipe: Recipe, images: Path, cache: Path
) -> None:
    examples = examples_of(
        model, of_task(recipe, "upscale", images=str(images), without_prompt=0.0), cache
    )
    assert examples.count == 3
    assert torch.allclose(examples.images(ROWS)[0, :, 0, 0], torch.tensor([1.0, 0, 0]))
    expected = model.context(["a red wall", "", "snow"])
    assert torch.allclose(examples.conditions(ROWS).context_BLD, expected, atol=1e-6)
    edited = examples_of(model, of_task(recipe, "edit", images=str(images), strengths=[0.5]), cache)
    assert edited.count == 3


def test_text_to_image_learns_the_teachers_edits_of_pictures_from_noise_alone(
    model: DiffusionModel, recipe: Recipe, images: Path, cache: Path
) -> None:
    chosen = of_task(recipe, "generate", images=str(images), strengths=[1.0, 0.5], per_image=2)
    examples = examples_of(model, chosen, cache)
    first = recipe.teacher.pairs
    assert examples.count == first + 6
    assert examples.source is None

    # The prompts' own pairs come first, and are those of a recipe without pictures.
    alone = examples_of(model, of_task(recipe, "generate"), cache)
    assert torch.equal(examples.latents(ROWS), alone.latents(ROWS))

    # Each picture has both strengths; the student sees nothing of it.
    rows = first + torch.arange(6)
    assert list(examples.step_inputs(rows)) == ["noise"]
    assert examples.prompts(rows) == ["a red wall"] * 2 + [""] * 2 + ["snow"] * 2
    noise = examples.step_inputs(rows[1:2])["noise"]
    red = torch.zeros(1, 3, *model.resolution)
    red[:, 0] = 1
    signal = model.alpha_bar(499)
    start = signal**0.5 * model.encode(red) + (1 - signal) ** 0.5 * noise
    expected = teacher_latents(
        model, start, model.conditions(["a red wall"]), model.unguided(), chosen.teacher, 499
    )
    assert torch.allclose(examples.latents(rows[1:2]), expected, atol=1e-2)


def test_pictures_of_text_to_image_are_learned_or_refused(
    recipe: Recipe, images: Path, tmp_path: Path, cache: Path
) -> None:
    with pytest.raises(ValueError, match=r"source\.captions = false leaves text to image nothing"):
        of_task(recipe, "generate", images=str(images), captions=False, strengths=[0.5])
    with pytest.raises(ValueError, match=r"strength 0\.3 is no whole number"):
        of_task(recipe, "generate", images=str(images), strengths=[0.3])
    chosen = of_task(recipe, "generate", images=str(images), strengths=[0.5])
    loss = {"perceptual": "none", "hf_weight": 0, "latent_weight": 0}
    with pytest.raises(ValueError, match="needs a loss that compares with the teacher's images"):
        Recipe.model_validate(chosen.model_dump() | {"loss": loss, "score": {"weight": 1}})
    path = train_adaptor(
        chosen,
        MODEL,
        tmp_path / "adaptor",
        cache=cache,
        device="cpu",
        console=QUIET,
    )
    metadata = read_metadata(path)
    assert (metadata.task, metadata.strengths) == ("generate", ())
    assert metadata.recipe["source"]["images"] == "images"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"strengths": [0.3]}, "strength 0.3 is no whole number of teacher.steps = 4"),
        ({"strengths": [0.5, 0.5]}, "each once"),
        ({"strengths": [1.5]}, "less than or equal to 1"),
        ({"same": "("}, "not a regular expression"),
        ({"same": "a"}, "one group, got 0"),
        ({"coverage": [0.5, 0.1]}, "0 < least <= largest < 1"),
    ],
)
def test_mistakes(recipe: Recipe, source: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        of_task(recipe, "edit", **source)


def test_strengths_descend() -> None:
    assert SourceSettings(strengths=(0.25, 0.75)).strengths == (0.75, 0.25)


def test_a_nine_channel_model_learns_from_real_images(
    recipe: Recipe, images: Path, cache: Path, tmp_path: Path
) -> None:
    folder = make_model(tmp_path / "nine", in_channels=9)
    chosen = of_task(recipe, "inpaint", images=str(images))
    path = train_adaptor(
        chosen, folder, tmp_path / "adaptor", cache=cache, device="cpu", console=QUIET
    )
    metadata = read_metadata(path)
    assert (metadata.task, metadata.recipe["source"]["images"]) == ("inpaint", "images")
    with pytest.raises(HipaError, match=r"makes no images to learn from\. Set source\.images"):
        train_adaptor(
            of_task(recipe, "inpaint"),
            folder,
            tmp_path / "b",
            cache=cache,
            device="cpu",
            console=QUIET,
        )


def test_another_prompt_is_the_choice_among_the_others() -> None:
    for group in ([3], [0, 4], [1, 2, 5, 8, 9]):
        for own in group:
            others = [index for index in group if index != own]
            for seed in range(20):
                chosen = int(np.random.default_rng(seed).choice(others or [own]))
                assert examples_module._another(np.random.default_rng(seed), group, own) == chosen


def test_many_edits_among_many_prompts_are_chosen_in_seconds() -> None:
    # With a list of the others for each of them: half a minute.
    prompts = [str(number) for number in range(20_000)]
    related = related_prompts(prompts, None)
    start = time.process_time()
    for own in range(len(prompts)):
        examples_module._another(np.random.default_rng(own), related(own), own)
    assert time.process_time() - start < 10

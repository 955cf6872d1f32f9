"""The held-out measure: it is measured, the best step is kept, and a plateau ends the training."""

from __future__ import annotations

import errno
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hipa_deploy.embedded import MODEL
from hipa_deploy.errors import HipaError
from hipa_deploy.models.adaptor_folder import WEIGHTS, read_metadata
from hipa_deploy.models.style import Style
from hipa_deploy.train.evaluation.quality import (
    high_frequency_ratio,
    lite0_features,
    paired_distance,
)
from hipa_deploy.train.held_out import HeldOutMeasure, held_out_examples
from hipa_deploy.train.loop.plateau import Plateau
from hipa_deploy.train.model.diffusion_model import DiffusionModel, to_uint8
from hipa_deploy.train.recipes.held_out_settings import HeldOutSettings
from hipa_deploy.train.recipes.recipe import (
    SHIPPED,
    Recipe,
    held_out_prompts,
    load_any_recipe,
    load_recipe,
    read_prompts,
)
from hipa_deploy.train.train_adaptor import train_adaptor
from hipa_deploy.train.training_request import check_dry_run, check_request, trained_prompts
from tests.tiny_model import make_model
from tests.weights import differences, read_weights

PROMPTS = ["a red house", "a blue boat", "a tree"]


@pytest.fixture
def watched(recipe: Recipe, tmp_path: Path) -> Recipe:
    """The recipe with a measurement after every step, on prompts of its own."""
    path = tmp_path / "held-out.txt"
    path.write_text("\n".join(PROMPTS) + "\n")
    held_out = HeldOutSettings(prompts=str(path), count=3, every=1)
    return recipe.model_copy(update={"held_out": held_out, "checkpoint_every": 1})


def train(recipe: Recipe, model_dir: Path, out: Path, cache: Path) -> str:
    """Train, and return what was printed."""
    screen = Console(file=io.StringIO(), width=1000)
    train_adaptor(recipe, model_dir, out, cache=cache, console=screen, device="cpu")
    return screen.file.getvalue()


def with_held_out(recipe: Recipe, **changes: Any) -> Recipe:
    held_out = recipe.held_out.model_copy(update=changes)
    return recipe.model_copy(update={"held_out": held_out})


@pytest.mark.parametrize("task", ["generate", "inpaint", "upscale", "edit"])
def test_the_measure_is_that_of_the_report(
    watched: Recipe, model: DiffusionModel, cache: Path, task: str
) -> None:
    update: dict[str, Any] = {"task": task}
    if task == "edit":
        update["source"] = watched.source.model_copy(update={"strengths": (0.5,)})
        update["teacher"] = watched.teacher.model_copy(update={"steps": 2})
    recipe = watched.model_copy(update=update)
    examples = held_out_examples(model, recipe, PROMPTS, cache=cache)
    assert examples.count == 3
    assert set(examples.prompts(torch.arange(3))) <= {*PROMPTS, ""}

    def student(rows: torch.Tensor) -> torch.Tensor:
        return 0.5 * examples.images(rows) + 0.3

    values = HeldOutMeasure(examples.images, student, 3, torch.device("cpu"))()
    rows = torch.arange(3)
    teacher = to_uint8(examples.images(rows)).numpy()
    shown = to_uint8(student(rows)).numpy()
    cosine = torch.cosine_similarity(lite0_features(shown), lite0_features(teacher)).mean()
    assert values["held_out/feature_distance"] == pytest.approx(1 - float(cosine), abs=1e-5)
    assert values["held_out/dists_like"] == pytest.approx(paired_distance(shown, teacher), abs=1e-5)
    ratio = high_frequency_ratio(shown, teacher)
    assert values["held_out/high_frequency"] == pytest.approx(ratio, rel=1e-4)
    # As many at once as a micro-batch has change no value.
    same = HeldOutMeasure(examples.images, examples.images, 3, torch.device("cpu"), 2)()
    assert list(same.values()) == pytest.approx([0, 0, 1], abs=1e-5)


def test_the_noise_is_not_that_of_the_training(
    watched: Recipe, model: DiffusionModel, cache: Path
) -> None:
    first = torch.arange(1)
    unseen = held_out_examples(model, watched, PROMPTS, cache=cache).step_inputs(first)
    seed = watched.seed
    trained = model.noise([(seed + 1) << 32])
    assert not torch.equal(unseen["noise"], trained)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two white images with captions, the first of which is a held-out prompt too."""
    images = tmp_path / "images"
    images.mkdir()
    for name, caption in {"a": PROMPTS[0], "b": "snow"}.items():
        Image.new("RGB", (32, 32), "white").save(images / f"{name}.png")
        (images / f"{name}.txt").write_text(caption)
    return images


def of_folder(recipe: Recipe, task: str, folder: Path) -> Recipe:
    values = recipe.model_dump()
    values["teacher"] |= {"steps": 2}
    source = {"images": str(folder), "strengths": [0.5], "without_prompt": 0.0}
    return Recipe.model_validate(values | {"task": task, "source": source})


@pytest.mark.parametrize("task", ["inpaint", "upscale", "edit"])
def test_a_folder_of_images_is_not_measured_on(
    watched: Recipe, model: DiffusionModel, cache: Path, folder: Path, task: str
) -> None:
    chosen = of_folder(watched, task, folder)
    examples = held_out_examples(model, chosen, PROMPTS, cache=cache)
    rows = torch.arange(3)
    assert examples.count == watched.held_out.count == 3
    assert set(examples.prompts(rows)) <= set(PROMPTS)
    assert (examples.images(rows) < 0.99).flatten(1).any(dim=1).all()


def test_captions_that_are_trained_on_are_left_out(
    watched: Recipe, model_dir: Path, folder: Path
) -> None:
    chosen = of_folder(watched, "upscale", folder)
    trained = trained_prompts(chosen, read_prompts(chosen, model_dir))
    assert held_out_prompts(chosen, model_dir, trained) == PROMPTS[1:]
    source = chosen.source.model_copy(update={"captions": False})
    without = chosen.model_copy(update={"source": source})
    assert trained_prompts(without, ["a"]) == ["a"]


def test_a_nine_channel_model_has_no_held_out_prompts(
    watched: Recipe, folder: Path, cache: Path, tmp_path: Path
) -> None:
    nine = make_model(tmp_path / "nine", in_channels=9)
    chosen = of_folder(watched, "inpaint", folder)
    expected = r"makes no images of held-out prompts.* Leave held_out\.prompts out"
    with pytest.raises(HipaError, match=expected):
        check_request(chosen, nine, None, Style())
    with pytest.raises(HipaError, match=expected):
        check_dry_run(chosen, nine, None, Style())
    with pytest.raises(HipaError, match=expected):
        train(chosen, nine, tmp_path / "adaptor", cache)
    check_request(with_held_out(chosen, prompts=None), nine, None, Style())


def test_measuring_changes_no_weight_and_keeps_the_best(
    watched: Recipe, recipe: Recipe, model_dir: Path, cache: Path, tmp_path: Path
) -> None:
    printed = train(watched, model_dir, tmp_path / "adaptor", cache)
    train(recipe, model_dir, tmp_path / "unwatched", cache)
    weights = read_weights(tmp_path / "adaptor" / WEIGHTS)
    assert not differences(weights, read_weights(tmp_path / "unwatched" / WEIGHTS))

    run = tmp_path / "adaptor.run"
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    measured = events.Scalars("held_out/feature_distance")
    assert [event.step for event in measured] == [0, 1, 2, 3, 4]
    for name in ("loss", "fourier", "gradient_norm", "learning_rate", "held_out/dists_like"):
        assert name in events.Tags()["scalars"]
    assert "samples" in events.Tags()["images"]

    best = min(measured, key=lambda event: event.value)
    assert best.step > 0
    (kept,) = run.glob("best-step-*")
    assert kept.name == f"best-step-{best.step:08d}"
    assert read_metadata(kept, model_dir).steps_trained == best.step
    if best.step < 4:
        assert f"best at step {best.step}" in printed


def test_a_plateau_ends_the_training_and_resumes_exactly(
    watched: Recipe, model_dir: Path, cache: Path, tmp_path: Path, stop_after: Any
) -> None:
    patient = with_held_out(watched, patience=2, min_delta=1.0)
    out = tmp_path / "adaptor"
    printed = train(patient, model_dir, out, cache)
    # Nothing is better than the start by 1: the measurements after steps 1 and 2 are the plateau.
    assert "stopped early at step 2" in printed
    assert read_metadata(out).steps_trained == 2
    with pytest.raises(HipaError, match=r"stopped early, after 2 of 4 steps\. There is nothing"):
        train(patient, model_dir, out, cache)

    # A run that was stopped in between counts on.
    stop_after(1)
    with pytest.raises(HipaError, match="stopped at step 1"):
        train(patient, model_dir, tmp_path / "broken", cache)
    stop_after(None)
    assert "stopped early at step 2" in train(patient, model_dir, tmp_path / "broken", cache)
    weights = read_weights(tmp_path / "broken" / WEIGHTS)
    assert not differences(weights, read_weights(out / WEIGHTS))

    # Without patience it goes on.
    train(with_held_out(patient, patience=0), model_dir, out, cache)
    assert read_metadata(out).steps_trained == 4


def test_a_plateau_whose_result_was_not_written_takes_no_step_more(
    watched: Recipe,
    model_dir: Path,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    patient = with_held_out(watched, patience=2, min_delta=1.0)
    train(patient, model_dir, tmp_path / "unbroken", cache)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "no space")

    out = tmp_path / "broken"
    with monkeypatch.context() as disk:
        disk.setattr("hipa_deploy.train.train_adaptor.replacing", full)
        with pytest.raises((HipaError, OSError)):
            train(patient, model_dir, out, cache)
    assert "stopped early at step 2" in train(patient, model_dir, out, cache)
    assert read_metadata(out).steps_trained == 2
    assert not differences(
        read_weights(out / WEIGHTS), read_weights(tmp_path / "unbroken" / WEIGHTS)
    )


def test_another_patience_is_counted_anew(
    watched: Recipe, model_dir: Path, cache: Path, tmp_path: Path
) -> None:
    longer = watched.model_copy(update={"steps": 6})
    out = tmp_path / "adaptor"
    train(with_held_out(longer, patience=2, min_delta=1.0), model_dir, out, cache)
    assert read_metadata(out).steps_trained == 2
    train(with_held_out(longer, patience=3, min_delta=1.0), model_dir, out, cache)
    assert read_metadata(out).steps_trained == 5


def test_values_of_other_prompts_are_not_compared(tmp_path: Path) -> None:
    plateau = Plateau(2, 0.0, "a")
    plateau.take(0.1, 7)
    other = Plateau(2, 0.0, "b")
    other.load(plateau.state(), tmp_path / "state.pt")
    assert other.take(0.5, 8)
    same = Plateau(2, 0.0, "a")
    same.load(plateau.state(), tmp_path / "state.pt")
    assert not same.take(0.5, 8)
    for stored in ([], {"best": "x"}, plateau.state() | {"step": -1}):
        with pytest.raises(HipaError, match="held-out measurements"):
            same.load(stored, tmp_path / "state.pt")


def test_prompts_that_are_trained_on_are_left_out(
    watched: Recipe, model_dir: Path, tmp_path: Path
) -> None:
    trained = read_prompts(watched, model_dir)
    path = tmp_path / "held-out.txt"
    path.write_text("\n".join([*trained, *PROMPTS]) + "\n")
    assert held_out_prompts(watched, model_dir, trained) == PROMPTS
    path.write_text("\n".join(trained) + "\n")
    with pytest.raises(HipaError, match=r"not trained on as well\. Expected at least 2"):
        held_out_prompts(watched, model_dir, trained)


def test_patience_needs_prompts(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="held-out prompts"):
        HeldOutSettings(patience=2)
    (tmp_path / "r.toml").write_text('prompts = "a"\nsteps = 1\n[teacher]\npairs = 1\n')
    loaded = load_recipe(tmp_path / "r.toml", {"held_out.prompts": "b.txt"})
    assert loaded.held_out.prompts == str(tmp_path / "b.txt")


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.toml")), ids=lambda path: path.stem)
def test_every_included_recipe_has_held_out_prompts(path: Path, tmp_path: Path) -> None:
    captions = tmp_path / "captions.txt"
    captions.write_text("a boat\n")
    own = {} if path.stem.startswith("emoji") else {"prompts": str(captions)}
    recipe = load_any_recipe(path.stem, own)
    trained = read_prompts(recipe, MODEL)
    held_out = held_out_prompts(recipe, MODEL, trained)
    assert len(held_out) >= recipe.held_out.count
    # It costs little: not one image in a hundred of those that a training sees.
    assert recipe.measurements * recipe.held_out.count < 0.01 * recipe.steps * recipe.batch


def test_held_out_prompts_of_the_model_go_with_the_recipes_own(tmp_path: Path) -> None:
    captions = tmp_path / "captions.txt"
    captions.write_text("a boat\n")
    other = {"prompts": str(captions)}
    assert load_recipe("emoji", other).held_out.prompts is None
    assert load_recipe("emoji", {**other, "held_out.prompts": "x.txt"}).held_out.prompts
    assert load_recipe("sd15", other).held_out.prompts == "included:held_out.txt"
    with pytest.raises(HipaError, match="patience needs held-out prompts"):
        load_recipe("emoji", {**other, "held_out.patience": 3})

from __future__ import annotations

import io
import sys
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console
from rich.table import Table

from hipa_deploy.bundle.text_settings import TextSettings
from hipa_deploy.embedded import MODEL
from hipa_deploy.errors import HipaError
from hipa_deploy.train.loop.training_steps import batch_rows
from hipa_deploy.train.model import mixed_precision
from hipa_deploy.train.prediction import dry_run
from hipa_deploy.train.recipes.recipe import Recipe, load_recipe

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


predict_once = cache(dry_run.predict_training)


@pytest.fixture(autouse=True)
def predictions_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry_run, "predict_training", predict_once)
    seconds = {"teacher call": 1.0, "warm-up step": 2.0, "step": 4.0, "held-out rows": 1.0}
    monkeypatch.setattr(dry_run, "measure_steps", lambda recipe, model_dir: seconds)


@dataclass(frozen=True)
class Card:
    title: str = "a card"
    memory_gib: int | None = 24
    fp16_tflops: float | None = 100.0
    fp16_accumulate: str | None = "either"
    tf32_tflops: float | None = 50.0


def text_of(shown: list) -> str:
    console = Console(width=120, file=io.StringIO())
    console.print(*shown, sep="\n", markup=False, highlight=False)
    return console.file.getvalue()


def test_the_resolved_recipe_is_a_recipe(recipe: Recipe) -> None:
    assert Recipe.model_validate(tomllib.loads(dry_run.to_toml(recipe))) == recipe


def test_a_resolved_recipe_with_any_characters_is_read_back(recipe: Recipe) -> None:
    for name in ("cap\U0001f600.txt", "caf\xe9.txt", 'a\x7fb\x01\t"\\.txt', "a\u2028b.txt"):
        named = recipe.model_copy(update={"prompts": name})
        assert Recipe.model_validate(tomllib.loads(dry_run.to_toml(named))) == named


def test_a_small_model_is_measured(model_dir: Path, recipe: Recipe) -> None:
    shown, problem = dry_run.dry_run(recipe, model_dir, [Card()])
    text = text_of(shown)
    assert problem is None
    for expected in (
        "3 distinct",
        "predicts epsilon, 32x32 pixels",
        "full, rank 2",
        "Predicted",
        "Measured on this",
    ):
        assert expected in text
    assert "a card" not in text


def test_float32_in_place_of_the_decoders_precision_is_said(
    model_dir: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mixed_precision, "_cpu_computes_in", lambda precision: False)
    halved = recipe.model_copy(update={"vae_precision": "bf16"})
    shown, _ = dry_run.dry_run(halved, model_dir, [])
    assert "no instructions for bfloat16, which" in text_of(shown)
    shown, _ = dry_run.dry_run(recipe, model_dir, [])
    assert "no instructions" not in text_of(shown)


def test_a_large_model_is_predicted_for_named_gpus(
    model_dir: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dry_run, "SMALL_FLOPS", 0)
    cards = [Card(), Card("unknown", None), Card("slow", 24, None)]
    shown, _ = dry_run.dry_run(recipe, model_dir, cards)
    text = text_of(shown)
    assert "a card" in text
    assert "Predicted hours on one GPU, at 30% (pairs) and 10% (steps)" in text
    assert not any(word in text for word in ("unknown", "slow", "Measured"))


def test_hours_fits_and_accumulation(model_dir: Path, recipe: Recipe) -> None:
    teacher = recipe.teacher.model_copy(update={"mixed_precision": "fp16"})
    mixed = recipe.model_copy(update={"mixed_precision": "bf16", "teacher": teacher})
    prediction = dry_run.predict_training(mixed, model_dir)
    cards = [Card(), Card("half", fp16_accumulate="fp16"), Card("none", memory_gib=0)]
    rows = rows_of(dry_run.gpu_table(prediction, cards))
    assert float(rows[0][4]) == pytest.approx(prediction.pairs_flops / 30e12 / 3600, rel=0.01)
    assert float(rows[0][5]) == pytest.approx(prediction.training_flops / 10e12 / 3600, rel=0.01)
    assert float(rows[1][4]) == pytest.approx(2 * float(rows[0][4]), rel=0.02)
    assert [row[2] for row in rows] == ["yes", "yes", "no"]
    assert [row[3] for row in rows] == [str(recipe.batch), str(recipe.batch), "0"]


def test_float32_is_predicted_at_the_rate_of_tf32(model_dir: Path, recipe: Recipe) -> None:
    prediction = dry_run.predict_training(recipe, model_dir)
    rows = rows_of(dry_run.gpu_table(prediction, [Card(), Card(tf32_tflops=None)]))
    assert float(rows[0][5]) == pytest.approx(prediction.training_flops / 5e12 / 3600, rel=0.01)
    assert rows[1][4:] == ("unknown", "unknown")


def test_two_gpus_take_half_the_hours(model_dir: Path, recipe: Recipe) -> None:
    one = dry_run.hours(dry_run.predict_training(recipe, model_dir), Card())
    two = dry_run.hours(dry_run.predict_training(recipe, model_dir, 2), Card())
    assert two == pytest.approx([hours / 2 for hours in one], rel=0.02)


def test_what_can_hardly_be_meant_is_said(model_dir: Path, recipe: Recipe) -> None:
    prediction = dry_run.predict_training(recipe, model_dir)
    assert dry_run.doubts(prediction, 3) == []

    # 6 pairs, 4 steps of a batch; images of 32 pixels.
    teacher = recipe.teacher.model_copy(update={"pairs": 50_000})
    loss = recipe.loss.model_copy(update={"perceptual_size": 64})
    odd = recipe.model_copy(update={"teacher": teacher, "loss": loss})
    found = dry_run.doubts(replace(prediction, recipe=odd, alpha_bar=0.0), 40)
    for number, expected in enumerate(
        ("50,000 pairs of 40 prompts", "perceptual_size = 64", "alpha_bar is 0", "for nothing")
    ):
        assert expected in found[number]
    loss = recipe.loss.model_copy(update={"custom": "my_losses:f"})
    own = dry_run.doubts(replace(prediction, recipe=recipe.model_copy(update={"loss": loss})), 3)
    assert "the cost of the loss my_losses:f is not known" in own[0]
    unread = dry_run.doubts(replace(prediction, recipe=odd), None)
    assert not any("prompts" in text for text in unread)


def test_a_folders_images_are_not_made(model_dir: Path, recipe: Recipe) -> None:
    prediction = predict_once(recipe, model_dir)
    teacher = recipe.teacher.model_copy(update={"pairs": 50_000})

    def of(task: str, **source: object) -> dry_run.TrainingPrediction:
        values = recipe.model_dump() | {"task": task, "source": source}
        chosen = Recipe.model_validate(values).model_copy(update={"teacher": teacher})
        return replace(prediction, recipe=chosen, pairs_bytes=100_000_000)

    of_folder = of("upscale", images="photos", factor=2)
    assert dry_run.doubts(of_folder, 3) == []
    text = text_of([dry_run.facts_table(of_folder, model_dir, "3 distinct")])
    assert "none: the images are those of source.images" in text
    assert "GB" not in text

    edits = of("edit", strengths=[1.0], per_image=4)
    assert "draw about 8 of the 200,000 edits" in dry_run.doubts(edits, 1000)[0]
    text = text_of([dry_run.facts_table(edits, model_dir, "3 distinct")])
    assert "50,000, 200,000 edits: 0.10 GB in the cache" in text
    edits_of_folder = of("edit", strengths=[1.0], per_image=4, images="photos")
    assert dry_run.doubts(edits_of_folder, 3) == []
    text = text_of([dry_run.facts_table(edits_of_folder, model_dir, "3 distinct")])
    assert "200,000 edits, where the folder has 50,000 images: 0.10 GB" in text

    # Text to image learns the prompts' images beside the edits of pictures.
    pictures = of("generate", strengths=[1.0], per_image=2, images="photos")
    assert dry_run.doubts(pictures, 1000) == []
    text = text_of([dry_run.facts_table(pictures, model_dir, "3 distinct")])
    assert "50,000, 100,000 edits, where the folder has 50,000 images: 0.10 GB" in text


def test_the_images_of_a_folder_are_counted(
    model_dir: Path, recipe: Recipe, tmp_path: Path
) -> None:
    for number in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
    teacher = recipe.teacher.model_copy(update={"pairs": 50})

    def of(task: str, **source: object) -> dry_run.TrainingPrediction:
        source = {"images": str(tmp_path), **source}
        values = recipe.model_dump() | {"task": task, "source": source}
        chosen = Recipe.model_validate(values).model_copy(update={"teacher": teacher})
        return predict_once(chosen, model_dir)

    of_folder = of("edit", strengths=[1.0], per_image=4)
    text = text_of([dry_run.facts_table(of_folder, model_dir, "3 distinct")])
    assert "12 edits of the folder's 3 images: " in text
    batch = of_folder.recipe.teacher.batch
    assert of_folder.sampler_batches == pytest.approx(12 / batch)

    pictures = of("generate", strengths=[1.0], per_image=2)
    text = text_of([dry_run.facts_table(pictures, model_dir, "3 distinct")])
    assert "50, 6 edits of the folder's 3 images: " in text
    assert pictures.sampler_batches == pytest.approx(56 / batch)
    assert "of the 56 pairs and edits" in dry_run.doubts(pictures, 1000)[0]

    assert dry_run.doubts(of("upscale", factor=2), 1000) == []


def test_the_pairs_that_the_steps_draw_are_those_of_a_training() -> None:
    drawn = set()
    for step in range(500):
        drawn.update(batch_rows(8192, 16, seed=0, step=step).tolist())
    assert dry_run.expected_rows(8192, 16, 500) == pytest.approx(len(drawn), rel=0.02)
    assert dry_run.expected_rows(4, 16, 1) == 4


def test_a_loss_that_is_balanced_by_gradients(model_dir: Path, recipe: Recipe) -> None:
    loss = recipe.loss.model_copy(update={"balance": "gradient", "latent_warmup_steps": 0})
    balanced = recipe.model_copy(update={"loss": loss})
    shown, _ = dry_run.dry_run(balanced, model_dir, [])
    assert "gradient" in text_of(shown)
    with pytest.raises(HipaError, match="needs whole batches"):
        dry_run.dry_run(balanced, model_dir, [], processes=2)
    with pytest.raises(HipaError, match="needs whole batches"):
        dry_run.dry_run(balanced.model_copy(update={"micro_batch": 1}), model_dir, [])


def test_what_a_score_alone_makes_is_counted(model_dir: Path, recipe: Recipe) -> None:
    """Its targets are the two rows of the sample grid."""
    loss = {"perceptual": "none", "hf_weight": 0, "latent_weight": 0}
    changes = {"steps": 1, "loss": loss, "score": {"weight": 1}}
    alone = Recipe.model_validate(recipe.model_dump() | changes)
    assert not alone.needs_targets
    prediction = replace(predict_once(recipe, model_dir), recipe=alone)
    assert not any("for nothing" in text for text in dry_run.doubts(prediction, 3))
    text = text_of([dry_run.facts_table(prediction, model_dir, "3 distinct")])
    assert "│ 2: 0.0" in text


def rows_of(table: Table) -> list[tuple]:
    return list(zip(*[column.cells for column in table.columns], strict=True))


def test_prompts_that_cannot_be_read_are_reported_after_the_tables(
    model_dir: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prediction = predict_once(recipe, model_dir)
    monkeypatch.setattr(dry_run, "predict_training", lambda *_: prediction)
    bad = recipe.model_copy(update={"prompts": str(tmp_path / "none.txt")})
    shown, problem = dry_run.dry_run(bad, model_dir, [])
    assert isinstance(problem, HipaError)
    assert "unreadable" in text_of(shown)


RECIPES = sorted(path.stem for path in (Path(__file__).parents[3] / "train/recipes").glob("*.toml"))
DECODERS = [name for name in RECIPES if name.endswith("-decoder")]
ADAPTORS = [name for name in RECIPES if name not in DECODERS]
QUICK = ["emoji"]
THOROUGH = [
    pytest.param(name, marks=pytest.mark.thorough)
    for name in ADAPTORS
    if name.startswith("emoji") and name not in QUICK
]


@pytest.mark.parametrize("name", [*QUICK, *THOROUGH])
def test_every_recipe_of_the_embedded_model_is_predicted(name: str) -> None:
    """Its loss runs on tensors without values, whatever it is made of.

    Those for Stable Diffusion are predicted on their own models in test_headers.py.
    """
    shown, problem = dry_run.dry_run(load_recipe(name), MODEL, [])
    assert problem is None
    assert shown


def test_a_recipe_of_sdxl_runs_on_a_tiny_one(sdxl_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "captions.txt").write_text("a boat\n")
    changes = {
        "prompts": str(tmp_path / "captions.txt"),
        "decode_crop": 8,  # the tiny model has 16 latents a side
        "batch": 2,
        "teacher.batch": 2,
        "adaptor.rank": 2,
        "gradient_checkpointing": False,
        # Half precision is slow on a CPU, and the steps are run.
        "mixed_precision": "no",
        "vae_precision": "no",
        "teacher.mixed_precision": "no",
    }
    shown, problem = dry_run.dry_run(load_recipe("vega", changes), sdxl_dir, [])
    assert problem is None
    text = text_of(shown)
    assert "text_encoder_2" in text
    assert "held-out measure" in text
    assert "held-out rows" in text
    assert "squares of 32" in text
    # The perceptual distance sees squares, so it is their size that 256 pixels would enlarge.
    assert "larger than the images of 32 pixels" in text

    with pytest.raises(HipaError, match="decode_crop = 64 is larger"):
        dry_run.dry_run(load_recipe("vega", {**changes, "decode_crop": 64}), sdxl_dir, [])
    fp16 = {**changes, "vae_precision": "fp16"}
    with pytest.raises(HipaError, match="overflows fp16"):
        dry_run.dry_run(load_recipe("vega", fp16), sdxl_dir, [])


def test_text_settings_that_do_not_fit_are_refused_as_in_a_training(
    model_dir: Path, recipe: Recipe
) -> None:
    recipe = recipe.model_copy(update={"text": TextSettings(context_tokens=100)})
    with pytest.raises(HipaError, match="Expected one of: 77, 154, 231"):
        dry_run.dry_run(recipe, model_dir, [Card()])

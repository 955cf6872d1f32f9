"""The set of ingredients: its items, and a report from nothing, on a tiny model."""

from __future__ import annotations

import csv
import io
import shutil
from pathlib import Path
from string import ascii_lowercase

import evaluation
import numpy as np
import pytest
import torch
from bars import bars_section
from evaluation import Reference, Split, splits
from ingredients import AS_FAST, ingredient_items, quick_ingredient_items
from items import FIRST, MAIN, find_item
from rich.console import Console
from run_item import Setting, run_item
from summary import write_report

from hipa_deploy.train.losses.hipa_loss import image_weights
from hipa_deploy.train.recipes.recipe import Recipe

QUIET = Console(file=io.StringIO())


def letters(captions: list[str]) -> torch.Tensor:
    """In place of MiniLM: how often each letter occurs."""
    counts = [[caption.count(letter) for letter in ascii_lowercase] for caption in captions]
    return torch.tensor(counts).float()


@pytest.fixture(scope="module")
def levels_dir(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    """A model folder with captions of every level."""
    folder = tmp_path_factory.mktemp("levels") / "model"
    shutil.copytree(model_dir, folder)
    (folder / "prompts_kind.txt").write_text("a fruit\na vehicle\na toy\n")
    (folder / "prompts_style.txt").write_text("flat\nround\n")
    return folder


@pytest.fixture
def setting(recipe: Recipe, levels_dir: Path, cache: Path, tmp_path: Path) -> Setting:
    return Setting(
        out=tmp_path / "report",
        model=levels_dir,
        adaptor=tmp_path / "no-adaptor",
        recipe=recipe,
        repeats=2,
        quick=True,
        cache=cache,
        ingredients=True,
    )


def test_needs_come_first_and_names_are_unique(recipe: Recipe) -> None:
    for items in (ingredient_items(recipe, "photos"), quick_ingredient_items(recipe)):
        done: list[str] = []
        for item in items:
            assert set(item.needs) <= set(done)
            done.append(item.name)
        assert len(set(done)) == len(done)


def test_every_item_has_two_seeds_and_both_budgets(recipe: Recipe) -> None:
    items = ingredient_items(recipe)
    names = {item.name for item in items}
    for item in items:
        if item.group not in ("ingredients", "baselines") or item.method == "average":
            continue
        assert f"{item.name}-seed" in names
        recipe_of_seed = find_item(items, f"{item.name}-seed").recipe(recipe)
        assert recipe_of_seed.seed == recipe.seed + 1
        if not item.name.endswith("-time") and item.name not in AS_FAST:
            assert find_item(items, f"{item.name}-time").as_long_as == MAIN


def test_what_begins_anew_is_left_out_where_others_start_from_an_adaptor(recipe: Recipe) -> None:
    methods = {item.method for item in ingredient_items(recipe, from_start=True)}
    assert methods == {"references", "adaptor", "hipa", "average"}


def test_what_is_alone_has_no_other_term(recipe: Recipe) -> None:
    items = ingredient_items(recipe)
    score = find_item(items, "score-alone").recipe(recipe)
    assert not any(image_weights(score.loss).values())
    assert not score.needs_targets
    judge = find_item(items, "judge-alone").recipe(recipe)
    assert not judge.score.weight
    assert judge.needs_targets
    both = find_item(items, "score-judge").recipe(recipe)
    assert both.score.weight
    assert both.latent_discriminator.weight
    assert image_weights(both.loss) == image_weights(recipe.loss)


def test_levels_are_those_that_the_model_has(levels_dir: Path, model_dir: Path) -> None:
    found = splits(levels_dir, 2, levels=True)
    expected = ["held-out pairs", "held-out concepts", "kind captions", "style captions"]
    assert [split.name for split in found] == expected
    assert [split.repeats for split in found] == [2, 2, 4, 4]
    seeds = [seed for split in found for seed in (*split.seeds, *split.other_seeds)]
    assert len(set(seeds)) == len(seeds)
    assert [split.name for split in splits(model_dir, 2, levels=True)] == expected[:2]


def test_variety_is_the_distance_between_images_of_one_prompt() -> None:
    rng = np.random.default_rng(0)
    one, two, three, four = rng.integers(0, 255, (4, 32, 32, 3), dtype=np.uint8)
    split = Split("both", ["a", "b"], 2, 0)
    reference = Reference({"teacher": np.stack([one, two, three, four])}, "teacher",
                          evaluation.lite0_features(np.stack([one, two, three, four])),
                          variety=True)  # fmt: skip
    # Prompt a has images of both repeats alike, prompt b does not.
    images = np.stack([one, two, one, four])
    expected = evaluation.paired_distances(two[None], four[None]).item() / 2
    measured = reference.measure(images, split)
    assert measured["pooled"]["variety"] == pytest.approx(expected, abs=1e-5)
    assert reference.measure(np.stack([one, two, one, two]), split)["pooled"][
        "variety"
    ] == pytest.approx(0, abs=1e-5)


@pytest.mark.thorough
def test_from_nothing_to_a_report(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "sentence_vectors", lambda: letters)
    chosen = (FIRST, MAIN, "score-judge", "hipa-seed", "hipa-average")
    items = [item for item in quick_ingredient_items(setting.recipe) if item.name in chosen]
    assert len(items) == len(chosen)
    for item in items:
        run_item(item, setting, QUIET)
    report = write_report(setting, items).read_text()
    results = {item.name: setting.result(item.name) for item in items}
    assert bars_section(results) in report
    for split in ("held-out pairs", "held-out concepts", "kind captions", "style captions"):
        assert f"### {split.capitalize()}" in report
        assert f"## {split.capitalize()}" in report
    truth = results[FIRST]["truth"]
    for name in ("kind captions", "style captions"):
        row = results[FIRST]["rows"][truth][name]
        assert len(row["repeats"]) == 4
        assert row["pooled"]["variety"] > 0
    assert results["hipa-average"]["cost"]["steps"] == 12
    assert 0 <= results["hipa-average"]["left_out"] < 1

    # The data file has every number that the report has.
    with (setting.out / "numbers.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    wanted = [row for row in rows if row["item"] == "score-judge" and row["noise_seed"] == "all"]
    assert {row["number"] for row in wanted} >= {"kid", "distance", "hf_ratio", "variety"}
    for row in wanted:
        value = results["score-judge"]["splits"][row["split"]]["pooled"][row["number"]]
        assert float(row["value"]) == pytest.approx(value, rel=1e-4)

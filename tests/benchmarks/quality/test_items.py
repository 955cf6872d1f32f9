from __future__ import annotations

import pytest
from items import BASELINES, FIRST, MAIN, QUICK, all_items, base_recipe, find_item, quick_items

from hipa_deploy.errors import HipaError
from hipa_deploy.train.losses.hipa_loss import image_weights
from hipa_deploy.train.recipes.recipe import Recipe, load_recipe


def test_needs_come_first_and_names_are_unique(recipe: Recipe) -> None:
    for items in (all_items(recipe), quick_items(recipe)):
        done: list[str] = []
        for item in items:
            assert set(item.needs) <= set(done)
            done.append(item.name)
        assert len(set(done)) == len(done)
        assert done[0] == FIRST
    assert [item.name for item in quick_items(recipe)] == list(QUICK)


def test_every_baseline_and_ablation_is_there(recipe: Recipe) -> None:
    names = {item.name for item in all_items(recipe)}
    expected = {"hf-both-pixel", "hf-difference", "no-adversarial"}
    expected |= {"rank-4", "rank-16", "rank-64", "preset-full", "hipa-seed"}
    for baseline in BASELINES:
        expected |= {baseline, f"{baseline}-time"}
    for ablation in ("no-hf", "hf-fourier", "hf-edge"):
        expected |= {ablation, f"{ablation}-pixel"}
    assert expected < names


def test_a_baseline_that_walks_the_schedule_starts_at_its_end(recipe: Recipe) -> None:
    early = recipe.model_copy(update={"timestep": 600})
    for name in ("consistency", "consistency-time", "progressive", "progressive-time"):
        assert find_item(all_items(early), name).recipe(early).timestep == 999
    for name in (MAIN, "latent-mse", "no-hf"):
        assert find_item(all_items(early), name).recipe(early).timestep == 600


def weights(name: str, recipe: Recipe) -> dict[str, float]:
    return image_weights(find_item(all_items(recipe), name).recipe(recipe).loss)


def test_an_ablation_changes_what_it_says(recipe: Recipe) -> None:
    with_amplitude = recipe.model_copy(
        update={"loss": recipe.loss.model_copy(update={"amplitude_weight": 2.0})}
    )
    main = weights(MAIN, with_amplitude)
    assert main == image_weights(with_amplitude.loss)
    none = weights("no-hf", with_amplitude)
    assert (none["fourier"], none["edge"], none["amplitude"], none["perceptual"]) == (0, 0, 0, 1)
    fourier = weights("hf-fourier", with_amplitude)
    assert (fourier["fourier"], fourier["edge"], fourier["amplitude"]) == (1, 0, 2)
    edge = weights("hf-edge-pixel", with_amplitude)
    assert (edge["fourier"], edge["edge"], edge["amplitude"], edge["perceptual"]) == (0, 1, 0, 0)
    assert edge["pixel"] > 0
    judged = recipe.model_copy(
        update={"loss": recipe.loss.model_copy(update={"adversarial_weight": 0.1})}
    )
    assert weights("hf-difference", judged)["adversarial"] == 0.1
    assert weights("no-adversarial", judged)["adversarial"] == 0
    assert weights("no-hf-pixel", judged)["adversarial"] == 0
    assert find_item(all_items(recipe), "rank-64").recipe(recipe).adaptor.rank == 64


def test_the_latent_baseline_never_decodes_whatever_its_steps(recipe: Recipe) -> None:
    item = find_item(all_items(recipe), "latent-mse-time")
    assert item.needs == [FIRST, MAIN, "latent-mse"]
    longer = item.recipe(recipe, 50)
    assert longer.steps == longer.loss.latent_warmup_steps == 50


def test_a_budget_keeps_the_share_of_the_warm_up_and_the_pairs_it_has_time_for() -> None:
    shipped = load_recipe("emoji")
    half = base_recipe("emoji", budget_steps=shipped.steps // 2, quick=False)
    assert half.steps == shipped.steps // 2
    assert half.loss.latent_warmup_steps == shipped.loss.latent_warmup_steps // 2
    assert half.teacher == shipped.teacher
    short = base_recipe("emoji", budget_steps=400, quick=False)
    assert short.teacher == shipped.teacher.model_copy(update={"pairs": 400 * shipped.batch})
    quick = base_recipe("emoji", budget_steps=None, quick=True)
    assert quick.steps <= 10
    # One shard of the same cache.
    assert quick.teacher.pairs == quick.teacher.batch == shipped.teacher.batch


def test_expected_time_follows_the_budget(recipe: Recipe) -> None:
    short = expected_seconds(recipe)
    long = expected_seconds(recipe.model_copy(update={"steps": 1000}))
    for name in short.keys() - {FIRST, "shipped"}:
        assert long[name] > short[name]
    assert long["latent-mse-time"] == long[MAIN]
    assert long["hipa-seed"] > long[MAIN]  # its pairs are not in the cache


def expected_seconds(recipe: Recipe) -> dict[str, float]:
    return {item.name: item.expected_seconds(recipe) for item in all_items(recipe)}


def test_unknown_items_are_named(recipe: Recipe) -> None:
    with pytest.raises(
        HipaError, match=r"'hippa' is unknown. Expected one of: references, shipped, hipa"
    ):
        find_item(all_items(recipe), "hippa")

from __future__ import annotations

import pytest
from plan import BASELINES, FIRST, MAIN, QUICK, base_recipe, find, full_plan, quick_plan

from hipa_deploy.errors import HipaError
from hipa_deploy.train.losses.hipa_loss import image_weights
from hipa_deploy.train.recipes.recipe import Recipe, load_recipe


def test_needs_come_first_and_names_are_unique(recipe: Recipe) -> None:
    for items in (full_plan(recipe), quick_plan(recipe)):
        done: list[str] = []
        for item in items:
            assert set(item.needs) <= set(done)
            done.append(item.name)
        assert len(set(done)) == len(done)
        assert done[0] == FIRST
    assert [item.name for item in quick_plan(recipe)] == list(QUICK)


def test_the_issues_ablations_are_there(recipe: Recipe) -> None:
    names = {item.name for item in full_plan(recipe)}
    assert {f"{b}{suffix}" for b in BASELINES for suffix in ("", "-time")} < names
    ablations = {
        f"{hf}{kind}" for hf in ("no-hf", "hf-fourier", "hf-edge") for kind in ("", "-pixel")
    }
    ablations |= {"hf-both-pixel", "hf-difference", "no-adversarial"}
    assert ablations | {"rank-4", "rank-16", "rank-64", "preset-full", "hipa-seed"} < names


def weights(name: str, recipe: Recipe) -> dict[str, float]:
    return image_weights(find(full_plan(recipe), name).recipe(recipe).loss)


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
    assert (
        weights("no-adversarial", judged)["adversarial"]
        == weights("no-hf-pixel", judged)["adversarial"]
        == 0
    )
    assert find(full_plan(recipe), "rank-64").recipe(recipe).adaptor.rank == 64


def test_the_latent_baseline_never_decodes_whatever_its_steps(recipe: Recipe) -> None:
    item = find(full_plan(recipe), "latent-mse-time")
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
    assert (
        quick.teacher.pairs == quick.teacher.batch == shipped.teacher.batch
    )  # one shard of the same cache


def test_expected_time_follows_the_budget(recipe: Recipe) -> None:
    short, long = (
        {i.name: i.expected_seconds(r) for i in full_plan(r)} for r in (recipe, find_longer(recipe))
    )
    assert all(long[name] > short[name] for name in short if name not in (FIRST, "shipped"))
    assert long["latent-mse-time"] == long[MAIN]
    assert long["hipa-seed"] > long[MAIN]  # its pairs are not in the cache


def find_longer(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"steps": 1000})


def test_unknown_items_are_named(recipe: Recipe) -> None:
    with pytest.raises(
        HipaError, match=r"'hippa' is not in the plan. Expected one of: references, shipped, hipa"
    ):
        find(full_plan(recipe), "hippa")

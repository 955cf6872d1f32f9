"""What the headers of the recipes for Stable Diffusion promise is what ``--dry-run`` derives."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from hipa_deploy.models.configurations import write_config
from hipa_deploy.train.prediction import dry_run
from hipa_deploy.train.prediction.training_cost import TrainingPrediction, predict_training
from hipa_deploy.train.recipes.recipe import SHIPPED, load_recipe

NUMBER = r"([\d.]+)"
# The sentence of a header that has the figures, and their names in order.
COST = (
    f"{NUMBER} hours of an A100 and {NUMBER} GiB of its memory. The teacher pairs take {NUMBER} "
    rf"hours \({NUMBER} TFLOP each, {NUMBER} guided steps, at 30 % of 312 TFLOPS\), the optimiser "
    rf"steps {NUMBER} \({NUMBER} TFLOP each in the latent warm-up, {NUMBER} after it, at 10 %\).* "
    f"The pairs take {NUMBER} GB of disk. "
    f"Of the steps' hours, the held-out measure takes {NUMBER} minutes."
)
NAMES = (
    "hours", "gib", "pair_hours", "pair", "steps", "step_hours", "warm_up", "decoded", "gb",
    "held_out",
)  # fmt: skip
A100 = 312e12  # FP16 operations a second


def header_of(name: str) -> dict[str, str]:
    """The figures in the comment at the top of a recipe, by their names in NAMES."""
    lines = []
    for line in (SHIPPED / f"{name}.toml").read_text().splitlines():
        if line.startswith("#"):
            lines.append(line.removeprefix("#").strip())
    found = re.search(COST, " ".join(lines))
    assert found, f"the header of {name} has another form"
    return dict(zip(NAMES, found.groups(), strict=True))


def derived(prediction: TrainingPrediction) -> dict[str, float]:
    """The same figures from a prediction."""
    recipe = prediction.recipe
    pair_hours = prediction.pairs_flops / (0.3 * A100) / 3600
    step_hours = prediction.training_flops / (0.1 * A100) / 3600
    target = prediction.target.flops if prediction.target else 0
    assert prediction.held_out is not None
    measured = recipe.measurements * prediction.held_out.flops
    return {
        "hours": pair_hours + step_hours,
        "gib": prediction.peak_bytes / 2**30,
        "pair_hours": pair_hours,
        "pair": prediction.pairs.flops / recipe.teacher.batch / 1e12,
        "steps": recipe.teacher.steps,
        "step_hours": step_hours,
        "warm_up": prediction.warm_up.flops / 1e12,
        "decoded": (prediction.step.flops + target) / 1e12,
        "gb": prediction.pairs_bytes / 1e9,
        "held_out": measured / (0.1 * A100) / 60,
    }


def test_every_recipe_for_stable_diffusion_has_a_header_here() -> None:
    names = {path.stem for path in SHIPPED.glob("*.toml") if not path.stem.startswith("emoji")}
    assert names == {"sd15", "sd21-base", "sd21-v", "sdxl", "ssd-1b", "vega"}


# Each takes 20 to 100 seconds of a processor.
@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.parametrize("name", ["sd15", "sd21-base", "sd21-v", "sdxl", "ssd-1b", "vega"])
def test_a_header_is_what_the_dry_run_derives(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = tmp_path / "captions.txt"
    prompts.write_text("a boat\n")
    recipe = load_recipe(name, {"prompts": str(prompts)})
    assert recipe.mixed_precision != "no"
    assert recipe.teacher.mixed_precision != "no"
    predictions = []

    def predict(*arguments: Any) -> TrainingPrediction:
        predictions.append(predict_training(*arguments))
        return predictions[-1]

    # The whole dry run of a published model from its configuration, and what it derived.
    monkeypatch.setattr(dry_run, "predict_training", predict)
    shown, problem = dry_run.dry_run(recipe, write_config(name, tmp_path / "model"), [])
    assert problem is None
    assert shown
    (prediction,) = predictions
    expected = derived(prediction)
    for key, text in header_of(name).items():
        # Half a unit of the last digit that the header shows.
        digits = len(text.partition(".")[2])
        assert float(text) == pytest.approx(expected[key], abs=0.51 * 10**-digits), key

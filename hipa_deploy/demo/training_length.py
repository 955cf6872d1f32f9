"""How long the demo trains: as long as this machine can in the time that there is.

torch is imported inside the functions, because ``hipa-demo --help`` must not wait for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console

from hipa_deploy import embedded

if TYPE_CHECKING:
    from hipa_deploy.train.recipes.recipe import Recipe

# What every demo changes in the embedded recipe.
COMMON: dict[str, Any] = {
    "prompts": "model:prompts.txt",
    "optimiser.warmup_steps": 5,
    "sample_every": 50,
    "checkpoint_every": 20,
    "batch": 12,
}
# And what else, the longest training first.
LENGTHS: tuple[dict[str, Any], ...] = (
    {
        "teacher.pairs": 512,
        "teacher.batch": 32,
        "steps": 500,
        "loss.latent_warmup_steps": 150,
    },
    {
        "teacher.pairs": 384,
        "teacher.batch": 32,
        "steps": 300,
        "loss.latent_warmup_steps": 100,
    },
    {
        "teacher.pairs": 384,
        "teacher.batch": 32,
        "teacher.steps": 8,
        "steps": 260,
        "loss.latent_warmup_steps": 90,
    },
)
QUICK: dict[str, Any] = {
    "teacher.pairs": 64,
    "teacher.batch": 32,
    "steps": 12,
    "loss.latent_warmup_steps": 0,
}
REPEATS = 2  # timed calls of each part of a training


def training_recipes(*, quick: bool = False) -> list[Recipe]:
    """The recipes of the demo's trainings, the longest first; ``quick`` has one of a few steps."""
    from hipa_deploy.train.recipes.recipe import load_recipe

    lengths = (QUICK,) if quick else LENGTHS
    return [load_recipe(embedded.NAME, COMMON | length) for length in lengths]


def longest_within(recipes: Sequence[Recipe], seconds: float, console: Console) -> Recipe:
    """The longest training that this machine should end in a time; the last one if none does.

    A GPU gets the longest. A CPU's pace is measured, which takes some seconds: instructions for
    bfloat16 do not tell it.

    Args:
        recipes: Alike but for their lengths, the longest first.
        seconds: How long it may take.
        console: Where it says what it measures.

    """
    import torch

    from hipa_deploy.train.prediction.training_cost import call_counts, measure_steps

    if torch.cuda.is_available() or len(recipes) == 1:
        return recipes[0]
    with console.status("how fast this machine trains"):
        pace = measure_steps(recipes[0], embedded.MODEL, REPEATS)
    for recipe in recipes:
        expected = sum(pace[name] * count for name, count in call_counts(recipe).items())
        if expected <= seconds:
            break
    console.print(
        f"training: {recipe.steps} steps, about {expected / 60:.0f} minutes at this machine's pace",
        highlight=False,
    )
    return recipe

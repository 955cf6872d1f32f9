"""What the benchmark runs: the method, baselines with the same budget, ablations; one item is one process."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from hipa_deploy.errors import HipaError
from hipa_deploy.train.recipes.recipe import Recipe, load_recipe

Method = Literal["references", "adaptor", "hipa", "consistency", "progressive"]
# Seconds a step of 16 pairs of the embedded model, on two AVX-512 cores with nothing else running: an expectation to
# print before anything has run. Two were measured, two are counted from their UNet calls.
PACE = {"latent": 0.45, "decoded": 0.6, "consistency": 0.85, "progressive": 0.75}
OVERHEAD = 150.0  # seconds an item: start, contexts and targets of all pairs, images, measurement
PAIR = 0.08  # seconds a teacher pair; those of the recipe's own seed are taken to be in the cache
REFERENCES_SECONDS = 600.0
FIRST, MAIN = "references", "hipa"
CONSISTENCY_RATE = 1e-4  # the default of diffusers' LCM-LoRA script; at the recipes' 1e-3 it ended far below the base
PIXEL_WEIGHT = 10.0  # of the mean square pixel error that takes the perceptual distance's place


@dataclass(frozen=True)
class Item:
    """One row of the report: how it is trained, beside the recipe that all items share.

    ``as_long_as`` names the item whose training time it may use, ``pace`` the one whose time a step says how many steps
    that makes; both come first.
    """

    name: str
    title: str
    group: Literal["references", "main", "baselines", "ablations", "sizes", "seeds"]
    method: Method = "hipa"
    overrides: dict[str, Any] = field(default_factory=dict)
    as_long_as: str | None = None
    pace: str | None = None

    @property
    def needs(self) -> list[str]:
        """Items that must be done before this one."""
        before = [] if self.name == FIRST else [FIRST]
        return before + [name for name in (self.as_long_as, self.pace) if name]

    def recipe(self, base: Recipe, steps: int | None = None) -> Recipe:
        """The shared recipe with this item's overrides; ``steps`` replaces its number of steps."""
        steps = steps or base.steps
        values = base.model_dump()
        warmup = round(base.loss.latent_warmup_steps * steps / base.steps)
        changes = {"steps": steps, "loss.latent_warmup_steps": warmup, **self.overrides}
        if self.overrides.get("loss.latent_warmup_steps") == "all":
            changes["loss.latent_warmup_steps"] = steps
        for key, value in changes.items():
            *parents, last = key.split(".")
            table = values
            for parent in parents:
                table = table[parent]
            table[last] = value
        return Recipe.model_validate(
            values | {"checkpoint_every": min(100, steps), "sample_every": steps}
        )

    def expected_seconds(self, base: Recipe) -> float:
        """How long it should take on the machine that PACE speaks of."""
        if self.method == "references":
            return REFERENCES_SECONDS
        if self.method == "adaptor":
            return OVERHEAD
        if self.as_long_as:
            return Item(self.as_long_as, "", "main").expected_seconds(base)
        recipe = self.recipe(base)
        warmup = min(recipe.loss.latent_warmup_steps, recipe.steps)
        seconds = warmup * PACE["latent"] + (recipe.steps - warmup) * PACE["decoded"]
        if self.method != "hipa":
            seconds = recipe.steps * PACE[self.method]
        return seconds + OVERHEAD + (PAIR * recipe.teacher.pairs if recipe.seed != base.seed else 0)


LATENT = {"loss.latent_warmup_steps": "all"}
NO_HF = {"loss.hf_weight": 0.0, "loss.amplitude_weight": 0.0}
PIXEL = {
    "loss.perceptual": "none",
    "loss.adversarial_weight": 0.0,  # it judges the perceptual distance's features
    "loss.pixel": "mse",
    "loss.pixel_weight": PIXEL_WEIGHT,
}
HIGH_FREQUENCIES: dict[str, tuple[str, dict[str, Any]]] = {
    "none": ("no high-frequency term", NO_HF),
    "fourier": ("Fourier only", {"loss.edge_weight": 0.0}),
    "edge": ("Sobel only", {"loss.fourier_weight": 0.0, "loss.amplitude_weight": 0.0}),
    "both": ("both", {}),
}
BASELINES: dict[str, tuple[str, Method, dict[str, Any]]] = {
    "latent-mse": ("latent MSE", "hipa", LATENT),
    "consistency": (
        "latent consistency distillation",
        "consistency",
        {"optimiser.learning_rate": CONSISTENCY_RATE},
    ),
    "progressive": ("progressive distillation", "progressive", {}),
}
QUICK = (FIRST, "shipped", MAIN, *BASELINES, "latent-mse-time", "no-hf", "rank-4")


def full_plan(base: Recipe) -> list[Item]:
    """Every item, in an order that meets all needs and brings the most telling ones first."""
    items = [
        Item(FIRST, "teacher at 1 to 25 steps, base in one step", "references", "references"),
        Item("shipped", "HiPA, the given adaptor", "main", "adaptor"),
        Item(MAIN, "HiPA", "main"),
    ]
    for name, (title, method, overrides) in BASELINES.items():
        items.append(Item(name, f"{title}, as many steps", "baselines", method, overrides))
    for name, (title, method, overrides) in BASELINES.items():
        items.append(
            Item(
                f"{name}-time", f"{title}, as much time", "baselines", method, overrides, MAIN, name
            )
        )
    return items + _ablations() + _sizes(base) + _seeds(base)


def quick_plan(base: Recipe) -> list[Item]:
    """One item of each kind."""
    return [item for item in full_plan(base) if item.name in QUICK]


def base_recipe(name: str, *, budget_steps: int | None, quick: bool) -> Recipe:
    """The recipe that all items share; a budget keeps the warm-up's share of the steps, and the pairs they draw."""
    recipe = load_recipe(name)
    steps = 10 if quick else budget_steps or recipe.steps
    recipe = Item(MAIN, "", "main").recipe(recipe, steps)
    shard = recipe.teacher.batch  # whole ones, which a full run's cache has
    pairs = (
        shard
        if quick
        else min(recipe.teacher.pairs, math.ceil(steps * recipe.batch / shard) * shard)
    )
    changes: dict[str, Any] = {"teacher": recipe.teacher.model_copy(update={"pairs": pairs})}
    if quick:
        changes["optimiser"] = recipe.optimiser.model_copy(update={"warmup_steps": 2})
    return recipe.model_copy(update=changes)


def find(items: list[Item], name: str) -> Item:
    """The item of that name."""
    for item in items:
        if item.name == name:
            return item
    raise HipaError(
        f"item {name!r} is not in the plan. Expected one of: {', '.join(i.name for i in items)}."
    )


def _ablations() -> list[Item]:
    items = []
    for hf, (title, changes) in HIGH_FREQUENCIES.items():
        for name, kind, perceptual in (
            ("", "perceptual", {}),
            ("-pixel", "pixel MSE in its place", PIXEL),
        ):
            if hf == "both" and not perceptual:
                continue  # the main item
            item_name = "no-hf" + name if hf == "none" else f"hf-{hf}{name}"
            items.append(
                Item(item_name, f"{title}; {kind}", "ablations", overrides=changes | perceptual)
            )
    difference = {"loss.high_frequency": "difference", "loss.hf_weight": 1.0}
    return [
        *items,
        Item("hf-difference", "both as L1 differences", "ablations", overrides=difference),
        Item(
            "no-adversarial",
            "no discriminator",
            "ablations",
            overrides={"loss.adversarial_weight": 0.0},
        ),
    ]


def _sizes(base: Recipe) -> list[Item]:
    adaptor = base.adaptor
    items = [
        Item(
            f"rank-{rank}",
            f"preset {adaptor.preset}, rank {rank}",
            "sizes",
            overrides={"adaptor.rank": rank},
        )
        for rank in (4, 16, 64)
        if rank != adaptor.rank
    ]
    other = "paper" if adaptor.preset == "full" else "full"
    title = f"preset {other}, rank {adaptor.rank}"
    return [*items, Item(f"preset-{other}", title, "sizes", overrides={"adaptor.preset": other})]


def _seeds(base: Recipe) -> list[Item]:
    seed = base.seed + 1
    return [
        Item(f"{MAIN}-seed", f"HiPA, training seed {seed}", "seeds", overrides={"seed": seed}),
        Item(
            "latent-mse-seed",
            f"latent MSE, training seed {seed}",
            "seeds",
            overrides=LATENT | {"seed": seed},
        ),
    ]

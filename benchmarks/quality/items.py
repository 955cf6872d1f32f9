"""The items of the quality benchmark: the method, baselines with the same budget, and ablations.

Each item is one row of the report and runs in a process of its own (run_item.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from hipa_deploy.errors import HipaError
from hipa_deploy.train.recipes.recipe import Recipe, load_recipe

Group = Literal["references", "main", "ingredients", "baselines", "ablations", "sizes", "seeds"]
Method = Literal["references", "adaptor", "hipa", "consistency", "progressive", "average"]

# Seconds a step of 16 pairs of the embedded model, on two AVX-512 cores with nothing else running.
# They are printed as an expectation before anything has run. 'latent' and 'decoded' were measured;
# the others are calculated from their UNet calls; 'score' and 'judge' come on top.
PACE = {
    "latent": 0.45,
    "decoded": 0.6,
    "consistency": 0.85,
    "progressive": 0.75,
    "score": 0.9,
    "judge": 0.4,
}
OVERHEAD_SECONDS = 150.0  # of an item: start, contexts and targets of all pairs, images, numbers
PAIR_SECONDS = 0.08  # of a teacher pair; those of the recipe's own seed are taken to be cached
REFERENCES_SECONDS = 600.0
FIRST = "references"
MAIN = "hipa"
# The default of diffusers' LCM-LoRA script. At the recipes' 1e-3 the training ended far below the
# base model.
CONSISTENCY_RATE = 1e-4
PIXEL_WEIGHT = 10.0  # of the mean square pixel error that replaces the perceptual distance


@dataclass(frozen=True)
class Item:
    """One row of the report: how it is trained, as changes to the recipe that all items share.

    Attributes:
        name: Name of the item's folder and of ``--only``.
        title: Name of the row in the report.
        group: Section of the report.
        method: How the adaptor is made.
        overrides: Changes to the shared recipe, with a dot for each table.
        as_long_as: The item whose training time this one may use; None means as many steps as the
            recipe says.
        pace: The item whose time a step says how many steps that makes.
        of: Of an average: the items whose adaptors it is of.

    """

    name: str
    title: str
    group: Group
    method: Method = "hipa"
    overrides: dict[str, Any] = field(default_factory=dict)
    as_long_as: str | None = None
    pace: str | None = None
    of: tuple[str, ...] = ()

    @property
    def needs(self) -> list[str]:
        """Names of the items that must be done before this one."""
        names = [] if self.name == FIRST else [FIRST]
        for name in (self.as_long_as, self.pace, *self.of):
            if name is not None:
                names.append(name)
        return names

    def recipe(self, base: Recipe, steps: int | None = None) -> Recipe:
        """The shared recipe with this item's overrides.

        Args:
            base: The shared recipe.
            steps: Replaces the recipe's number of steps; the latent warm-up keeps its share.

        """
        steps = steps or base.steps
        warmup = round(base.loss.latent_warmup_steps * steps / base.steps)
        changes = {"steps": steps, "loss.latent_warmup_steps": warmup, **self.overrides}

        # 'all' can only be resolved here, where the number of steps is known.
        if changes["loss.latent_warmup_steps"] == "all":
            changes["loss.latent_warmup_steps"] = steps

        values = base.model_dump()
        for key, value in changes.items():
            *parents, last = key.split(".")
            table = values
            for parent in parents:
                table = table[parent]
            table[last] = value

        # Sample grids are of no use here: one at the end. Checkpoints let an item resume.
        values["checkpoint_every"] = min(100, steps)
        values["sample_every"] = steps
        return Recipe.model_validate(values)

    def expected_seconds(self, base: Recipe) -> float:
        """Expected time of this item, on the machine of ``PACE``."""
        if self.method == "references":
            return REFERENCES_SECONDS
        if self.method in ("adaptor", "average"):
            return OVERHEAD_SECONDS
        if self.as_long_as:
            return Item(self.as_long_as, "", "main").expected_seconds(base)

        recipe = self.recipe(base)
        if self.method == "hipa":
            warmup = min(recipe.loss.latent_warmup_steps, recipe.steps)
            seconds = warmup * PACE["latent"] + (recipe.steps - warmup) * _pace(recipe)
        else:
            seconds = recipe.steps * PACE[self.method]

        # Another seed means other teacher pairs, which no earlier training has cached.
        pairs_seconds = 0.0
        if recipe.seed != base.seed:
            pairs_seconds = PAIR_SECONDS * recipe.teacher.pairs
        return seconds + OVERHEAD_SECONDS + pairs_seconds


LATENT = {"loss.latent_warmup_steps": "all"}
NO_HF = {"loss.hf_weight": 0.0, "loss.amplitude_weight": 0.0}
PIXEL = {
    "loss.perceptual": "none",
    "loss.adversarial_weight": 0.0,  # it judges the perceptual distance's features
    "loss.pixel": "mse",
    "loss.pixel_weight": PIXEL_WEIGHT,
}
# Name of a high-frequency ablation -> its title and overrides.
HIGH_FREQUENCIES: dict[str, tuple[str, dict[str, Any]]] = {
    "none": ("no high-frequency term", NO_HF),
    "fourier": ("Fourier only", {"loss.edge_weight": 0.0}),
    "edge": ("Sobel only", {"loss.fourier_weight": 0.0, "loss.amplitude_weight": 0.0}),
    "both": ("both", {}),
}
# The timestep of consistency and progressive distillation, whatever the shared recipe's. They walk
# the noise schedule from its end, where latents are all but pure noise. At an earlier timestep they
# see noised images, and pure noise would be new to them.
NOISIEST = 999
# Name of a baseline -> its title, method and overrides.
BASELINES: dict[str, tuple[str, Method, dict[str, Any]]] = {
    "latent-mse": ("latent MSE", "hipa", LATENT),
    "consistency": (
        "latent consistency distillation",
        "consistency",
        {"optimiser.learning_rate": CONSISTENCY_RATE, "timestep": NOISIEST},
    ),
    "progressive": ("progressive distillation", "progressive", {"timestep": NOISIEST}),
}
# The items of a quick run: one of each kind.
QUICK = (FIRST, "shipped", MAIN, *BASELINES, "latent-mse-time", "no-hf", "rank-4")


def _pace(recipe: Recipe) -> float:
    """Expected seconds of a step after the warm-up."""
    seconds = PACE["decoded"] if recipe.loss.has_image_terms else PACE["latent"]
    if recipe.score.weight:
        seconds += PACE["score"]
    if recipe.latent_discriminator.weight:
        seconds += PACE["judge"]
    return seconds


def all_items(base: Recipe) -> list[Item]:
    """Every item of a full run.

    They are in an order that meets all needs and brings the most informative ones first: a run that
    is stopped early then has a useful report.
    """
    items = [
        Item(FIRST, "teacher at 1 to 25 steps, base in one step", "references", "references"),
        Item("shipped", "HiPA, the given adaptor", "main", "adaptor"),
        Item(MAIN, "HiPA", "main"),
    ]
    for name, (title, method, overrides) in BASELINES.items():
        items.append(Item(name, f"{title}, as many steps", "baselines", method, overrides))

    # A baseline's own run says how long its step takes, so its matched run comes after it.
    for name, (title, method, overrides) in BASELINES.items():
        items.append(
            Item(
                f"{name}-time",
                f"{title}, as much time",
                "baselines",
                method,
                overrides,
                as_long_as=MAIN,
                pace=name,
            )
        )
    return items + _ablations() + _sizes(base) + _seeds(base)


def quick_items(base: Recipe) -> list[Item]:
    """The items of a quick run, in the same order."""
    return [item for item in all_items(base) if item.name in QUICK]


def base_recipe(name: str, *, budget_steps: int | None, quick: bool) -> Recipe:
    """The recipe that all items share.

    Args:
        name: Recipe of the method: a file, or the name of a shipped one.
        budget_steps: Number of steps in place of the recipe's. The latent warm-up keeps its share,
            and there are no more teacher pairs than rows that the steps draw.
        quick: Ten steps and one shard of teacher pairs.

    """
    # The benchmark measures by its own prompts, the held-out ones among them, and times the steps.
    recipe = load_recipe(name, {"held_out.prompts": None})
    steps = 10 if quick else budget_steps or recipe.steps
    recipe = Item(MAIN, "", "main").recipe(recipe, steps)

    # Whole shards only, so that a smaller run reads the cache of a full one.
    shard = recipe.teacher.batch
    if quick:
        pairs = shard
    else:
        drawn = math.ceil(steps * recipe.batch / shard) * shard
        pairs = min(recipe.teacher.pairs, drawn)

    changes: dict[str, Any] = {"teacher": recipe.teacher.model_copy(update={"pairs": pairs})}
    if quick:
        changes["optimiser"] = recipe.optimiser.model_copy(update={"warmup_steps": 2})
    return recipe.model_copy(update=changes)


def find_item(items: list[Item], name: str) -> Item:
    """The item of that name.

    Raises:
        HipaError: There is none; the message lists the names.

    """
    for item in items:
        if item.name == name:
            return item
    names = ", ".join(item.name for item in items)
    raise HipaError(f"item {name!r} is unknown. Expected one of: {names}.")


def _ablations() -> list[Item]:
    """Each high-frequency term alone, both and none; each with and without perceptual distance."""
    perceptual_terms: tuple[tuple[str, str, dict[str, Any]], ...] = (
        ("", "perceptual", {}),
        ("-pixel", "pixel MSE in its place", PIXEL),
    )
    items = []
    for hf, (hf_title, hf_overrides) in HIGH_FREQUENCIES.items():
        for suffix, title, overrides in perceptual_terms:
            # Both terms with the perceptual distance are the method itself: the main item.
            if hf == "both" and not overrides:
                continue
            name = f"no-hf{suffix}" if hf == "none" else f"hf-{hf}{suffix}"
            both = hf_overrides | overrides
            items.append(Item(name, f"{hf_title}; {title}", "ablations", overrides=both))

    difference = {"loss.high_frequency": "difference", "loss.hf_weight": 1.0}
    items.append(Item("hf-difference", "both as L1 differences", "ablations", overrides=difference))
    no_adversarial = {"loss.adversarial_weight": 0.0}
    items.append(Item("no-adversarial", "no discriminator", "ablations", overrides=no_adversarial))
    return items


def _sizes(base: Recipe) -> list[Item]:
    """Other ranks, and the other preset at the recipe's rank."""
    preset = base.adaptor.preset
    items = []
    for rank in (4, 16, 64):
        if rank != base.adaptor.rank:
            title = f"preset {preset}, rank {rank}"
            items.append(Item(f"rank-{rank}", title, "sizes", overrides={"adaptor.rank": rank}))

    other = "paper" if preset == "full" else "full"
    title = f"preset {other}, rank {base.adaptor.rank}"
    items.append(Item(f"preset-{other}", title, "sizes", overrides={"adaptor.preset": other}))
    return items


def _seeds(base: Recipe) -> list[Item]:
    """The method and its closest baseline with another seed: how far luck goes."""
    seed = base.seed + 1
    main = Item(f"{MAIN}-seed", f"HiPA, training seed {seed}", "seeds", overrides={"seed": seed})
    latent = Item(
        "latent-mse-seed",
        f"latent MSE, training seed {seed}",
        "seeds",
        overrides=LATENT | {"seed": seed},
    )
    return [main, latent]

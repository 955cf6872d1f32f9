"""The items that carry HiPA past the paper: each ingredient alone, together, and what it must beat.

Each is trained for as many steps as HiPA and for as much processor time, with two training seeds.
``python benchmarks/quality/run.py --set ingredients`` runs them. The shared recipe is HiPA as it
ships; an item adds to it, or takes its loss away.
"""

from __future__ import annotations

from typing import Any

from items import BASELINES, FIRST, MAIN, Item

from hipa_deploy.train.recipes.recipe import Recipe

SCORE_WEIGHT = 0.5
SCORE = {"score.weight": SCORE_WEIGHT}
JUDGE = {"latent_discriminator.weight": 0.1}
EMA_DECAY = 0.995  # an average over about the last 200 steps
NO_OTHER_TERMS: dict[str, Any] = {
    "loss.perceptual": "none",
    "loss.adversarial_weight": 0.0,
    "loss.hf_weight": 0.0,
    "loss.amplitude_weight": 0.0,
    "loss.pixel_weight": 0.0,
    "loss.latent_weight": 0.0,
    "loss.latent_hf_weight": 0.0,
    "loss.latent_warmup_steps": 0,
}
PAPER_LOSS = {
    "loss.high_frequency": "difference",
    "loss.hf_weight": 1.0,
    "loss.adversarial_weight": 0.0,
}
# Name of an ingredient -> its title and what it changes of HiPA's recipe.
INGREDIENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "paper-loss": ("HiPA, the paper's own loss", PAPER_LOSS),
    "score": ("HiPA + score distillation", SCORE),
    "judge": ("HiPA + discriminator on noised latents", JUDGE),
    "score-judge": ("HiPA + both", SCORE | JUDGE),
    "judge-instead": (
        "HiPA, discriminator on noised latents in place of that on images",
        JUDGE | {"loss.adversarial_weight": 0.0},
    ),
    "score-unguided": (
        "HiPA + score distillation without guidance",
        SCORE | {"score.guidance": 1.0},
    ),
    "score-late": (
        "HiPA + score distillation, guided below timestep 600",
        SCORE | {"score.guidance_below": 600},
    ),
    "score-noise": (
        "HiPA + score distillation, difference of noises",
        SCORE | {"score.gradient": "noise"},
    ),
    "ema": (f"HiPA, average over its steps ({EMA_DECAY})", {"ema_decay": EMA_DECAY}),
    "t999": ("HiPA, step at timestep 999", {"timestep": 999}),
    "t800": ("HiPA, step at timestep 800", {"timestep": 800}),
}
# What an ingredient does without HiPA's loss.
ALONE: dict[str, tuple[str, dict[str, Any]]] = {
    "score-alone": ("score distillation alone", NO_OTHER_TERMS | SCORE | {"score.weight": 1.0}),
    "judge-alone": (
        "discriminator on noised latents alone",
        NO_OTHER_TERMS | {"latent_discriminator.weight": 1.0},
    ),
}
# Ingredients whose step costs what HiPA's costs: as many steps are as much time.
AS_FAST = ("ema", "t999", "t800")
# Of an average over two training seeds: the item of the first seed.
AVERAGED = (MAIN, "score-judge")
# The items of a quick run: one of each kind.
QUICK = (
    FIRST, "shipped", MAIN, "score-judge", "score-alone", "score-judge-time", f"{MAIN}-seed",
    f"{MAIN}-average",
)  # fmt: skip


def ingredient_items(
    base: Recipe, real_images: str | None = None, *, from_start: bool = False
) -> list[Item]:
    """Every item, in an order that meets all needs; those with the first seed come first.

    Args:
        base: The shared recipe.
        real_images: Folder of captioned images for the item 'real'; None leaves it out.
        from_start: Whether the trainings start from an adaptor. Then the baselines that begin
            anew by themselves are left out: their budgets would not be comparable.

    """
    first = [
        Item(FIRST, "teacher at 1 to 25 steps, base in one step", "references", "references"),
        Item("shipped", "HiPA, the given adaptor", "main", "adaptor"),
        Item(MAIN, "HiPA", "main"),
    ]
    trained = _trained(real_images)
    if from_start:
        trained = [item for item in trained if item.method == "hipa"]
    timed = [_as_much_time(item) for item in trained if item.name not in AS_FAST]
    seeded = [_other_seed(item, base.seed + 1) for item in [first[-1], *trained, *timed]]
    averages = []
    for name in AVERAGED:
        averages.append(
            Item(
                f"{name}-average",
                f"average of both training seeds of: {name}",
                "ingredients",
                "average",
                of=(name, f"{name}-seed"),
            )
        )
    return [*first, *trained, *timed, *seeded, *averages]


def quick_ingredient_items(base: Recipe) -> list[Item]:
    """The items of a quick run, in the same order."""
    return [item for item in ingredient_items(base) if item.name in QUICK]


def _trained(real_images: str | None) -> list[Item]:
    """Ingredients and baselines with the first seed, as many steps."""
    items = []
    for name, (title, overrides) in INGREDIENTS.items():
        items.append(Item(name, title, "ingredients", overrides=overrides))
    if real_images is not None:
        overrides = JUDGE | {"latent_discriminator.real_images": real_images}
        title = "HiPA + discriminator on noised latents, a quarter of the true ones real"
        items.append(Item("real", title, "ingredients", overrides=overrides))
    for name, (title, overrides) in ALONE.items():
        items.append(Item(name, title, "baselines", overrides=overrides))
    for name, (title, method, overrides) in BASELINES.items():
        items.append(Item(name, title, "baselines", method, overrides))
    return items


def _as_much_time(item: Item) -> Item:
    return Item(
        f"{item.name}-time",
        f"{item.title}, as much time",
        item.group,
        item.method,
        item.overrides,
        as_long_as=MAIN,
        pace=item.name,
    )


def _other_seed(item: Item, seed: int) -> Item:
    return Item(
        f"{item.name}-seed",
        f"{item.title}, training seed {seed}",
        "seeds",
        item.method,
        item.overrides | {"seed": seed},
        as_long_as=item.as_long_as,
        pace=item.pace,
    )

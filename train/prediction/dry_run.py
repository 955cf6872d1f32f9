"""``hipa-train --dry-run``: the resolved recipe, and what the training would take."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from rich.console import RenderableType
from rich.table import Table

from hipa_deploy.errors import HipaError
from hipa_deploy.train.prediction.training_cost import (
    Cost,
    TrainingPlan,
    measure_steps,
    plan_training,
)
from hipa_deploy.train.recipes.recipe import Recipe, read_prompts

# Shares of an A100's FP16 peak that InstaFlow's published rates come to (arXiv 2309.06380: 200 k pairs a day at 25
# guided steps, 86 k steps a day at batch 4 with LPIPS), with the operations counted as here.
PAIRS_UTILISATION, STEPS_UTILISATION = 0.30, 0.10
ROOM = 0.9  # of a GPU's memory: the rest is CUDA's own, and lost between blocks
SMALL_FLOPS = 0.5e12  # of a teacher call and two steps: seconds on a CPU, so measured
GIB, GB, HOUR = 2**30, 1e9, 3600


class Gpu(Protocol):
    """What a prediction needs to know of a GPU; engines/targets has them."""

    @property
    def title(self) -> str:
        """Its name."""

    @property
    def memory_gib(self) -> int | None:
        """Its memory."""

    @property
    def fp16_tflops(self) -> float | None:
        """Peak rate."""

    @property
    def fp16_accumulate(self) -> str | None:
        """What that rate adds up in; 'fp16' if FP32 is half as fast."""


def dry_run(
    recipe: Recipe, model_dir: Path, gpus: Sequence[Gpu]
) -> tuple[list[RenderableType], HipaError | None]:
    """What to print, and what is wrong with the prompts, if anything is.

    Raises:
        HipaError: a model that cannot be trained, with the reason.

    """
    plan = plan_training(recipe, model_dir)
    problem, prompts = None, "unreadable"
    try:
        prompts = f"{len(read_prompts(recipe, model_dir)):,} distinct"
    except HipaError as error:
        problem = error
    shown: list[RenderableType] = [
        to_toml(recipe),
        facts_table(plan, model_dir, prompts),
        cost_table(plan),
    ]
    if (
        plan.pairs.flops / recipe.teacher.steps + plan.warm_up.flops + plan.step.flops
        <= SMALL_FLOPS
    ):
        return [*shown, measured_table(plan, measure_steps(recipe, model_dir))], problem
    return [*shown, gpu_table(plan, gpus)], problem


def to_toml(recipe: Recipe) -> str:
    """Every setting, defaults included, as a recipe file; those that are not set are left out."""
    tables = {"": recipe.model_dump()}
    tables |= {name: value for name, value in tables[""].items() if isinstance(value, dict)}
    lines: list[str] = []
    for name, table in tables.items():
        lines += ["", f"[{name}]"] if name else []
        lines += [
            f"{k} = {json.dumps(v)}"
            for k, v in table.items()
            if v is not None and not isinstance(v, dict)
        ]
    return "\n".join(lines) + "\n"


def facts_table(plan: TrainingPlan, model_dir: Path, prompts: str) -> Table:
    """The model, the adaptor, the prompts and the pairs: no predictions."""
    table = Table(show_header=False)
    sizes = ", ".join(f"{name} {count / 1e6:.1f} M" for name, count in plan.parameters.items())
    (height, width), settings, teacher = plan.resolution, plan.recipe.adaptor, plan.recipe.teacher
    table.add_row(
        "model", f"{model_dir.name}: predicts {plan.prediction_type}, {width}x{height} pixels"
    )
    table.add_row("parameters", sizes)
    encoder = f", encoder rank {settings.encoder_rank}" if settings.encoder_rank else ""
    table.add_row(
        "trainable",
        f"{plan.trainable / 1e6:.2f} M ({settings.preset}, rank {settings.rank}{encoder})",
    )
    table.add_row("prompts", prompts)
    table.add_row(
        "teacher pairs", f"{teacher.pairs:,}: {plan.pairs_bytes / GB:.2f} GB in the cache"
    )
    return table


def cost_table(plan: TrainingPlan) -> Table:
    """Operations and memory of each kind of work."""
    table = Table("", title="Predicted; memory in float32, weights included")
    for heading in ("rows at once", "TFLOP", "memory, GiB", "how often"):
        table.add_column(heading, justify="right")
    recipe, teacher = plan.recipe, plan.recipe.teacher
    warm_up = min(recipe.loss.latent_warmup_steps, recipe.steps)

    def add(name: str, rows: int, cost: Cost, times: int) -> None:
        table.add_row(
            name,
            str(rows),
            f"{cost.flops / 1e12:.3g}",
            f"{cost.peak_bytes / GIB:.2f}",
            f"{times:,}",
        )

    add("teacher pairs", teacher.batch, plan.pairs, math.ceil(plan.sampler_batches))
    add("step, latents alone", recipe.batch, plan.warm_up, warm_up)
    add("step, decoded", recipe.batch, plan.step, recipe.steps - warm_up)
    if plan.target:
        add("its teacher images", recipe.batch, plan.target, recipe.steps - warm_up)
    return table


def gpu_table(plan: TrainingPlan, gpus: Sequence[Gpu]) -> Table:
    """Hours on named GPUs, at a stated share of their peak."""
    shares = f"{PAIRS_UTILISATION:.0%} (pairs) and {STEPS_UTILISATION:.0%} (steps)"
    title = f"Predicted hours at {shares} of the peak rate in mixed precision; float32 takes longer"
    table = Table("", title=title)
    for heading in ("memory, GiB", "float32 fits", "pairs", "steps"):
        table.add_column(heading, justify="right")
    for gpu in gpus:
        if gpu.memory_gib is None or gpu.fp16_tflops is None:
            continue
        # Training adds up in FP32, which is half as fast where the rate is FP16's.
        peak = gpu.fp16_tflops * 1e12 / (2 if gpu.fp16_accumulate == "fp16" else 1)
        fits = plan.peak_bytes <= ROOM * gpu.memory_gib * GIB
        pairs = plan.pairs_flops / (peak * PAIRS_UTILISATION) / HOUR
        steps = plan.training_flops / (peak * STEPS_UTILISATION) / HOUR
        table.add_row(
            gpu.title, str(gpu.memory_gib), "yes" if fits else "no", f"{pairs:.3g}", f"{steps:.3g}"
        )
    return table


def measured_table(plan: TrainingPlan, seconds: Mapping[str, float]) -> Table:
    """What ``measure_steps`` found, and the whole training at that pace."""
    recipe, teacher = plan.recipe, plan.recipe.teacher
    warm_up = min(recipe.loss.latent_warmup_steps, recipe.steps)
    times = {
        "teacher call": teacher.steps * plan.sampler_batches,
        "warm-up step": warm_up,
        "step": recipe.steps - warm_up,
    }
    table = Table("", title="Measured on this machine's CPU, random weights")
    for heading in ("seconds", "how often", "minutes in all"):
        table.add_column(heading, justify="right")
    for name, count in times.items():
        table.add_row(
            name, f"{seconds[name]:.3f}", f"{count:,.0f}", f"{seconds[name] * count / 60:.1f}"
        )
    return table

"""``hipa-train --dry-run``: the resolved recipe, and what the training would take."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rich.console import RenderableType
from rich.table import Table

from hipa_deploy.bundle.text_settings import TextSettings
from hipa_deploy.errors import HipaError
from hipa_deploy.models.clip_tokenizer import text_sizes
from hipa_deploy.models.model_config import ModelConfig
from hipa_deploy.train.prediction.training_cost import (
    TrainingCost,
    TrainingPrediction,
    measure_steps,
    predict_training,
)
from hipa_deploy.train.recipes.recipe import Recipe, read_prompts

# Shares of an A100's FP16 peak that InstaFlow's published rates come to (arXiv 2309.06380: 200,000
# pairs a day at 25 guided steps; 86,000 steps a day at batch 4 with LPIPS), with the operations
# counted as in training_cost.py.
PAIRS_UTILISATION = 0.30
STEPS_UTILISATION = 0.10
USABLE_MEMORY = 0.9  # of a GPU's: CUDA itself and fragmentation take the remaining tenth
SMALL_FLOPS = 0.5e12  # of a teacher call and two steps: seconds on a CPU, so they are measured
GIB = 2**30
GB = 1e9
HOUR = 3600


class Gpu(Protocol):
    """The facts of a GPU that a prediction needs; the profiles of engines/targets have them."""

    @property
    def title(self) -> str:
        """Its name."""

    @property
    def memory_gib(self) -> int | None:
        """Its memory in GiB; None where it is not known."""

    @property
    def fp16_tflops(self) -> float | None:
        """Its FP16 peak rate in TFLOP/s; None where it is not known."""

    @property
    def fp16_accumulate(self) -> str | None:
        """The type in which that rate accumulates: where it is 'fp16', FP32 is half as fast."""


def dry_run(
    recipe: Recipe, model_dir: Path, gpus: Sequence[Gpu]
) -> tuple[list[RenderableType], HipaError | None]:
    """What ``--dry-run`` prints.

    Args:
        recipe: The resolved recipe.
        model_dir: Diffusers folder; its weights are not needed.
        gpus: The GPUs to predict hours for.

    Returns:
        The recipe and the tables, in order; and the error of the prompts, if they cannot be read.
        It is returned rather than raised, so that the tables are printed before it.

    Raises:
        HipaError: A model that cannot be trained, with the reason.

    """
    if recipe.text != TextSettings():
        recipe.text.check(*text_sizes(ModelConfig.read(model_dir)))
    prediction = predict_training(recipe, model_dir)

    # Prompts do not change the prediction, so a file that is missing does not stop it.
    problem = None
    prompts = "unreadable"
    try:
        prompts = f"{len(read_prompts(recipe, model_dir)):,} distinct"
    except HipaError as error:
        problem = error

    shown: list[RenderableType] = [
        to_toml(recipe),
        facts_table(prediction, model_dir, prompts),
        cost_table(prediction),
    ]

    # A small model runs here in seconds: a measurement says more than a share of a peak rate.
    teacher_call = prediction.pairs.flops / recipe.teacher.steps
    measured_flops = teacher_call + prediction.warm_up.flops + prediction.step.flops
    measured_flops += prediction.fake.flops if prediction.fake else 0
    if measured_flops <= SMALL_FLOPS:
        shown.append(measured_table(prediction, measure_steps(recipe, model_dir)))
    else:
        shown.append(gpu_table(prediction, gpus))
    return shown, problem


def to_toml(recipe: Recipe) -> str:
    """Every setting as the text of a recipe file, defaults included.

    Settings without a value (None) are left out, as TOML has no null.
    """
    values = recipe.model_dump()
    lines = _toml_lines(values)
    for name, table in values.items():
        if isinstance(table, dict):
            lines += ["", f"[{name}]", *_toml_lines(table)]
    return "\n".join(lines) + "\n"


def _toml_lines(table: Mapping[str, Any]) -> list[str]:
    """``key = value`` of a table's own settings: JSON's literals are TOML's for all that occur."""
    lines = []
    for key, value in table.items():
        if value is not None and not isinstance(value, dict):
            lines.append(f"{key} = {json.dumps(value)}")
    return lines


def facts_table(prediction: TrainingPrediction, model_dir: Path, prompts: str) -> Table:
    """The model, the adaptor, the prompts and the pairs: facts, no predictions.

    Args:
        prediction: The training's facts.
        model_dir: Diffusers folder; its name is shown.
        prompts: How many prompts there are, in words.

    """
    adaptor = prediction.recipe.adaptor
    height, width = prediction.resolution
    sizes = [f"{name} {count / 1e6:.1f} M" for name, count in prediction.parameters.items()]
    encoder = f", encoder rank {adaptor.encoder_rank}" if adaptor.encoder_rank else ""
    shape = f"{adaptor.preset}, rank {adaptor.rank}{encoder}"
    cached = f"{prediction.pairs_bytes / GB:.2f} GB in the cache"

    table = Table(show_header=False)
    predicts = f"predicts {prediction.prediction_type}, {width}x{height} pixels"
    table.add_row("model", f"{model_dir.name}: {predicts}")
    table.add_row("parameters", ", ".join(sizes))
    table.add_row("trainable", f"{prediction.trainable / 1e6:.2f} M ({shape})")
    table.add_row("prompts", prompts)
    table.add_row("teacher pairs", f"{prediction.recipe.teacher.pairs:,}: {cached}")
    return table


def cost_table(prediction: TrainingPrediction) -> Table:
    """Operations and memory of each kind of work, and how often it is done."""
    recipe = prediction.recipe
    warm_up, decoded = _steps(recipe)
    table = Table("", title="Predicted; memory in float32, weights included")
    for heading in ("rows at once", "TFLOP", "memory, GiB", "how often"):
        table.add_column(heading, justify="right")

    def add(name: str, rows: int, cost: TrainingCost, times: int) -> None:
        tflop = f"{cost.flops / 1e12:.3g}"
        memory = f"{cost.peak_bytes / GIB:.2f}"
        table.add_row(name, str(rows), tflop, memory, f"{times:,}")

    batches = math.ceil(prediction.sampler_batches)
    add("teacher pairs", recipe.teacher.batch, prediction.pairs, batches)
    add("step, latents alone", recipe.batch, prediction.warm_up, warm_up)
    add(_step_title(recipe), recipe.batch, prediction.step, decoded)
    if prediction.fake:
        add("fake score's steps", recipe.batch, prediction.fake, decoded)
    if prediction.target:
        add("its teacher images", recipe.batch, prediction.target, decoded)
    return table


def _step_title(recipe: Recipe) -> str:
    """What an optimiser step after the warm-up does."""
    title = "step, decoded" if recipe.loss.has_image_terms else "step"
    if recipe.score.weight:
        title += ", score"
    if recipe.latent_discriminator.weight:
        title += ", latent discriminator"
    return title


def gpu_table(prediction: TrainingPrediction, gpus: Sequence[Gpu]) -> Table:
    """Hours on named GPUs, at a stated share of their peak rate.

    GPUs whose memory or rate is not known are left out.
    """
    shares = f"{PAIRS_UTILISATION:.0%} (pairs) and {STEPS_UTILISATION:.0%} (steps)"
    title = f"Predicted hours at {shares} of the peak rate in mixed precision; float32 takes longer"
    table = Table("", title=title)
    for heading in ("memory, GiB", "float32 fits", "pairs", "steps"):
        table.add_column(heading, justify="right")
    for gpu in gpus:
        if gpu.memory_gib is None or gpu.fp16_tflops is None:
            continue

        # Training accumulates in FP32, which is half as fast where the rate is FP16's.
        peak = gpu.fp16_tflops * 1e12 / (2 if gpu.fp16_accumulate == "fp16" else 1)
        fits = prediction.peak_bytes <= USABLE_MEMORY * gpu.memory_gib * GIB
        pairs = prediction.pairs_flops / (peak * PAIRS_UTILISATION) / HOUR
        steps = prediction.training_flops / (peak * STEPS_UTILISATION) / HOUR
        hours = (f"{pairs:.3g}", f"{steps:.3g}")
        table.add_row(gpu.title, str(gpu.memory_gib), "yes" if fits else "no", *hours)
    return table


def measured_table(prediction: TrainingPrediction, seconds: Mapping[str, float]) -> Table:
    """The result of ``measure_steps``, and the whole training at that pace.

    Args:
        prediction: The training.
        seconds: As ``measure_steps`` returns them.

    """
    recipe = prediction.recipe
    warm_up, decoded = _steps(recipe)
    times = {
        "teacher call": recipe.teacher.steps * prediction.sampler_batches,
        "warm-up step": warm_up,
        "step": decoded,
    }
    if prediction.fake:
        times["fake score"] = decoded
    table = Table("", title="Measured on this machine's CPU, random weights")
    for heading in ("seconds", "how often", "minutes in all"):
        table.add_column(heading, justify="right")
    for name, count in times.items():
        minutes = seconds[name] * count / 60
        table.add_row(name, f"{seconds[name]:.3f}", f"{count:,.0f}", f"{minutes:.1f}")
    return table


def _steps(recipe: Recipe) -> tuple[int, int]:
    """Optimiser steps of the latent warm-up, and those after it, which decode."""
    warm_up = min(recipe.loss.latent_warmup_steps, recipe.steps)
    return warm_up, recipe.steps - warm_up

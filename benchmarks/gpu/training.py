"""Training steps: this toolkit's loop and a plain diffusers + peft loop, and memory as predicted.

A query is one optimiser step of the published recipe: forward, losses on decoded images, backward,
clip, step. Both loops take the same rows of the same pairs, with the recipe's batch and gradient
checkpointing. They run one after the other: the models of both at once would fill the card.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.gpu.costs import measured_rates
from benchmarks.gpu.figures import Fact, Figure
from benchmarks.gpu.job import Job, Measurement
from benchmarks.gpu.models import PROMPTS, TINY_SIZE, model_folder
from benchmarks.train_speed import plain_loop
from hipa_deploy.engines.latency.report import LatencyStats
from hipa_deploy.engines.latency.validity import Validity
from hipa_deploy.errors import HipaError
from hipa_deploy.train.loop import training_steps as training_loop
from hipa_deploy.train.prediction.training_cost import TrainingPrediction, predict_training
from hipa_deploy.train.recipes.recipe import MixedPrecision, Recipe, load_recipe
from hipa_deploy.train.train_adaptor import train_adaptor

OURS = "hipa-train"
PLAIN = "diffusers + peft, plain loop"
# First steps of each, while allocators and the choice of kernels settle.
DISCARDED = 3
PRECISIONS: dict[MixedPrecision, str] = {"bf16": "bf16", "fp16": "fp16", "no": "fp32"}
RECIPES = {"sd15": "sd15", "sd21-base": "sd21-base", "sd21": "sd21-v", TINY_SIZE: "sd15"}
# What comes before the first step at SD 1.5's size: the model is loaded, pairs are made.
START_SECONDS = 15.0
MANY = 100_000


@dataclass(frozen=True)
class Case:
    """One figure: whose recipe, in which precision, by which loop, with decoded images or not."""

    size: str
    precision: MixedPrecision
    loop: str
    decoded: bool = True

    @property
    def workload(self) -> str:
        """What is computed, in words."""
        return "training step" if self.decoded else "training step, latents alone"

    @property
    def name(self) -> str:
        """The case's name."""
        return f"{self.workload}, {self.size}, {PRECISIONS[self.precision]}, {self.loop}"


# In the order of their worth: the time budget may cut the last ones.
CASES = (
    Case("sd15", "bf16", OURS),
    Case("sd15", "bf16", PLAIN),
    Case("sd15", "no", OURS),
    Case("sd15", "fp16", OURS),
    Case("sd21-base", "bf16", OURS),
    Case("sd15", "bf16", OURS, decoded=False),
    Case("sd15", "no", PLAIN),
    Case("sd15", "fp16", PLAIN),
    Case("sd21-base", "no", OURS),
    Case("sd21-base", "fp16", OURS),
    Case("sd21-base", "bf16", PLAIN),
    Case("sd21", "bf16", OURS),
    Case("sd21", "no", OURS),
    Case("sd21", "fp16", OURS),
    Case("sd21", "bf16", PLAIN),
)
TINY_CASES = (
    Case(TINY_SIZE, "bf16", OURS),
    Case(TINY_SIZE, "bf16", PLAIN),
    Case(TINY_SIZE, "no", OURS, decoded=False),
)


class _EnoughError(Exception):
    """The loop has taken the steps that it was asked for."""


def run(job: Job) -> None:
    """Measure every case."""
    cases = TINY_CASES if job.tiny else CASES
    job.file.plan([case.name for case in cases])
    for case in cases:
        least = job.effort.least_case + (0.0 if job.tiny else START_SECONDS)
        job.file.attempt(case.name, partial(_measure, job, case), least_seconds=least)


def recipe_of(job: Job, case: Case) -> tuple[Recipe, Path]:
    """The published recipe, with few and quick teacher pairs, and the model to train."""
    model = model_folder(job, case.size)
    batch = load_recipe(RECIPES[case.size]).batch
    overrides: dict[str, Any] = {
        "prompts": str(model / PROMPTS),
        "mixed_precision": case.precision,
        "steps": MANY,
        "checkpoint_every": MANY,
        "sample_every": MANY,
        "samples": 1,
        "loss.latent_warmup_steps": 0 if case.decoded else MANY,
        "teacher.pairs": batch,
        "teacher.batch": batch,
        "teacher.steps": 2,
        "held_out.prompts": None,
    }
    if job.tiny:
        overrides |= {"batch": 2, "adaptor.rank": 4, "loss.perceptual_size": 32}
        overrides |= {"teacher.pairs": 4, "teacher.batch": 4}
    return load_recipe(RECIPES[case.size], overrides), model


def _measure(job: Job, case: Case) -> Figure:
    recipe, model = recipe_of(job, case)
    # Before the model is loaded: the prediction counts no memory of this process.
    prediction = predicted(recipe, model)
    cost = prediction.step if case.decoded else prediction.warm_up
    job.release()

    laps = _Laps(job)
    started = time.monotonic()
    loop = _ours if case.loop == OURS else _plain
    try:
        loop(job, recipe, model, laps)
    except _EnoughError:
        pass
    finally:
        measured = laps.stop()
    if measured is None:
        raise HipaError("the loop ended before a step could be measured.")
    stats, validity = measured
    facts: dict[str, Fact] = {
        "predicted_fp32_mib": round(cost.peak_bytes / 2**20),
        "gflop_a_step": round(cost.flops / 1e9, 3),
        "start_seconds": round(laps.first_step_at - started, 1),
    }
    peak = job.peak_mib()
    if peak is not None:
        facts["peak_device_mib"] = round(peak)
        facts["peak_percent_of_predicted"] = round(100 * peak * 2**20 / cost.peak_bytes, 1)
    rates = measured_rates(job.out, arithmetic(job, case.precision))
    if rates is not None:
        bound = 1e3 * cost.flops / rates.flops_per_second
        facts["bound_ms"] = round(bound, 4)
        facts["share_percent"] = round(100 * bound / stats.p50_ms, 2)
    del laps
    job.release()
    return Figure(
        name=case.name,
        model=case.size,
        workload=case.workload,
        engine=case.loop,
        precision=PRECISIONS[case.precision],
        batch=recipe.batch,
        unit="steps/s",
        per_second=1e3 / stats.p50_ms,
        stats=stats,
        validity=validity,
        facts=facts,
    )


def arithmetic(job: Job, precision: MixedPrecision) -> str:
    """The fastest arithmetic that a training step may use, as ``rates.py`` names it.

    In float32 PyTorch lets a GPU's convolutions compute in TF32
    (torch.backends.cudnn.allow_tf32), so a bound by the FP32 rate would be none.
    """
    if precision == "no" and job.on_gpu:
        return "tf32"
    return PRECISIONS[precision]


@cache
def _prediction_of(recipe_json: str, model: Path) -> TrainingPrediction:
    return predict_training(Recipe.model_validate_json(recipe_json), model)


def predicted(recipe: Recipe, model: Path) -> TrainingPrediction:
    """What ``hipa-train --dry-run`` predicts, which is float32 in every precision."""
    return _prediction_of(recipe.model_dump_json(), model)


class _Laps:
    """The steps of a loop, as the loop itself reports their beginnings.

    Attributes:
        first_step_at: when the first step began, as ``time.monotonic`` counts.

    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._measurement = Measurement(job)
        self._count = 0
        self._first: float | None = None
        self._last = 0.0
        self.first_step_at = 0.0

    def begin_step(self) -> None:
        """Call this at the beginning of each step.

        Raises:
            _EnoughError: there are enough steps.

        """
        self._job.synchronise()
        now = time.perf_counter()
        if self._count == 0:
            self.first_step_at = time.monotonic()
        elif self._count == 1:
            self._first = now - self._last
        if self._count > DISCARDED and self._measurement.add(now - self._last):
            raise _EnoughError
        if self._count == DISCARDED:
            self._measurement.start()
        self._count += 1
        # Not ``now``: reading the machine's state belongs to no step.
        self._last = time.perf_counter()

    def stop(self) -> tuple[LatencyStats, Validity] | None:
        """The statistics of the steps, and whether they count; None if the loop failed before."""
        if not self._measurement.count:
            self._measurement.abandon()
            return None
        return self._measurement.stop(self._first)


def _ours(job: Job, recipe: Recipe, model: Path, laps: _Laps) -> None:
    """``train_adaptor`` as it is. It draws the rows of each step first, which is seen from here."""
    out = job.work / "training" / "adaptor"
    shutil.rmtree(out.parent, ignore_errors=True)
    draw = training_loop.batch_rows

    def drawing(count: int, batch: int, seed: int, step: int) -> Tensor:
        if step == 0:
            # The memory of the teacher pairs is given back before the steps' own is measured.
            job.release()
        laps.begin_step()
        return draw(count, batch, seed, step)

    training_loop.batch_rows = drawing
    try:
        train_adaptor(recipe, model, out, cache=job.work / "pairs", device=job.device)
    finally:
        training_loop.batch_rows = draw


def _plain(job: Job, recipe: Recipe, model: Path, laps: _Laps) -> None:
    """The plain loop, on the rows that ours would take."""
    step: Callable[[Tensor], float] = plain_loop(model, recipe, job.work / "pairs", job.device)
    job.release()
    number = 0
    while True:
        laps.begin_step()
        rows = training_loop.batch_rows(recipe.teacher.pairs, recipe.batch, recipe.seed, number)
        step(rows)
        number += 1

"""Latency of a pipeline, per stage and end to end, with the conditions it was measured under."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Literal

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

import hipa_deploy
from hipa_deploy.engines.device import Device, describe_device, peak_rss_mib, usable_cores
from hipa_deploy.engines.record import Record
from hipa_deploy.engines.roofline import Roofline
from hipa_deploy.errors import HipaError
from hipa_deploy.pipeline import OneStepPipeline

DEFAULT_PROMPT = "3d emoji of a red apple"
END_TO_END = "end to end"
MAX_RUNS = 100_000

_PACKAGES = ("numpy", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "cuda-python")


class LatencyStats(Record):
    """Milliseconds over ``runs`` batches after warm-up. ``first_ms`` is the very first run, part of nothing else."""

    runs: int
    first_ms: float | None
    mean_ms: float
    std_ms: float
    min_ms: float
    p50_ms: float
    p90_ms: float
    p99_ms: float


class Conditions(Record):
    """What the numbers hold for."""

    backend: str
    precision: str
    batch: int
    height: int
    width: int
    threads: int
    prompts: Literal["a new prompt every run", "one prompt, its text context cached after the first run"]
    versions: dict[str, str]
    device: Device


class LatencyReport(Record):
    """``hipa-profile``'s result. A run is one batch; throughput is images over the mean time of a run.

    ``roofline`` is no measurement but a prediction for the target that was asked for; None without one.
    """

    schema_version: Literal[1] = 1
    created: str
    warmup: int
    load_seconds: float
    end_to_end: LatencyStats
    stages: dict[str, LatencyStats]
    throughput_images_per_second: float
    peak_rss_mib: int | None
    conditions: Conditions
    roofline: Roofline | None = None


class StageTimer:
    """Collects seconds by stage: ``with timer("unet"): …``. A stage that runs twice adds up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time the block. Runners return host arrays, so nothing is left running on a GPU at its end."""
        started = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started


def profile_pipeline(
    pipeline: OneStepPipeline,
    *,
    runs: int = 50,
    warmup: int = 5,
    prompt: str | None = None,
    console: Console | None = None,
) -> LatencyReport:
    """Time ``runs`` batches after a first run and ``warmup`` more.

    Without ``prompt`` every run has a new prompt, so that the text encoder runs each time; with it, the pipeline's
    cached text context serves all runs but the first, and the report says so.

    Raises:
        HipaError: a number of runs out of range, or a prompt that is too long.

    """
    if not 1 <= runs <= MAX_RUNS or not 0 <= warmup <= MAX_RUNS:
        raise HipaError(f"got {runs} runs and {warmup} of warm-up. Expected 1 to {MAX_RUNS} and 0 to {MAX_RUNS}.")
    samples = [_time_run(pipeline, prompt, number) for number in _counted(1 + warmup + runs, console)]
    first, steady = samples[0], samples[1 + warmup :]
    stats = {name: summarise([run[name] for run in steady], first.get(name)) for name in steady[0]}
    conditions = _conditions(pipeline, prompt)
    return LatencyReport(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        warmup=warmup,
        load_seconds=round(pipeline.load_seconds, 4),
        end_to_end=stats.pop(END_TO_END),
        stages=stats,
        throughput_images_per_second=len(steady) * conditions.batch / sum(run[END_TO_END] for run in steady),
        peak_rss_mib=peak_rss_mib(),
        conditions=conditions,
    )


def _counted(total: int, console: Console | None) -> Iterable[int]:
    """0 to ``total``, with a progress bar that is redrawn seldom: drawing takes time from what is timed."""
    screen = console or Console(stderr=True)
    return track(range(total), "profiling", console=screen, transient=True, refresh_per_second=1)


def _time_run(pipeline: OneStepPipeline, prompt: str | None, number: int) -> dict[str, float]:
    """Seconds by stage, and end to end, of one full batch."""
    timer = StageTimer()
    text = prompt if prompt is not None else f"{DEFAULT_PROMPT} {number}"
    started = time.perf_counter()
    pipeline(text, seed=number, count=pipeline.bundle.manifest.batch, timer=timer)
    return {**timer.seconds, END_TO_END: time.perf_counter() - started}


def summarise(seconds: Sequence[float], first_seconds: float | None) -> LatencyStats:
    """Statistics in milliseconds. Percentiles interpolate linearly between runs (numpy's default)."""
    ms = np.asarray(seconds, np.float64) * 1e3
    p50, p90, p99 = np.percentile(ms, [50, 90, 99])
    return LatencyStats(
        runs=len(ms),
        first_ms=None if first_seconds is None else first_seconds * 1e3,
        mean_ms=float(ms.mean()),
        std_ms=float(ms.std(ddof=1)) if len(ms) > 1 else 0.0,
        min_ms=float(ms.min()),
        p50_ms=float(p50),
        p90_ms=float(p90),
        p99_ms=float(p99),
    )


def _conditions(pipeline: OneStepPipeline, prompt: str | None) -> Conditions:
    manifest = pipeline.bundle.manifest
    return Conditions(
        backend=pipeline.backend,
        precision=manifest.precision,
        batch=manifest.batch,
        height=manifest.one_step.height,
        width=manifest.one_step.width,
        threads=usable_cores(),
        prompts="a new prompt every run"
        if prompt is None
        else "one prompt, its text context cached after the first run",
        versions={"hipa-deploy": hipa_deploy.__version__, **_versions()},
        device=describe_device(),
    )


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def render_table(report: LatencyReport) -> Table:
    """The report for a terminal: a row a stage, milliseconds, conditions in the caption."""
    told = report.conditions
    title = f"Latency of a batch of {told.batch}, {told.width}x{told.height}, {told.precision}, {told.backend}, in ms"
    table = Table(title=title, caption=_caption(report), caption_justify="left")
    table.add_column("stage")
    for heading in ("first", "p50", "p90", "p99", "mean", "std", "min"):
        table.add_column(heading, justify="right")
    for name, stats in report.stages.items():
        table.add_row(name, *_cells(stats))
    table.add_row(END_TO_END, *_cells(report.end_to_end), style="bold")
    return table


def _cells(stats: LatencyStats) -> list[str]:
    values = (stats.first_ms, stats.p50_ms, stats.p90_ms, stats.p99_ms, stats.mean_ms, stats.std_ms, stats.min_ms)
    return ["-" if value is None else f"{value:.2f}" for value in values]


def _caption(report: LatencyReport) -> str:
    told = report.conditions
    device = told.device.gpu.name if told.device.gpu and told.backend != "onnxruntime" else told.device.cpu
    memory = "unknown" if report.peak_rss_mib is None else f"{report.peak_rss_mib} MiB"
    return (
        f"{report.end_to_end.runs} runs after {report.warmup} of warm-up; {told.prompts}; "
        f"{device}, {told.threads} threads; "
        f"load {report.load_seconds:.2f} s; throughput {report.throughput_images_per_second:.2f} images/s; "
        f"peak host memory {memory}."
    )

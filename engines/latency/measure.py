"""Latency of a pipeline, per stage and end to end, with the conditions it was measured under."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import track

import hipa_deploy
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.engines.backends.available import Device, describe_device
from hipa_deploy.engines.device.machine import peak_rss_mib, usable_cores
from hipa_deploy.engines.latency.layer_times import profile_layers
from hipa_deploy.engines.latency.machine_state import Machine, MachineState, state_warnings
from hipa_deploy.engines.latency.report import (
    END_TO_END,
    BundleFacts,
    Conditions,
    LatencyReport,
    LatencyStats,
    Prompts,
)
from hipa_deploy.engines.latency.stage_timer import StageTimer
from hipa_deploy.errors import HipaError
from hipa_deploy.generate.pipeline import OneStepPipeline
from hipa_deploy.generate.prompts import BAKED_PROMPTS, read_closed_set
from hipa_deploy.generate.runner import CPU_BACKENDS
from hipa_deploy.images.example_source import example_source

DEFAULT_PROMPT = "3d emoji of a red apple"
MAX_RUNS = 100_000
DRIFT = 0.1  # of the first quarter's median, and the last quarter's is another

_PACKAGES = ("numpy", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "cuda-python")


class _Run(NamedTuple):
    """Seconds of one batch by stage and end to end, and what the device says, by stage and in all."""

    host: dict[str, float]
    device: dict[str, float]


def profile_pipeline(
    pipeline: OneStepPipeline,
    *,
    runs: int = 50,
    warmup: int = 5,
    prompt: str | None = None,
    layers: bool = False,
    console: Console | None = None,
    root: Path = Path("/"),
) -> LatencyReport:
    """Time ``runs`` batches after a first run and ``warmup`` more; then, with ``layers``, profile the layers apart.

    Without ``prompt`` every run has a new prompt, so that the text encoder runs each time; with it, the pipeline's
    cached text context serves all runs but the first. A bundle with baked prompts takes them in turn. The report says
    which. ``root`` is where the machine's state is read, another than '/' in tests.

    Raises:
        HipaError: a number of runs out of range, a prompt that is too long, or no profiler for the layers.

    """
    if not 1 <= runs <= MAX_RUNS or not 0 <= warmup <= MAX_RUNS:
        raise HipaError(
            f"got {runs} runs and {warmup} of warm-up. Expected 1 to {MAX_RUNS} and 0 to {MAX_RUNS}."
        )
    told, text = _prompts(pipeline.bundle, prompt)
    device = describe_device()
    machine = Machine(root, device.gpu.name if device.gpu else None)
    first, *_ = [_time_run(pipeline, text(number), number) for number in range(1 + warmup)]
    before = machine.read()
    steady = [
        _time_run(pipeline, text(number), number) for number in _counted(1 + warmup, runs, console)
    ]
    state = machine.state(before, machine.read())
    stats = _stats([run.host for run in steady], first.host)
    conditions = _conditions(pipeline, told, device, state)
    whole = stats.pop(END_TO_END)
    return LatencyReport(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        warmup=warmup,
        load_seconds=round(pipeline.load_seconds, 4),
        end_to_end=whole,
        stages=stats,
        device=_stats([run.device for run in steady], first.device),
        throughput_images_per_second=1e3 * conditions.batch / whole.mean_ms,
        peak_rss_mib=peak_rss_mib(),
        peak_device_mib=_device_memory(pipeline),
        conditions=conditions,
        layers=profile_layers(pipeline, text(0)) if layers else {},
        warnings=(
            *state_warnings(
                state, cores=conditions.threads, on_gpu=pipeline.backend not in CPU_BACKENDS
            ),
            *drift_warnings(whole.samples_ms),
        ),
    )


def _counted(start: int, runs: int, console: Console | None) -> Iterable[int]:
    """``runs`` numbers from ``start``, with a progress bar that is redrawn seldom: drawing takes time from the runs."""
    screen = console or Console(stderr=True)
    return track(
        range(start, start + runs),
        "profiling",
        console=screen,
        transient=True,
        refresh_per_second=1,
    )


def _prompts(bundle: Bundle, prompt: str | None) -> tuple[Prompts, Callable[[int], str]]:
    """What the report says of the prompts, and the prompt of each run."""
    if prompt is not None:
        return "one prompt, its text context cached after the first run", lambda number: prompt
    if BAKED_PROMPTS in bundle.manifest.files:
        baked = read_closed_set(bundle.path(BAKED_PROMPTS))
        return "the bundle's baked prompts in turn, no text encoder", lambda number: baked[
            number % len(baked)
        ]
    return "a new prompt every run", lambda number: f"{DEFAULT_PROMPT} {number}"


def _time_run(pipeline: OneStepPipeline, prompt: str, number: int) -> _Run:
    """One full batch, of a source image of its own where the task has one."""
    timer, source = StageTimer(pipeline.runners), example_source(pipeline.bundle, number)
    started = time.perf_counter()
    pipeline(prompt, source=source, seed=number, count=pipeline.bundle.manifest.batch, timer=timer)
    host = {**timer.seconds, END_TO_END: time.perf_counter() - started}
    device = timer.device_seconds
    return _Run(host, {**device, END_TO_END: sum(device.values())} if device else {})


def _stats(runs: list[dict[str, float]], first: dict[str, float]) -> dict[str, LatencyStats]:
    return {name: summarise([run[name] for run in runs], first.get(name)) for name in runs[0]}


def summarise(seconds: Sequence[float], first_seconds: float | None) -> LatencyStats:
    """Statistics in milliseconds. Percentiles interpolate linearly between runs (numpy's default)."""
    ms = np.asarray(seconds, np.float64) * 1e3
    p50, p90, p95, p99 = np.percentile(ms, [50, 90, 95, 99])
    return LatencyStats(
        runs=len(ms),
        first_ms=None if first_seconds is None else first_seconds * 1e3,
        mean_ms=float(ms.mean()),
        std_ms=float(ms.std(ddof=1)) if len(ms) > 1 else 0.0,
        min_ms=float(ms.min()),
        p50_ms=float(p50),
        p90_ms=float(p90),
        p95_ms=float(p95),
        p99_ms=float(p99),
        max_ms=float(ms.max()),
        samples_ms=tuple(np.round(ms, 4).tolist()),
    )


def drift_warnings(samples_ms: Sequence[float]) -> tuple[str, ...]:
    """A sentence if the last quarter of the runs is slower or faster than the first: clocks that fell, or rose."""
    quarter = len(samples_ms) // 4
    if quarter < 5:  # too few for medians to differ by more than chance
        return ()
    first, last = np.median(samples_ms[:quarter]), np.median(samples_ms[-quarter:])
    if abs(last / first - 1) < DRIFT:
        return ()
    word = "slower" if last > first else "faster"
    return (
        f"not steady: the last quarter of the runs was {abs(last / first - 1):.0%} {word} than the first",
    )


def _device_memory(pipeline: OneStepPipeline) -> float | None:
    """The most that any runner tells of: each tells what was taken on the device since it began to load."""
    told = [getattr(runner, "device_memory_mib", None) for runner in pipeline.runners.values()]
    return max((mib for mib in told if mib is not None), default=None)


def _conditions(
    pipeline: OneStepPipeline, prompts: Prompts, device: Device, state: MachineState
) -> Conditions:
    manifest = pipeline.bundle.manifest
    return Conditions(
        backend=pipeline.backend,
        precision=manifest.precision,
        batch=manifest.batch,
        height=manifest.one_step.height,
        width=manifest.one_step.width,
        threads=usable_cores(),
        prompts=prompts,
        versions={"hipa-deploy": hipa_deploy.__version__, **_versions()},
        device=device,
        bundle=_bundle_facts(pipeline.bundle),
        state=state,
    )


def _bundle_facts(bundle: Bundle) -> BundleFacts:
    manifest = bundle.manifest
    decoder = manifest.decoder
    return BundleFacts(
        producer=manifest.producer,
        layout=manifest.layout,
        base_model=manifest.base_model.name,
        base_model_sha256=manifest.base_model.sha256,
        adaptor=manifest.adaptor.name if manifest.adaptor else None,
        decoder=f"{decoder.kind}: {decoder.name}" if decoder else None,
        graphs={name: manifest.files[stage.path] for name, stage in bundle.stages.items()},
    )


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found

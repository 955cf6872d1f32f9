"""Measure a pipeline's latency, by stage and end to end, and record the conditions it holds for.

A run is one batch. The very first run is reported apart from the others, because a backend does
some work only once: it allocates memory, chooses kernels and captures CUDA graphs.
"""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import track

import hipa_deploy
from hipa_deploy.bundle.adaptor_swap import stage_sha256
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.bundle.reference import reference_prompt
from hipa_deploy.engines.backends.available import Device, describe_device
from hipa_deploy.engines.device.machine import peak_rss_mib, usable_cores
from hipa_deploy.engines.latency.layer_times import profile_layers
from hipa_deploy.engines.latency.machine_state import (
    Machine,
    MachineState,
    Watch,
    others_warnings,
    state_warnings,
)
from hipa_deploy.engines.latency.report import (
    MAX_RUNS,
    BundleFacts,
    Conditions,
    LatencyReport,
    LatencyStats,
    Prompts,
)
from hipa_deploy.engines.latency.stage_timer import END_TO_END, StageTimer
from hipa_deploy.engines.latency.validity import judge
from hipa_deploy.engines.tensorrt.gpu import find_gpu_address
from hipa_deploy.errors import HipaError
from hipa_deploy.generate.pipeline import OneStepPipeline
from hipa_deploy.generate.prompts import BAKED_PROMPTS, read_baked_prompts
from hipa_deploy.generate.runner import CPU_BACKENDS
from hipa_deploy.images.example_source import example_source

# A run is not steady if the medians of its first and last quarter differ by this share.
DRIFT = 0.1
MAX_SECONDS = 86_400  # a day
# With fewer samples in a quarter, two medians differ by chance.
_LEAST_QUARTER = 5

_PACKAGES = (
    "numpy", "onnxruntime", "onnxruntime-gpu", "onnxruntime-ep-nv-tensorrt-rtx-cu13",
    "onnxruntime-ep-nv-tensorrt-rtx-cu12", "openvino", "tensorrt", "tensorrt-rtx", "cuda-python",
)  # fmt: skip
# The backends whose library is asked for its version, where the package is not known.
_ENGINE_PACKAGES = {"tensorrt": "tensorrt", "rtx": "tensorrt-rtx"}


class _Run(NamedTuple):
    """Seconds of one batch, by stage and in all.

    Attributes:
        host: as the host waits for them.
        device: as the device reports them; empty where its runners do not measure it.

    """

    host: dict[str, float]
    device: dict[str, float]


def check_runs(runs: int, warmup: int, seconds: float = 0.0) -> None:
    """Raise HipaError for numbers of runs, or seconds, out of range."""
    if not 0 <= seconds <= MAX_SECONDS:
        raise HipaError(f"got {seconds:g} seconds. Expected 0 to {MAX_SECONDS}.")
    if not 1 <= runs <= MAX_RUNS or not 0 <= warmup <= MAX_RUNS:
        raise HipaError(
            f"got {runs} runs and {warmup} of warm-up. "
            f"Expected 1 to {MAX_RUNS} and 0 to {MAX_RUNS}."
        )


def profile_pipeline(
    pipeline: OneStepPipeline,
    *,
    runs: int = 50,
    warmup: int = 5,
    seconds: float = 0.0,
    prompt: str | None = None,
    layers: bool = False,
    console: Console | None = None,
    root: Path = Path("/"),
) -> LatencyReport:
    """Time ``runs`` batches of ``pipeline``, after a first run and ``warmup`` more.

    Args:
        pipeline: the pipeline to measure; it stays loaded.
        runs: timed runs, 1 to ``MAX_RUNS``.
        warmup: untimed runs between the first run and the timed ones, 0 to ``MAX_RUNS``.
        seconds: go on beyond ``runs`` until the timed runs took this long together, or there are
            ``MAX_RUNS`` of them. A valid figure needs 100 runs and 10 seconds
            (``engines/latency/validity.py``).
        prompt: one prompt for all runs, so that all but the first use the cached text context. By
            default every run has a new prompt, a number and behind it the bundle's reference
            prompt, so that the text encoder runs each time. What then is too long is cut. A bundle
            with baked prompts takes them in turn. The report says which of the three was measured.
        layers: also profile every stage layer by layer, after the timed runs.
        console: where the progress bar is drawn; standard error by default.
        root: the folder that stands for '/' when the machine's state is read; for tests.

    Raises:
        HipaError: a number of runs out of range, a prompt that is too long, a bundle without a
            reference prompt, or a backend that cannot profile layers.

    Example:
        >>> with OneStepPipeline.load("emoji", "onnxruntime") as pipe:
        ...     report = profile_pipeline(pipe, runs=20)
        >>> list(report.stages)
        ['text_encoder', 'unet', 'vae_decoder']

    """
    check_runs(runs, warmup, seconds)
    prompts = _run_prompts(pipeline.bundle, prompt)
    device = describe_device()
    machine = Machine(root, device.gpu.name if device.gpu else None, find_gpu_address())

    # The first run and the warm-up. Every run has a number of its own: its seed, and its prompt.
    first = _time_run(pipeline, prompts, 0)
    for number in range(1, 1 + warmup):
        _time_run(pipeline, prompts, number)

    # The timed runs, with the state of the machine read right before and right after them.
    before = machine.read()
    on_gpu = pipeline.backend not in CPU_BACKENDS
    with Watch(machine if on_gpu else None) as watch:
        timed = []
        for number in _with_progress(range(1 + warmup, 1 + warmup + runs), console):
            timed.append(_time_run(pipeline, prompts, number))
        took = sum(run.host[END_TO_END] for run in timed)
        while took < seconds and len(timed) < MAX_RUNS:
            number = 1 + warmup + len(timed)
            timed.append(_time_run(pipeline, prompts, number))
            took += timed[-1].host[END_TO_END]
    state = machine.state(before, machine.read())

    # Statistics of the timed runs, and what makes them doubtful.
    host_stats = _stats_by_stage([run.host for run in timed], first.host)
    device_stats = _stats_by_stage([run.device for run in timed], first.device)
    conditions = _conditions(pipeline, prompts.description, device, state)
    end_to_end = host_stats.pop(END_TO_END)
    drift = drift_warnings(end_to_end.samples_ms)
    warnings = state_warnings(state, cores=conditions.threads, on_gpu=on_gpu) + drift

    # Whether the figures count. Other processes take from a CPU what is measured there.
    others = () if on_gpu else others_warnings(state, cores=conditions.threads)
    validity = judge(
        end_to_end.samples_ms,
        readings=watch.readings if on_gpu else None,
        disturbances=(*drift, *others),
    )

    # Memory is read before the layers are profiled: a profiler takes memory of its own.
    host_mib = peak_rss_mib()
    device_mib = _device_memory(pipeline)
    layer_times = profile_layers(pipeline, prompts.text(0)) if layers else {}
    return LatencyReport(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        warmup=warmup,
        load_seconds=round(pipeline.load_seconds, 4),
        end_to_end=end_to_end,
        stages=host_stats,
        device=device_stats,
        throughput_images_per_second=1e3 * conditions.batch / end_to_end.mean_ms,
        peak_rss_mib=host_mib,
        peak_device_mib=device_mib,
        conditions=conditions,
        layers=layer_times,
        warnings=warnings,
        validity=validity,
    )


def _with_progress(numbers: range, console: Console | None) -> Iterable[int]:
    """``numbers``, with a progress bar."""
    return track(
        numbers,
        "profiling",
        console=console or Console(stderr=True),
        transient=True,
        # Drawing the bar takes time from the runs, so it is redrawn seldom.
        refresh_per_second=1,
    )


@dataclass(frozen=True)
class _RunPrompts:
    """The prompt of each run.

    Attributes:
        description: what the report says of the prompts.
        texts: prompts that the runs take in turn.
        numbered: the run's number is put before its prompt, so that no two prompts are the same.
            Before it, because the end is cut off where the two are too long together.

    """

    description: Prompts
    texts: list[str]
    numbered: bool = False

    def text(self, number: int) -> str:
        """The prompt of run ``number``, counted from 0."""
        text = self.texts[number % len(self.texts)]
        return f"{number} {text}" if self.numbered else text


def _run_prompts(bundle: Bundle, prompt: str | None) -> _RunPrompts:
    if prompt is not None:
        return _RunPrompts("one prompt, its text context cached after the first run", [prompt])
    if BAKED_PROMPTS in bundle.manifest.files:
        baked = read_baked_prompts(bundle.path(BAKED_PROMPTS))
        return _RunPrompts("the bundle's baked prompts in turn, no text encoder", list(baked))
    return _RunPrompts("a new prompt every run", [reference_prompt(bundle)], numbered=True)


def _time_run(pipeline: OneStepPipeline, prompts: _RunPrompts, number: int) -> _Run:
    """Time one full batch; ``number`` is its seed, and that of its source image if it has one."""
    timer = StageTimer(pipeline.runners)
    # Drawn before the clock starts: a user's source image is there already.
    source = example_source(pipeline.bundle, number)
    prompt = prompts.text(number)

    started = time.perf_counter()
    pipeline(
        prompt,
        source=source,
        seed=number,
        count=pipeline.bundle.manifest.batch,
        truncate=prompts.numbered,
        timer=timer,
    )
    host = {**timer.seconds, END_TO_END: time.perf_counter() - started}

    device = dict(timer.device_seconds)
    if device:
        device[END_TO_END] = sum(device.values())
    return _Run(host, device)


def _stats_by_stage(
    runs: list[dict[str, float]], first: dict[str, float]
) -> dict[str, LatencyStats]:
    """Statistics of each stage in ``runs``; a stage that only the first run had is not in them."""
    stats = {}
    for stage in runs[0]:
        seconds = [run[stage] for run in runs]
        stats[stage] = summarise(seconds, first.get(stage))
    return stats


def summarise(seconds: Sequence[float], first_seconds: float | None) -> LatencyStats:
    """Statistics in milliseconds of runs that are timed in seconds.

    Percentiles interpolate linearly between runs, as numpy does by default.

    Args:
        seconds: one number for each run, at least one.
        first_seconds: the very first run, which is part of no statistic; None if it is not known.

    Example:
        >>> summarise([0.010, 0.012, 0.014], 0.5).p50_ms
        12.0

    """
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
    """Warn if the last quarter of the runs was slower or faster than the first.

    Clocks that fall as a device grows warm, or rise as it wakes, show in this way.

    Args:
        samples_ms: the runs in the order in which they were made.

    """
    quarter = len(samples_ms) // 4
    if quarter < _LEAST_QUARTER:
        return ()
    first = np.median(samples_ms[:quarter])
    last = np.median(samples_ms[-quarter:])
    change = abs(last / first - 1)
    if change < DRIFT:
        return ()
    word = "slower" if last > first else "faster"
    return (f"not steady: the last quarter of the runs was {change:.0%} {word} than the first",)


def _device_memory(pipeline: OneStepPipeline) -> float | None:
    """Device memory in MiB that the stages take together; None where no runner measures it.

    A runner measures what was taken on the whole device since it began to load, so the runner that
    loaded first has counted all: the largest number is the total, not the sum.
    """
    most: float | None = None
    for runner in pipeline.runners.values():
        mib = getattr(runner, "device_memory_mib", None)
        if mib is not None and (most is None or mib > most):
            most = mib
    return most


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
        versions={"hipa-deploy": hipa_deploy.__version__, **_versions(device)},
        device=device,
        bundle=_bundle_facts(pipeline.bundle),
        state=state,
        low_memory=pipeline.low_memory,
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
        graphs={name: stage_sha256(bundle, name) for name in bundle.stages},
    )


def _versions(device: Device) -> dict[str, str]:
    """Versions of the packages that latency depends on, of those that are installed."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    # Packages for CUDA 12 have names of their own, and a system's TensorRT may have none.
    for backend in device.backends:
        own = _ENGINE_PACKAGES.get(backend.name)
        if own is not None and backend.version is not None:
            found.setdefault(own, backend.version)
    return found

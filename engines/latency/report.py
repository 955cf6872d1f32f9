"""The latency report: what was measured, and the conditions that the numbers hold for.

``docs/latency.schema.json`` is the JSON schema of ``LatencyReport``, published for other programs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from hipa_deploy.disk.reading import MIB, read_record, shown
from hipa_deploy.engines.backends.available import Device
from hipa_deploy.engines.latency.layer_times import LayerTime
from hipa_deploy.engines.latency.machine_state import MachineState
from hipa_deploy.engines.latency.roofline import Roofline
from hipa_deploy.engines.latency.stage_timer import END_TO_END
from hipa_deploy.engines.latency.validity import Validity
from hipa_deploy.errors import HipaError, brief
from hipa_deploy.record import Record

MAX_RUNS = 100_000
WRITTEN = "Expected a file that hipa-profile --json wrote."
MAX_MS = 1e9  # eleven days
MAX_BYTES = 64 * MIB  # of a report; one of 100,000 runs has a few million for each stage
Prompts = Literal[
    "a new prompt every run",
    "one prompt, its text context cached after the first run",
    "the bundle's baked prompts in turn, no text encoder",
]


class LatencyStats(Record):
    """Statistics of ``runs`` batches after warm-up, in milliseconds.

    Attributes:
        runs: how many batches were timed.
        first_ms: the very first run, which is part of no other number.
        std_ms: the sample standard deviation; 0 for one run.
        p95_ms: None in reports of schema 1.
        max_ms: None in reports of schema 1.
        samples_ms: the runs in order, to 0.1 microseconds; empty in reports of schema 1.

    """

    runs: int
    first_ms: float | None
    mean_ms: float
    std_ms: float
    min_ms: float
    p50_ms: float
    p90_ms: float
    p95_ms: float | None = None
    p99_ms: float
    max_ms: float | None = None
    samples_ms: tuple[float, ...] = ()


class BundleFacts(Record):
    """Which bundle was measured.

    Attributes:
        producer: the program and version that exported it.
        layout: 'onestep' or 'generic'.
        base_model: the name of the model.
        base_model_sha256: the hash of its weights.
        adaptor: the name of the HiPA adaptor; None without one.
        decoder: its kind and name, such as 'tiny: taesd'; None for the model's own.
        graphs: the SHA-256 of each stage, its graph and its weights.

    """

    producer: str
    layout: str
    base_model: str
    base_model_sha256: str
    adaptor: str | None
    decoder: str | None
    graphs: dict[str, str]


class Conditions(Record):
    """The conditions that the numbers hold for.

    Attributes:
        batch: images in a run.
        height: of the images, in pixels.
        width: of the images, in pixels.
        threads: processor cores that the process may use.
        prompts: how the prompts of the runs were chosen; it decides whether the text encoder runs.
        versions: versions of the packages that compute, by package.
        device: the machine.
        bundle: None in reports of schema 1.
        state: the machine's clocks, temperatures and power mode; None in reports of schema 1.
        low_memory: stages were loaded in turn, and their loading is part of the time from prompt
            to image.

    """

    backend: str
    precision: str
    batch: int
    height: int
    width: int
    threads: int
    prompts: Prompts
    versions: dict[str, str]
    device: Device
    bundle: BundleFacts | None = None
    state: MachineState | None = None
    low_memory: bool = False


class LatencyReport(Record):
    """The result of ``hipa-profile``. A run is one batch.

    Attributes:
        schema_version: 2; reports of version 1 can still be read.
        created: the time of the measurement, in UTC, as ISO 8601.
        warmup: untimed runs between the first run and the timed ones.
        load_seconds: the time to load the pipeline.
        end_to_end: from the prompt to the image.
        stages: by stage, as the host waits for it: copies and launches are included. Engines run
            in one call, so that there is one entry, 'pipeline', and ``device`` has the stages.
        device: by stage, as the device measures its computation (CUDA events around the execution,
            no copies), with the sum as 'end to end'; empty for backends that do not measure it.
        throughput_images_per_second: images of a batch over the mean time of a run.
        peak_rss_mib: the most host memory that the process has held.
        peak_device_mib: the device memory that the runners took, None where they do not measure
            it. On Jetson, device and host share their memory.
        conditions: the conditions that the numbers hold for.
        roofline: a prediction for a target, not a measurement; None if no target was named.
        layers: by stage, the time of each layer, if layers were profiled.
        warnings: what makes the numbers doubtful, a sentence each.
        validity: whether the numbers count, by stated bounds; None in reports of older versions.

    """

    schema_version: Literal[1, 2] = 2
    created: str
    warmup: int
    load_seconds: float
    end_to_end: LatencyStats
    stages: dict[str, LatencyStats]
    device: dict[str, LatencyStats] = Field(default_factory=dict)
    throughput_images_per_second: float
    peak_rss_mib: int | None
    peak_device_mib: float | None = None
    conditions: Conditions
    roofline: Roofline | None = None
    layers: dict[str, tuple[LayerTime, ...]] = Field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    validity: Validity | None = None


def stage_stats(report: LatencyReport) -> dict[str, LatencyStats]:
    """The statistics of each stage: as the host waits for it, else as the device measures it.

    Engines run all stages in one call, 'pipeline', and the host sees that call alone.
    """
    found = dict(report.stages)
    for name, stats in report.device.items():
        if name != END_TO_END:
            found.setdefault(name, stats)
    return found


def read_report(path: Path) -> LatencyReport:
    """Read a report that ``hipa-profile --json`` wrote, of this schema or an older one.

    Raises:
        HipaError: the file cannot be read, or is not such a report.

    """
    report = read_record(path, LatencyReport, WRITTEN, max_bytes=MAX_BYTES)
    for name, stats in {**report.stages, **report.device, "end_to_end": report.end_to_end}.items():
        problem = _problem(stats)
        if problem:
            raise HipaError(f"{path}: {shown(name)}: {problem}. {WRITTEN}")
    return report


def _problem(stats: LatencyStats) -> str | None:
    """What no measurement gives, and what could not be compared; None where nothing is."""
    times = [stats.mean_ms, stats.min_ms, stats.p50_ms, stats.p90_ms, stats.p99_ms]
    times += [time for time in (stats.first_ms, stats.p95_ms, stats.max_ms) if time is not None]
    times += stats.samples_ms
    if not 1 <= stats.runs <= MAX_RUNS or len(stats.samples_ms) > MAX_RUNS:
        return f"has {brief(stats.runs)} runs, expected 1 to {MAX_RUNS}"
    for time in times:
        if not 0 < time <= MAX_MS:
            return f"has a time of {time:g} ms, expected more than 0, and at most {MAX_MS:g}"
    if not 0 <= stats.std_ms <= MAX_MS:
        return f"has a standard deviation of {stats.std_ms:g} ms"
    return None

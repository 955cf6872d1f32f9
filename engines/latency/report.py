"""The latency report: what was measured, and the conditions that it holds for."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from hipa_deploy.engines.backends.available import Device
from hipa_deploy.engines.latency.layer_times import LayerTime
from hipa_deploy.engines.latency.machine_state import MachineState
from hipa_deploy.engines.latency.roofline import Roofline
from hipa_deploy.errors import HipaError
from hipa_deploy.record import Record

END_TO_END = "end to end"


Prompts = Literal[
    "a new prompt every run",
    "one prompt, its text context cached after the first run",
    "the bundle's baked prompts in turn, no text encoder",
]


class LatencyStats(Record):
    """Milliseconds over ``runs`` batches after warm-up. ``first_ms`` is the very first run, part of nothing else.

    ``samples_ms`` are the runs in order, to 0.1 microseconds; empty in reports of schema 1.
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
    """Which bundle was measured. ``decoder`` is its kind and name, ``graphs`` the SHA-256 of each stage's file."""

    producer: str
    layout: str
    base_model: str
    base_model_sha256: str
    adaptor: str | None
    decoder: str | None
    graphs: dict[str, str]


class Conditions(Record):
    """What the numbers hold for. ``bundle`` and ``state`` are None in reports of schema 1."""

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


class LatencyReport(Record):
    """``hipa-profile``'s result. A run is one batch; throughput is images over the mean time of a run.

    ``stages`` are as the host sees them: copies, launches and waiting included. ``device`` is what the device says it
    computed for (CUDA events around the execution, no copies), for backends that say so, and its sum as 'end to end'.
    ``peak_device_mib`` is what the runners took on the device, where they tell; on Jetson these are the host's chips.
    ``roofline`` is no measurement but a prediction for the target that was asked for; None without one.
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


def read_report(path: Path) -> LatencyReport:
    """A report that ``hipa-profile --json`` wrote, of this schema or an older one.

    Raises:
        HipaError: the file cannot be read, or is no such report.

    """
    try:
        return LatencyReport.model_validate_json(path.read_bytes())
    except (ValidationError, OSError) as error:
        reason = (
            error.strerror if isinstance(error, OSError) else "not a latency report of this version"
        )
        raise HipaError(
            f"{path}: {reason}. Expected a file that hipa-profile --json wrote."
        ) from None

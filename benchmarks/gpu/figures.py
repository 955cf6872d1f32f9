"""The data files of ``benchmarks/gpu/run.py``: what was measured, how valid it is, what is missing.

Each part writes a ``PartResult`` after every case, so that a run that is stopped keeps its figures.
The parts together are a ``Report``, which is what docs/latency holds.
"""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

from pydantic import Field

from hipa_deploy import __version__
from hipa_deploy.disk.files import write_file
from hipa_deploy.disk.reading import MIB, read_record
from hipa_deploy.doctor.self_test import describe
from hipa_deploy.engines.backends.available import Device, describe_device
from hipa_deploy.engines.latency.report import LatencyStats
from hipa_deploy.engines.latency.validity import Validity
from hipa_deploy.errors import HipaError
from hipa_deploy.record import Record

MAX_BYTES = 64 * MIB
NO_TIME = "the time budget ended first"
Unit = Literal["images/s", "steps/s", "TFLOP/s", "GB/s"]
Fact = int | float | str


class Figure(Record):
    """One figure: what ran, how fast, and whether it counts.

    Attributes:
        name: of the case; no two in a part are the same.
        model: the shapes that ran, such as 'sd15'.
        workload: what was computed, such as 'generate' or 'training step'.
        engine: what computed it, such as 'diffusers eager'.
        precision: of its arithmetic.
        batch: images or rows of a query.
        unit: of ``per_second``.
        per_second: over the median query.
        stats: milliseconds of a query.
        validity: whether the figure counts, and if not, why.
        facts: more of it by name: memory, stages, the bound, versions.

    """

    name: str
    model: str
    workload: str
    engine: str
    precision: str
    batch: int
    unit: Unit
    per_second: float
    stats: LatencyStats
    validity: Validity
    facts: dict[str, Fact] = Field(default_factory=dict)


class PartResult(Record):
    """What one part measured, and what it left out.

    Attributes:
        part: its name.
        created: when it was written last, in UTC, as ISO 8601.
        seconds: how long it ran, over all its runs.
        budget_seconds: how long it might run, the last time.
        figures: in the order in which they were measured.
        left_out: the cases that were not measured, with the reason.
        facts: what is known besides, by name.

    """

    part: str
    created: str
    seconds: float
    budget_seconds: float
    figures: tuple[Figure, ...] = ()
    left_out: dict[str, str] = Field(default_factory=dict)
    facts: dict[str, Fact] = Field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether a longer run would measure no more."""
        return not any(reason.startswith(NO_TIME) for reason in self.left_out.values())


class Conditions(Record):
    """What the figures hold for; figures of other conditions do not go into the same folder.

    Attributes:
        producer: this project and its version.
        note: what every figure must carry: that a run on a CPU says nothing of a GPU. Otherwise
            None.
        device: the machine.
        versions: of the packages that compute, by package.

    """

    producer: str
    note: str | None
    device: Device
    versions: dict[str, str]


class Report(Record):
    """The figures of one machine, as docs/latency holds them."""

    schema_version: Literal[1] = 1
    kind: Literal["hipa-deploy GPU figures"] = "hipa-deploy GPU figures"
    conditions: Conditions
    parts: dict[str, PartResult]

    @property
    def device_name(self) -> str:
        """The GPU's name, or the processor's where no GPU took part."""
        device = self.conditions.device
        if self.conditions.note is None and device.gpu is not None:
            return device.gpu.name
        return device.cpu


# What the figures depend on, of what is installed.
PACKAGES = (
    "torch", "diffusers", "transformers", "peft", "accelerate", "numpy", "onnx", "onnxruntime",
    "onnxruntime-gpu", "onnxruntime-ep-nv-tensorrt-rtx-cu12", "onnxruntime-ep-nv-tensorrt-rtx-cu13",
    "openvino", "tensorrt", "tensorrt-rtx", "cuda-python", "cuda-bindings", "polygraphy",
)  # fmt: skip


def find_conditions(note: str | None) -> Conditions:
    """The conditions of a run that begins now.

    Args:
        note: what every figure must carry; None for a GPU's.

    """
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return Conditions(
        producer=f"hipa-deploy {__version__}",
        note=note,
        device=describe_device(),
        versions=versions,
    )


def check_conditions(folder: Path, now: Conditions) -> None:
    """Keep the conditions of a folder's first run; refuse a run under others.

    Raises:
        HipaError: the folder has figures of another machine or of other versions.

    """
    path = folder / "conditions.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_file(path, (now.model_dump_json(indent=1) + "\n").encode())
        return
    remedy = "Choose another --out, or delete this one."
    before = read_record(path, Conditions, remedy)
    differences = []
    for field in Conditions.model_fields:
        if getattr(before, field) != getattr(now, field):
            differences.append(field)
    if differences:
        raise HipaError(
            f"{folder} has figures of other conditions ({', '.join(differences)} changed), and "
            f"they must not be mixed. {remedy}"
        )


def merge(folder: Path, parts: Iterable[str]) -> Report:
    """All parts of a folder as one report."""
    conditions = read_record(folder / "conditions.json", Conditions, "Run benchmarks/gpu/run.py.")
    results = {}
    for part in parts:
        result = read_part(folder, part)
        if result is not None:
            results[part] = result
    return Report(conditions=conditions, parts=results)


def read_part(folder: Path, part: str) -> PartResult | None:
    """A part's data file; None if there is none yet.

    Raises:
        HipaError: the file is not one of these.

    """
    path = folder / f"{part}.json"
    if not path.exists():
        return None
    return read_record(path, PartResult, f"Delete {path} to measure again.", max_bytes=MAX_BYTES)


def read_figures(path: Path) -> Report:
    """A data file of docs/latency.

    Raises:
        HipaError: the file cannot be read, or is not one of these.

    """
    remedy = "Expected a gpu-figures.json of benchmarks/gpu/run.py."
    return read_record(path, Report, remedy, max_bytes=MAX_BYTES)


class PartFile:
    """A part's data file while the part runs.

    Args:
        folder: of the data files.
        part: the part's name.
        deadline: when the part must end, as ``time.time`` counts.

    """

    def __init__(self, folder: Path, part: str, deadline: float) -> None:
        self.folder = folder
        self.part = part
        self.deadline = deadline
        self._started = time.time()
        before = read_part(folder, part)
        self._seconds_before = before.seconds if before else 0.0
        self.figures = {figure.name: figure for figure in before.figures} if before else {}
        self.facts = dict(before.facts) if before else {}
        self.left_out: dict[str, str] = {}

    @property
    def remaining(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.time()

    def plan(self, names: list[str]) -> None:
        """Name all cases: one that is never reached has the reason at once."""
        for name in names:
            if name not in self.figures:
                self.left_out[name] = NO_TIME
        self.save()

    def attempt(self, name: str, measure: Callable[[], Figure], *, least_seconds: float) -> None:
        """Measure one case, unless its figure is there or the time is too short.

        Whatever goes wrong is the reason why the case is left out; the next one runs.

        Args:
            name: of the case.
            measure: gives its figure.
            least_seconds: with less time than this the case is not begun.

        """
        if name in self.figures:
            return
        if self.remaining < least_seconds:
            self.left_out[name] = NO_TIME
        else:
            try:
                self.figures[name] = measure()
                self.left_out.pop(name, None)
            except Exception as error:  # the report is for errors that nobody foresaw
                self.left_out[name] = describe(error)
        self.save()

    def leave_out(self, name: str, reason: str) -> None:
        """Say why a case cannot be measured here."""
        self.left_out[name] = reason
        self.save()

    def save(self) -> None:
        """Write the file as it stands."""
        seconds = self._seconds_before + time.time() - self._started
        result = PartResult(
            part=self.part,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            seconds=round(seconds, 1),
            budget_seconds=round(self.deadline - self._started, 1),
            figures=tuple(self.figures.values()),
            left_out=self.left_out,
            facts=self.facts,
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        content = result.model_dump_json(indent=1) + "\n"
        write_file(self.folder / f"{self.part}.json", content.encode())

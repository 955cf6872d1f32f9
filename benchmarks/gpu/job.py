"""What every part is given, and how a call is timed: warm-up, queries, a watch on the GPU."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from benchmarks.gpu.figures import PartFile
from hipa_deploy.engines.backends.available import Device, describe_device
from hipa_deploy.engines.device.machine import usable_cores
from hipa_deploy.engines.latency.machine_state import Machine, Watch, others_warnings
from hipa_deploy.engines.latency.measure import drift_warnings, summarise
from hipa_deploy.engines.latency.report import LatencyStats
from hipa_deploy.engines.latency.validity import (
    LEAST_QUERIES,
    LEAST_SECONDS,
    Validity,
    judge,
)
from hipa_deploy.engines.tensorrt.gpu import find_gpu_address

TINY_NOTE = "cpu, tiny: checks the script and says nothing of a GPU"


@dataclass(frozen=True)
class Effort:
    """How long a figure is measured.

    Attributes:
        queries: at least so many.
        seconds: at least so long.
        warmup_seconds: before them, after the very first call.
        least_case: seconds without which a case is not begun.

    """

    queries: int
    seconds: float
    warmup_seconds: float
    least_case: float


# A little above the bounds: the sum of the queries is compared with them, not the wall clock.
FULL = Effort(LEAST_QUERIES, LEAST_SECONDS * 1.02, warmup_seconds=2.0, least_case=14.0)
TINY = Effort(queries=5, seconds=0.1, warmup_seconds=0.0, least_case=0.5)


@dataclass(frozen=True)
class Job:
    """The request of a part.

    Attributes:
        out: folder of the data files.
        work: folder of models and bundles; it may be deleted afterwards.
        device: 'cuda' or 'cpu'.
        tiny: a tiny model and a few queries, to check the script.
        file: the part's data file.

    """

    out: Path
    work: Path
    device: str
    tiny: bool
    file: PartFile

    @property
    def effort(self) -> Effort:
        """How long a figure is measured."""
        return TINY if self.tiny else FULL

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU computes."""
        return self.device != "cpu"

    @cached_property
    def machine(self) -> Device:
        """This machine, asked once."""
        return describe_device()

    def notes(self) -> list[str]:
        """What makes every figure of this job invalid."""
        return [TINY_NOTE] if self.tiny else []

    def synchronise(self) -> None:
        """Wait until the GPU has done all that it was given."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def release(self) -> None:
        """Give back the memory of what is no longer referred to, and forget its peak."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_mib(self) -> float | None:
        """The most device memory that PyTorch's tensors took since ``release``; None on a CPU."""
        return torch.cuda.max_memory_allocated() / 2**20 if self.on_gpu else None

    def time_call(self, call: Callable[[int], object]) -> tuple[LatencyStats, Validity]:
        """Time a call again and again.

        Args:
            call: takes the number of the query, so that each can have an input of its own.

        Returns:
            The statistics of a query, in milliseconds, and whether they count.

        """
        seconds = self._queries(call)
        first = next(seconds)
        warm_up_ends = time.monotonic() + self.effort.warmup_seconds
        next(seconds)
        while time.monotonic() < warm_up_ends:
            next(seconds)

        measurement = Measurement(self)
        measurement.start()
        try:
            while not measurement.add(next(seconds)):
                pass
        except BaseException:
            measurement.abandon()
            raise
        return measurement.stop(first)

    def _queries(self, call: Callable[[int], object]) -> Iterator[float]:
        """Seconds of one query after the other, without end."""
        number = 0
        while True:
            self.synchronise()
            started = time.perf_counter()
            call(number)
            self.synchronise()
            yield time.perf_counter() - started
            number += 1


class Measurement:
    """The queries of one figure, with the machine's state before, during and after them.

    Args:
        job: of the figure; it says how many queries are enough.

    Example:
        >>> measurement = Measurement(job)
        >>> measurement.start()
        >>> while not measurement.add(seconds_of_a_query()):
        ...     pass
        >>> stats, validity = measurement.stop(first=None)

    """

    def __init__(self, job: Job) -> None:
        self._job = job
        gpu = job.machine.gpu
        self._machine = Machine(gpu_name=gpu.name if gpu else None, gpu_address=find_gpu_address())
        self._watch = Watch(self._machine if job.on_gpu else None)
        self._taken: list[float] = []
        self._total = 0.0

    @property
    def count(self) -> int:
        """Queries so far."""
        return len(self._taken)

    def start(self) -> None:
        """Begin, after the warm-up."""
        self._before = self._machine.read()
        self._watch.start()

    def add(self, seconds: float) -> bool:
        """Count a query. Returns whether there are enough, or the time has ended."""
        self._taken.append(seconds)
        self._total += seconds
        effort = self._job.effort
        enough = len(self._taken) >= effort.queries and self._total >= effort.seconds
        return enough or self._job.file.remaining < 0

    def abandon(self) -> None:
        """End without a result."""
        self._watch.stop()

    def stop(self, first: float | None) -> tuple[LatencyStats, Validity]:
        """End. Returns the statistics in milliseconds, and whether they count.

        Args:
            first: seconds of the very first query, which does not count; None if it is not known.

        """
        self._watch.stop()
        state = self._machine.state(self._before, self._machine.read())
        stats = summarise(self._taken, first)
        disturbances = [*self._job.notes(), *drift_warnings(stats.samples_ms)]
        if not self._job.on_gpu:
            disturbances += others_warnings(state, cores=usable_cores())
        readings = self._watch.readings if self._job.on_gpu else None
        return stats, judge(stats.samples_ms, readings=readings, disturbances=disturbances)

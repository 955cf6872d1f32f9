"""What a training costs: the time between the ends of its steps, summed over its sittings.

A sitting is one start of a training; a training that was stopped and resumed has several.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from hipa_deploy.disk.files import write_file
from hipa_deploy.errors import HipaError
from hipa_deploy.train import train_adaptor as adaptor_training
from hipa_deploy.train.distribution.terms import DistributionTerms
from hipa_deploy.train.loop.run import Run

FILE = "time.json"


@dataclass
class StepTime:
    """The time of the steps that were timed.

    Attributes:
        steps: How many steps were timed.
        wall: Their seconds.
        cpu: Their processor seconds, of all threads.

    """

    steps: int = 0
    wall: float = 0.0
    cpu: float = 0.0

    def __add__(self, other: StepTime) -> StepTime:
        return StepTime(self.steps + other.steps, self.wall + other.wall, self.cpu + other.cpu)


class TimedRun(Run):
    """A run that writes time.json beside its checkpoint and continues it when it is resumed.

    The first step of a sitting is not timed, since nothing marks its beginning. Work between steps
    (checkpoints, sample grids) is not timed either.

    Attributes:
        timed: The time of all steps up to now.
        last_step_end: Wall and processor seconds at the end of the last step; None before one.

    """

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self.timed = StepTime()
        self.last_step_end: tuple[float, float] | None = None

    def resume(self) -> None:
        super().resume()
        path = self.folder / FILE
        if self.step and path.exists():
            self.timed = StepTime(**json.loads(path.read_text(encoding="utf-8")))

    def take_step(self, loss: float) -> dict[str, float]:
        record = super().take_step(loss)
        wall = time.perf_counter()
        cpu = time.process_time()
        if self.last_step_end:
            last_wall, last_cpu = self.last_step_end
            self.timed += StepTime(1, wall - last_wall, cpu - last_cpu)
        self.last_step_end = (wall, cpu)
        return record

    def follow(self, rows: Tensor, distribution: DistributionTerms) -> dict[str, float]:
        values = super().follow(rows, distribution)
        # It comes after the step that it belongs to, and is part of that step's time.
        wall = time.perf_counter()
        cpu = time.process_time()
        if self.last_step_end:
            last_wall, last_cpu = self.last_step_end
            self.timed += StepTime(0, wall - last_wall, cpu - last_cpu)
        self.last_step_end = (wall, cpu)
        return values

    def save(self) -> None:
        super().save()
        write_file(self.folder / FILE, json.dumps(asdict(self.timed)).encode())
        # Saving is no part of the next step.
        self.last_step_end = (time.perf_counter(), time.process_time())


@contextmanager
def timed_training() -> Iterator[None]:
    """Inside the block ``train_adaptor`` uses a TimedRun."""
    original = adaptor_training.Run
    adaptor_training.Run = TimedRun  # type: ignore[misc]
    try:
        yield
    finally:
        adaptor_training.Run = original  # type: ignore[misc]


def spent_in(run_folder: Path) -> StepTime:
    """The time of all runs below a run folder.

    Raises:
        HipaError: No step was timed.

    """
    total = StepTime()
    for path in sorted(run_folder.rglob(FILE)):
        total += StepTime(**json.loads(path.read_text(encoding="utf-8")))
    if not total.steps:
        raise HipaError(
            f"{run_folder}: no step was timed. Expected a run of at least two steps in one sitting."
        )
    return total

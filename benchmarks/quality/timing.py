"""What a training costs: time between the ends of its steps, added up over its sittings."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hipa_deploy.errors import HipaError
from hipa_deploy.files import write_file
from hipa_deploy.train import train_adaptor as loop
from hipa_deploy.train.loop.run import Run

FILE = "time.json"


@dataclass
class StepTime:
    """``steps`` timed ones took ``wall`` seconds and ``cpu`` processor seconds (of all threads)."""

    steps: int = 0
    wall: float = 0.0
    cpu: float = 0.0

    def __add__(self, other: StepTime) -> StepTime:
        return StepTime(self.steps + other.steps, self.wall + other.wall, self.cpu + other.cpu)


class TimedRun(Run):
    """A run that writes time.json beside its checkpoint, and goes on from there when it is resumed.

    A sitting's first step is not timed (nothing marks its beginning), nor is what happens outside of steps.
    """

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self.spent = StepTime()
        self.marks: tuple[float, float] | None = None

    def resume(self) -> None:
        super().resume()
        path = self.folder / FILE
        if self.step and path.exists():
            self.spent = StepTime(**json.loads(path.read_text()))

    def take_step(self, loss: float) -> dict[str, float]:
        record = super().take_step(loss)
        now = time.perf_counter(), time.process_time()
        if self.marks:
            self.spent += StepTime(1, now[0] - self.marks[0], now[1] - self.marks[1])
        self.marks = now
        return record

    def save(self) -> None:
        super().save()
        write_file(self.folder / FILE, json.dumps(asdict(self.spent)).encode())
        self.marks = time.perf_counter(), time.process_time()  # saving is no step


@contextmanager
def timed_training() -> Iterator[None]:
    """Inside the block ``train_adaptor`` uses a TimedRun."""
    original, loop.Run = loop.Run, TimedRun  # type: ignore[misc]
    try:
        yield
    finally:
        loop.Run = original  # type: ignore[misc]


def spent_in(run_folder: Path) -> StepTime:
    """The time of every run below a run folder.

    Raises:
        HipaError: none was timed.

    """
    times = [StepTime(**json.loads(path.read_text())) for path in sorted(run_folder.rglob(FILE))]
    total = sum(times, StepTime())
    if not total.steps:
        raise HipaError(
            f"{run_folder}: no step was timed. Expected a run of at least two steps in one sitting."
        )
    return total

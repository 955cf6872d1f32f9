"""Which batch sizes a pipeline uses, and the proof that none of them changes an image.

A backend computes a batch of eight with other kernels than a batch of one, or cuts it into other
blocks. Floating-point sums in another order round otherwise, so an image could depend on how many
others share its batch, and on its place among them. Whether that happens is a property of the
graph, the backend, its version and the CPU or GPU: it is measured, where the pipeline runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from hipa_deploy.bundle.manifest import Axis

Job = TypeVar("Job")
Tensors = dict[str, np.ndarray]
Run = Callable[[Sequence[Job]], Tensors]
"""Runs one batch: tensors with an entry a job along the first axis."""

# A larger batch must save this share of the time an image takes. Less is within what a measurement
# of one run can tell, and a larger batch makes its first request wait longer.
LEAST_GAIN = 0.03
# Other programs disturb short runs. Long ones are timed once, or a start would take minutes.
_RUNS = 5
_SPENT = 0.3  # seconds


@dataclass(frozen=True)
class WarmUp:
    """What ``OneStepPipeline.warmup`` found.

    Attributes:
        seconds: that it took.
        sizes: batch sizes that are used from now on: an image of each is bit for bit what it is
            alone, and each is faster an image than the smaller ones.
        changing: sizes that are not used, because they change an image.
        slow: sizes that are not used, because they are no faster an image than smaller ones.
        milliseconds: that a batch of each size took.

    """

    seconds: float
    sizes: tuple[int, ...]
    changing: tuple[int, ...]
    slow: tuple[int, ...]
    milliseconds: dict[int, float]


def cut(jobs: Sequence[Job], sizes: Sequence[int]) -> Iterator[list[Job]]:
    """Cut jobs into batches of the given sizes, the largest first.

    Args:
        jobs: that may share a batch.
        sizes: jobs a batch, ascending, from 1.

    Example:
        >>> [len(batch) for batch in cut("abcdefg", (1, 2, 4))]
        [4, 2, 1]

    """
    first = 0
    while first < len(jobs):
        size = largest_fitting(len(jobs) - first, sizes)
        yield list(jobs[first : first + size])
        first += size


def largest_fitting(jobs: int, sizes: Sequence[int]) -> int:
    """The largest of ``sizes`` that is not above ``jobs``, at least the smallest."""
    return max([size for size in sizes if size <= jobs], default=sizes[0])


def sizes_to_try(batch: Axis, largest: int | None = None) -> list[int]:
    """Jobs a batch that are worth a trial: 1, powers of two, and the largest.

    Args:
        batch: the sizes that the bundle's stages take.
        largest: the most jobs that the caller wants in a batch; None is the bundle's largest.

    Example:
        >>> sizes_to_try(Axis(min=1, opt=4, max=6))
        [1, 2, 4, 6]

    """
    most = batch.max if largest is None else min(largest, batch.max)
    sizes = [1]
    while sizes[-1] * 2 < most:
        sizes.append(sizes[-1] * 2)
    return sizes if most == 1 else [*sizes, most]


def prove(run: Run[Job], jobs: Sequence[Job], sizes: Sequence[int]) -> WarmUp:
    """Find the sizes whose images are bit for bit those of a job alone, and that are worth it.

    Args:
        run: makes a batch; it is called two to six times a size, and once a job.
        jobs: different ones, as many as the largest size.
        sizes: jobs a batch to try, ascending, from 1.

    Raises:
        HipaError: as ``run`` does.

    """
    started = time.perf_counter()
    alone = [run([job]) for job in jobs[: sizes[-1]]]
    used: list[int] = []
    changing: list[int] = []
    slow: list[int] = []
    milliseconds: dict[int, float] = {}
    fastest = float("inf")  # milliseconds an image, of the sizes that are used
    for size in sizes:
        # The job that is first in one batch is last in the other: each place has two jobs in turn.
        batch = list(jobs[:size])
        # The first run of a size may compile kernels or capture a graph, so it is not timed.
        unchanged = _equal(run(batch[::-1]), alone[:size][::-1])
        made, milliseconds[size] = _fastest(run, batch)
        unchanged = unchanged and _equal(made, alone[:size])
        an_image = milliseconds[size] / size
        if not unchanged and size > 1:
            changing.append(size)
        elif used and an_image > fastest * (1 - LEAST_GAIN):
            slow.append(size)
        else:
            used.append(size)
            fastest = an_image
    return WarmUp(
        seconds=time.perf_counter() - started,
        sizes=tuple(used),
        changing=tuple(changing),
        slow=tuple(slow),
        milliseconds=milliseconds,
    )


def _fastest(run: Run[Job], batch: Sequence[Job]) -> tuple[Tensors, float]:
    """What a batch gives, and the milliseconds of the fastest of a few runs."""
    fastest = float("inf")
    spent = 0.0
    for _ in range(_RUNS):
        started = time.perf_counter()
        made = run(batch)
        took = time.perf_counter() - started
        fastest = min(fastest, took * 1000)
        spent += took
        if spent > _SPENT:
            break
    return made, fastest


def _equal(made: Tensors, alone: Sequence[Tensors]) -> bool:
    """Whether every tensor of a batch is, place by place, that of the job alone."""
    for place, expected in enumerate(alone):
        for name, tensor in made.items():
            # Bytes and not values: NaN is equal to itself here, and -0.0 is not 0.0.
            if tensor[place].tobytes() != expected[name][0].tobytes():
                return False
    return True

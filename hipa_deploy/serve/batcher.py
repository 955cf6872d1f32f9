"""Requests of many users, joined into batches: one thread a bundle, and a bounded queue.

An idle thread starts a batch at once. One that has just made a batch takes what waits, and if that
is less than a full batch it waits a few milliseconds: clients that have their answer ask again.

The images of a batch have one adaptor and one size. The adaptor that is loaded goes on for
``PATIENCE`` seconds while others wait, because a swap takes longer than a batch. In a crowd each
adaptor has such a turn after its swap, however long its images have waited.

After ``FAILURES`` batches in a row that failed, the thread makes an image for nobody, the one that
was made last. If that fails too, the backend is at fault and no request. Then it tries again every
``TRY_SECONDS``, and requests are still tried meanwhile.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from hipa_deploy.errors import HipaError, RequestError
from hipa_deploy.generate.jobs.batch_sizes import largest_fitting
from hipa_deploy.generate.jobs.finite import NotFiniteError
from hipa_deploy.generate.jobs.image_job import ImageJob, MadeImage
from hipa_deploy.generate.refine.refiner import Progress

PATIENCE = 1.0  # seconds
_RECENT = 0.2  # weight of the latest batch in the mean time of an image
MAX_RETRY_AFTER = 60  # seconds
FAILURES = 3
TRY_SECONDS = 10.0


class QueueFullError(Exception):
    """More images wait than the service accepts.

    Args:
        retry_after: whole seconds, about as long as what waits will take.

    """

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the queue is full; try again in {retry_after} s")
        self.retry_after = retry_after


class StoppingError(Exception):
    """The service is stopping and accepts nothing more."""


class BackendFailedError(HipaError):
    """A backend or an adaptor failed: out of memory, say. The request is not at fault.

    What is wrong with a request is a ``RequestError``. Little of it is found in a batch alone, such
    as weights of a prompt that cancel out in its context.
    """


class _UnwantedError(Exception):
    """Nobody waits for an image of the batch under way any more."""


class Engine(Protocol):
    """What makes the images: a ``OneStepPipeline``."""

    def sizes_for(self, job: ImageJob) -> tuple[int, ...]:
        """How many jobs like this one a batch may have, ascending."""

    def make(
        self,
        jobs: Sequence[ImageJob],
        timer: Callable[[str], AbstractContextManager[object]],
        progress: Progress,
    ) -> list[MadeImage]:
        """Make one batch; what ``progress`` raises between two steps ends it."""

    def swap_adaptor(self, adaptor: str | None) -> None:
        """Take another adaptor; None is the bundle's own."""


class Watch(Protocol):
    """Who counts what a batcher does: the metrics."""

    def stage(self, name: str) -> AbstractContextManager[object]:
        """A context in which a stage runs."""

    def batch(self, images: int, seconds: float) -> None:
        """A batch was made."""

    def waited(self, seconds: float) -> None:
        """An image waited so long in the queue."""

    def swapped(self, seconds: float) -> None:
        """An adaptor was swapped in."""


@dataclass(eq=False)
class Work:
    """The images of one request, and where they stand.

    Attributes:
        jobs: the images to make.
        adaptor: whose weights make them; None is the bundle's own.
        done: all images in order, or the error.
        queued: when they were queued, by ``time.perf_counter``.
        begun: when the first batch with one of them began; None before.
        ended: when the last one was made; None before.
        batches: size of the batch that each image was in.

    """

    jobs: Sequence[ImageJob]
    adaptor: str | None = None
    done: Future[list[MadeImage]] = field(default_factory=Future)
    queued: float = 0.0
    begun: float | None = None
    ended: float | None = None
    batches: list[int] = field(default_factory=list)
    _made: dict[int, MadeImage] = field(default_factory=dict)

    def take(self, place: int, image: MadeImage) -> None:
        """Keep one image; the last one ends the work."""
        self._made[place] = image
        if len(self._made) == len(self.jobs):
            self.ended = time.perf_counter()
            # Whoever asked may have gone away at any moment.
            with suppress(InvalidStateError):
                self.done.set_result([self._made[place] for place in range(len(self.jobs))])

    def fail(self, error: BaseException) -> None:
        """End the work with an error; one of the backend's becomes a ``BackendFailedError``."""
        if isinstance(error, HipaError) and not isinstance(error, NotFiniteError | RequestError):
            error = BackendFailedError(str(error))
        with suppress(InvalidStateError):
            self.done.set_exception(error)


@dataclass(frozen=True)
class _Item:
    """One image in the queue."""

    work: Work
    place: int

    @property
    def job(self) -> ImageJob:
        return self.work.jobs[self.place]


class Batcher:
    """A queue before one pipeline, and the thread that empties it.

    Args:
        engine: makes the images; nothing else may use it meanwhile.
        queue: images that may wait.
        wait: seconds that a busy batcher waits for company.
        watch: counts what is done.
        name: of the thread.
        told: is called with False when the backend makes no images any more, and with True when it
            does again.

    Example:
        >>> batcher = Batcher(pipe, queue=64, wait=0.004, watch=watch)
        >>> batcher.reserve(1)
        >>> work = Work(pipe.jobs([("a red apple", 3)]))
        >>> batcher.submit(work, reserved=1)
        >>> (image,) = work.done.result()

    """

    def __init__(
        self,
        engine: Engine,
        *,
        queue: int,
        wait: float,
        watch: Watch,
        name: str = "batches",
        told: Callable[[bool], object] = bool,
    ) -> None:
        self._engine = engine
        self._told = told
        self._most = queue
        self._wait = wait
        self._watch = watch
        self._changed = threading.Condition()
        self._items: deque[_Item] = deque()
        self._reserved = 0  # places of requests whose images are being read
        self._stopping = False
        self._adaptor: str | None = None
        self._turn_began = time.perf_counter()  # of the adaptor that is loaded
        self._an_image = 0.0  # seconds, the mean of the latest batches
        self._failures = 0  # batches that failed since one was made
        # The latest image that was made, and its adaptor; before there is one, one that failed.
        self._proven: tuple[ImageJob, str | None] | None = None
        self._next_try = 0.0  # by ``time.perf_counter``
        self._works = True
        self._thread = threading.Thread(target=self._loop, name=name, daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Images that wait, those that are being prepared included."""
        return len(self._items) + self._reserved

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def working(self) -> bool:
        """Whether the thread runs, and the backend makes images as far as is known."""
        return self._works and self.alive

    @property
    def free(self) -> int:
        """Images that can still wait."""
        return max(0, self._most - self.waiting)

    def retry_after(self) -> int:
        """Seconds after which to try again when the queue is full."""
        seconds = math.ceil(self.waiting * self._an_image)
        return min(max(1, seconds), MAX_RETRY_AFTER)

    def reserve(self, images: int) -> None:
        """Take places in the queue for images that are not ready yet.

        Raises:
            QueueFullError: there are not as many.
            StoppingError: the batcher was closed.

        """
        with self._changed:
            if self._stopping:
                raise StoppingError
            if self.waiting + images > self._most:
                raise QueueFullError(self.retry_after())
            self._reserved += images

    def release(self, images: int) -> None:
        """Give reserved places back."""
        with self._changed:
            self._reserved -= images

    def submit(self, work: Work, reserved: int) -> None:
        """Queue the images of a request on places that ``reserve`` gave.

        Args:
            work: what to make.
            reserved: places that it had; they are used up.

        """
        with self._changed:
            self._reserved -= reserved
            work.queued = time.perf_counter()
            self._items.extend(_Item(work, place) for place in range(len(work.jobs)))
            self._changed.notify_all()

    def cancel(self, work: Work) -> None:
        """Make no more images of a request.

        A batch under way in which nobody else has an image ends after its step. Otherwise the
        request's images are thrown away.
        """
        with self._changed:
            work.done.cancel()
            self._items = deque(item for item in self._items if item.work is not work)

    def close(self) -> None:
        """Accept nothing more, make what waits, and end the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join()

    def _loop(self) -> None:
        while True:
            batch = self._next_batch()
            if batch is None:
                return
            try:
                if batch:
                    self._make(batch)
            except Exception as error:  # a bug; the thread must live for the next request
                for item in batch:
                    item.work.fail(error)
            if self._failures >= FAILURES and time.perf_counter() >= self._next_try:
                self._next_try = time.perf_counter() + TRY_SECONDS
                self._note(works=self._makes_an_image())

    def _makes_an_image(self) -> bool:
        """Whether the backend makes an image that it has made before.

        With the adaptor that it had then: another one may be what is at fault.
        """
        assert self._proven is not None
        job, adaptor = self._proven
        try:
            if adaptor != self._adaptor:
                self._swap(adaptor)
            self._engine.make([job], _untimed, _go_on)
        except Exception:  # why is told to those whose requests failed
            return False
        return True

    def _note(self, *, works: bool) -> None:
        """Keep whether the backend works, and tell of a change."""
        if works:
            self._failures = 0
        if works != self._works:
            self._works = works
            self._told(works)

    def _next_batch(self) -> list[_Item] | None:
        """Wait for a batch and take it out of the queue.

        Returns:
            None: closed, and nothing waits. No items: nobody waits any more, or it is time to try
            whether the backend works again.

        """
        with self._changed:
            idle = not self._items
            while not self._items:
                if self._stopping:
                    return None
                if not self._changed.wait(self._seconds_to_try()):
                    return []
            batch = self._choose()
            # Not after idleness: the first request of a quiet service must not wait.
            if not idle:
                free = time.perf_counter()
                while batch and not self._is_full(batch) and not self._stopping:
                    left = self._wait - (time.perf_counter() - free)
                    if left <= 0 or not self._changed.wait(left):
                        break
                    batch = self._choose()
                batch = self._choose()
            # Whoever waited may have gone away meanwhile: then the next turn waits again.
            taken = set(map(id, batch))
            self._items = deque(item for item in self._items if id(item) not in taken)
            return batch

    def _seconds_to_try(self) -> float | None:
        """Seconds until the backend is tried again; None while it works."""
        if self._failures < FAILURES:
            return None
        return max(0.0, self._next_try - time.perf_counter())

    def _is_full(self, batch: list[_Item]) -> bool:
        return len(batch) >= self._engine.sizes_for(batch[0].job)[-1]

    def _choose(self) -> list[_Item]:
        """The images of the next batch: those that may share one with the first, oldest first."""
        if not self._items:
            return []
        first = self._items[0]
        # Not from its queueing alone: in a crowd each image has waited longer than PATIENCE, and
        # almost every batch would swap.
        overtaken = time.perf_counter() - max(first.work.queued, self._turn_began)
        if first.work.adaptor != self._adaptor and overtaken < PATIENCE:
            same = [item for item in self._items if item.work.adaptor == self._adaptor]
            first = same[0] if same else first
        key = (first.work.adaptor, first.job.company)
        sizes = self._engine.sizes_for(first.job)
        batch = []
        for item in self._items:
            if (item.work.adaptor, item.job.company) == key:
                batch.append(item)
                if len(batch) == sizes[-1]:
                    break
        return batch[: largest_fitting(len(batch), sizes)]

    def _make(self, batch: list[_Item]) -> None:
        begun = time.perf_counter()
        for item in batch:
            self._watch.waited(begun - item.work.queued)
            if item.work.begun is None:
                item.work.begun = begun
        adaptor = batch[0].work.adaptor
        if adaptor != self._adaptor:
            self._swap(adaptor)
        try:
            self._run(batch)
        except HipaError as error:
            if len(batch) == 1:
                batch[0].work.fail(error)
                return
            # One of them is at fault, and the others must not pay for it.
            for item in batch:
                self._run_alone(item)

    def _run_alone(self, item: _Item) -> None:
        try:
            self._run([item])
        except HipaError as error:
            item.work.fail(error)

    def _run(self, batch: list[_Item]) -> None:
        started = time.perf_counter()
        jobs = [item.job for item in batch]
        first = (jobs[0], batch[0].work.adaptor)
        try:
            made = self._engine.make(jobs, self._watch.stage, partial(_check_wanted, batch))
        except _UnwantedError:
            return
        except RequestError:  # says nothing of the backend
            raise
        except Exception:
            self._failures += 1
            self._proven = self._proven or first
            raise
        self._proven = first
        self._note(works=True)
        seconds = time.perf_counter() - started
        self._watch.batch(len(batch), seconds)
        an_image = seconds / len(batch)
        self._an_image += (an_image - self._an_image) * (_RECENT if self._an_image else 1)
        for item, image in zip(batch, made, strict=True):
            item.work.batches.append(len(batch))
            item.work.take(item.place, image)

    def _swap(self, adaptor: str | None) -> None:
        started = time.perf_counter()
        before = self._adaptor
        # After a bug nobody knows what is loaded: the next batch swaps again.
        self._adaptor = ""
        try:
            self._engine.swap_adaptor(adaptor)
        except HipaError:
            # What is loaded is as before. Another swap back to it could fail too, where the
            # bundle's files have changed, and nobody would get an image any more.
            self._adaptor = before
            raise
        self._adaptor = adaptor
        self._turn_began = time.perf_counter()
        self._watch.swapped(self._turn_began - started)


def _untimed(stage: str) -> AbstractContextManager[object]:
    """What no number is kept of."""
    return nullcontext()


def _go_on(done: int, total: int) -> None:
    """The progress of what nobody waits for."""


def _check_wanted(batch: Sequence[_Item], done: int, total: int) -> None:
    """Stop a batch of many steps that nobody waits for: whoever is behind it should not wait.

    Raises:
        _UnwantedError: every request of it was cancelled.

    """
    if all(item.work.done.cancelled() for item in batch):
        raise _UnwantedError

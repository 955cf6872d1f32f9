"""The queue and its thread, with an engine that waits until a test lets it go."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from queue import Queue

import numpy as np
import pytest

from hipa_deploy.errors import HipaError, RequestError
from hipa_deploy.generate.jobs.image_job import ImageJob, MadeImage
from hipa_deploy.serve import batcher as batcher_module
from hipa_deploy.serve.batcher import (
    BackendFailedError,
    Batcher,
    QueueFullError,
    StoppingError,
    Work,
)

WAIT = 5.0  # seconds, far more than anything here takes


class Gate:
    """An engine that notes its batches, and makes each when it is let go."""

    def __init__(self) -> None:
        self.batches: list[tuple[str | None, list[str]]] = []
        self.adaptor: str | None = None
        self.begun = threading.Semaphore(0)
        self.go = threading.Semaphore(0)
        self.bad: set[str] = set()

    def sizes_for(self, job: ImageJob) -> tuple[int, ...]:
        return (1, 2, 4) if job.latent_CHW[1] < 32 else (1,)

    def make(self, jobs: Sequence[ImageJob], timer, progress) -> list[MadeImage]:
        self.batches.append((self.adaptor, [job.prompt for job in jobs]))
        self.begun.release()
        assert self.go.acquire(timeout=WAIT)
        if self.bad & {job.prompt for job in jobs}:
            raise HipaError("one of them is bad")
        return [MadeImage(job, np.zeros((1, 1, 3), np.uint8), {}) for job in jobs]

    def swap_adaptor(self, adaptor: str | None) -> None:
        if adaptor == "broken":
            raise HipaError("this adaptor is broken")
        self.adaptor = adaptor

    def let_go(self, batches: int = 1) -> None:
        for _ in range(batches):
            self.go.release()

    def wait_for_batch(self) -> None:
        assert self.begun.acquire(timeout=WAIT)


class Watch:
    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        yield

    def batch(self, images: int, seconds: float) -> None: ...
    def waited(self, seconds: float) -> None: ...
    def swapped(self, seconds: float) -> None: ...


def job(prompt: str, size: int = 8) -> ImageJob:
    return ImageJob(prompt, 0, None, (4, size, size))


@pytest.fixture
def engine() -> Gate:
    return Gate()


@pytest.fixture
def batcher(engine: Gate) -> Iterator[Batcher]:
    made = Batcher(engine, queue=8, wait=0.0, watch=Watch())
    yield made
    engine.let_go(100)
    made.close()
    assert not made.alive


def submit(batcher: Batcher, *prompts: str, adaptor: str | None = None, size: int = 8) -> Work:
    work = Work([job(prompt, size) for prompt in prompts], adaptor)
    batcher.reserve(len(prompts))
    batcher.submit(work, len(prompts))
    return work


def prompts(engine: Gate) -> list[str]:
    return ["".join(batch) for _, batch in engine.batches]


def test_requests_that_wait_share_batches(engine: Gate, batcher: Batcher) -> None:
    first = submit(batcher, "a")
    engine.wait_for_batch()
    works = [submit(batcher, *letters) for letters in ("b", "cd", "efg", "h")]
    assert batcher.waiting == 7
    engine.let_go(10)
    for work in (first, *works):
        assert [image.job for image in work.done.result(WAIT)] == work.jobs
    # An idle service starts at once; then sizes of 4, 2 and 1 are used, and no others.
    assert prompts(engine) == ["a", "bcde", "fg", "h"]
    assert works[2].batches == [4, 2, 2]


def test_other_sizes_do_not_share(engine: Gate, batcher: Batcher) -> None:
    submit(batcher, "a")
    engine.wait_for_batch()
    works = [
        submit(batcher, "b"),
        submit(batcher, "x", size=16),
        submit(batcher, "c"),
    ]
    works += [submit(batcher, "y", size=32), submit(batcher, "z", size=32)]
    engine.let_go(10)
    for work in works:
        work.done.result(WAIT)
    assert prompts(engine) == ["a", "bc", "x", "y", "z"]


def test_a_busy_batcher_waits_for_company(engine: Gate) -> None:
    batcher = Batcher(engine, queue=8, wait=1.0, watch=Watch())
    started = time.perf_counter()
    submit(batcher, "a")
    engine.wait_for_batch()
    assert time.perf_counter() - started < 0.9, "an idle one must not wait"
    submit(batcher, "b")
    engine.let_go()
    time.sleep(0.05)
    last = submit(batcher, "c", "d", "e")
    engine.let_go(10)
    last.done.result(WAIT)
    assert time.perf_counter() - started < 0.9, "a full batch must not wait"
    assert prompts(engine) == ["a", "bcde"]
    batcher.close()


def test_a_full_queue_refuses_and_says_when(engine: Gate, batcher: Batcher) -> None:
    submit(batcher, "a")
    engine.wait_for_batch()
    assert batcher.free == 8
    works = [submit(batcher, *"bcdefgh"), submit(batcher, "i")]
    assert batcher.free == 0
    with pytest.raises(QueueFullError) as caught:
        submit(batcher, "j")
    assert 1 <= caught.value.retry_after <= 60
    batcher.cancel(works[1])
    batcher.reserve(1)
    with pytest.raises(QueueFullError):
        batcher.reserve(1)
    batcher.release(1)
    assert batcher.waiting == 7


def test_what_is_cancelled_is_not_made(engine: Gate, batcher: Batcher) -> None:
    running = submit(batcher, "a")
    engine.wait_for_batch()
    waiting = submit(batcher, "b", "c")
    last = submit(batcher, "d")
    batcher.cancel(waiting)
    batcher.cancel(running)  # too late to save its batch
    engine.let_go(10)
    last.done.result(WAIT)
    assert prompts(engine) == ["a", "d"]
    assert running.done.cancelled()


class Steps(Gate):
    """An engine whose batches have three steps; each step of each is let go."""

    def make(self, jobs: Sequence[ImageJob], timer, progress) -> list[MadeImage]:
        self.batches.append((self.adaptor, [job.prompt for job in jobs]))
        for step in range(3):
            progress(step, 3)
            self.begun.release()
            assert self.go.acquire(timeout=WAIT)
        progress(3, 3)
        self.batches.append((self.adaptor, ["."]))
        return [MadeImage(job, np.zeros((1, 1, 3), np.uint8), {}) for job in jobs]


def test_a_batch_of_many_steps_ends_when_nobody_waits_for_it() -> None:
    engine = Steps()
    batcher = Batcher(engine, queue=8, wait=0.0, watch=Watch())
    gone = submit(batcher, "a", "b", size=32)  # batches of one image
    engine.wait_for_batch()
    last = submit(batcher, "c")
    batcher.cancel(gone)
    engine.let_go(4)
    last.done.result(WAIT)
    batcher.close()
    # The first step was under way, the other two were not made.
    assert prompts(engine) == ["a", "c", "."]
    assert gone.done.cancelled()


def test_a_batch_of_many_steps_goes_on_for_whoever_still_waits() -> None:
    engine = Steps()
    batcher = Batcher(engine, queue=8, wait=0.0, watch=Watch())
    submit(batcher, "a")
    engine.wait_for_batch()
    gone, stays = submit(batcher, "b"), submit(batcher, "c")
    engine.let_go(3)
    for _ in range(3):
        engine.wait_for_batch()
    batcher.cancel(gone)
    closing = threading.Thread(target=batcher.close)
    closing.start()
    engine.let_go(3)
    closing.join(WAIT)
    assert prompts(engine) == ["a", ".", "bc", "."]
    assert stays.done.result(0)


def test_the_only_one_that_waits_goes_away(engine: Gate) -> None:
    batcher = Batcher(engine, queue=8, wait=0.2, watch=Watch())
    submit(batcher, "a")
    engine.wait_for_batch()
    gone = submit(batcher, "b")
    engine.let_go(10)
    time.sleep(0.05)
    batcher.cancel(gone)
    time.sleep(0.3)
    submit(batcher, "c").done.result(WAIT)
    assert prompts(engine) == ["a", "c"]
    batcher.close()


def test_adaptors_do_not_mix_and_nobody_waits_for_ever(
    engine: Gate, batcher: Batcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit(batcher, "a")
    engine.wait_for_batch()
    works = [
        submit(batcher, "b", adaptor="night"),
        submit(batcher, "c"),
        submit(batcher, "d", adaptor="night"),
    ]
    engine.let_go(2)
    works[1].done.result(WAIT)
    # The adaptor that is loaded goes first, while the others have not waited long.
    assert engine.batches == [(None, ["a"]), (None, ["c"]), *engine.batches[2:]]
    engine.let_go(1)
    works[2].done.result(WAIT)
    assert engine.batches[2:] == [("night", ["b", "d"])]

    monkeypatch.setattr(batcher_module, "PATIENCE", 0.0)
    submit(batcher, "e")
    for _ in ("c", "bd", "e"):
        engine.wait_for_batch()
    last = [submit(batcher, "f", adaptor="night"), submit(batcher, "g")]
    engine.let_go(10)
    for work in last:
        work.done.result(WAIT)
    assert engine.batches[3:] == [(None, ["e"]), ("night", ["f"]), (None, ["g"])]


class Clock:
    """A clock that a test sets; it stands in for the module ``time``."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


def test_in_a_crowd_each_adaptor_has_its_turn(
    engine: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All have waited longer than the patience: still not every batch swaps."""
    clock = Clock()
    monkeypatch.setattr(batcher_module, "time", clock)
    batcher = Batcher(engine, queue=16, wait=0.0, watch=Watch())
    # Images of this size have batches of their own.
    submit(batcher, "a", size=32)
    engine.wait_for_batch()
    works = []
    for dark, plain in ("bc", "de", "fg", "hi"):
        works.append(submit(batcher, dark, adaptor="night", size=32))
        works.append(submit(batcher, plain, size=32))
    clock.now += 10 * batcher_module.PATIENCE
    for _ in works:
        engine.let_go()
        engine.wait_for_batch()
        clock.now += 0.4 * batcher_module.PATIENCE
    engine.let_go()
    batcher.close()
    # Batches of 0.4 turns: a turn has three, and the one that has waited longest comes next.
    assert prompts(engine) == ["a", "b", "d", "f", "c", "e", "g", "h", "i"]


def test_an_error_hits_only_whose_fault_it_is(engine: Gate, batcher: Batcher) -> None:
    engine.bad = {"c"}
    submit(batcher, "a")
    engine.wait_for_batch()
    works = [submit(batcher, letter) for letter in "bcde"]
    engine.let_go(10)
    for work in (works[0], works[2], works[3]):
        work.done.result(WAIT)
    with pytest.raises(BackendFailedError, match="bad"):
        works[1].done.result(WAIT)


def test_a_request_at_fault_says_nothing_of_the_backend(
    engine: Gate, watched: tuple[Batcher, Queue[bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of some prompts it is found in the batch alone, as where their weights cancel out."""
    batcher, told = watched
    submit(batcher, "a").done.result(WAIT)

    def refuse(*_: object) -> list[MadeImage]:
        raise RequestError("the weights cancel out", argument="prompt")

    with monkeypatch.context() as changed:
        changed.setattr(engine, "make", refuse)
        for _ in range(batcher_module.FAILURES):
            with pytest.raises(RequestError, match="cancel out"):
                submit(batcher, "b").done.result(WAIT)
    submit(batcher, "c").done.result(WAIT)
    # No image was made for nobody, to try the backend.
    assert prompts(engine) == ["a", "c"]
    assert told.empty()


def test_an_adaptor_that_does_not_load(engine: Gate, batcher: Batcher) -> None:
    engine.let_go(10)
    with pytest.raises(BackendFailedError, match="broken"):
        submit(batcher, "a", adaptor="broken").done.result(WAIT)
    submit(batcher, "b").done.result(WAIT)
    assert engine.batches == [(None, ["b"])]


def test_a_bug_ends_its_requests_and_not_the_thread(engine: Gate, batcher: Batcher) -> None:
    engine.make = lambda *_: 1 / 0  # type: ignore[assignment,method-assign]
    with pytest.raises(ZeroDivisionError):
        submit(batcher, "a").done.result(WAIT)
    assert batcher.alive


@pytest.fixture
def watched(engine: Gate, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Batcher, Queue[bool]]]:
    """A batcher that tries a failing backend again at once, and what it told."""
    monkeypatch.setattr(batcher_module, "TRY_SECONDS", 0.01)
    told: Queue[bool] = Queue()
    engine.let_go(10_000)
    made = Batcher(engine, queue=8, wait=0.0, watch=Watch(), told=told.put)
    yield made, told
    made.close()


def fail(batcher: Batcher, prompt: str) -> None:
    with pytest.raises(BackendFailedError, match="bad"):
        submit(batcher, prompt).done.result(WAIT)


def test_a_backend_that_makes_nothing_any_more_is_tried_until_it_does(
    engine: Gate, watched: tuple[Batcher, Queue[bool]]
) -> None:
    batcher, told = watched
    submit(batcher, "a").done.result(WAIT)
    engine.bad = {"a", "b", "c"}
    for prompt in "bc":
        fail(batcher, prompt)
    assert batcher.working
    fail(batcher, "b")
    assert told.get(timeout=WAIT) is False
    assert not batcher.working
    assert batcher.alive
    # Nobody asks, and the image that was made last is tried, again and again.
    while prompts(engine)[-2:] != ["a", "a"]:
        time.sleep(0.01)
    engine.bad = set()
    assert told.get(timeout=WAIT) is True
    assert batcher.working
    assert told.empty()


def test_a_request_that_is_made_shows_that_the_backend_works_again(
    engine: Gate, watched: tuple[Batcher, Queue[bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    batcher, told = watched
    monkeypatch.setattr(batcher_module, "TRY_SECONDS", 1000.0)
    # None was made before: then the first that failed is tried.
    engine.bad = {"b"}
    for _ in range(3):
        fail(batcher, "b")
    assert told.get(timeout=WAIT) is False
    assert prompts(engine) == ["b"] * 4
    submit(batcher, "d").done.result(WAIT)
    assert told.get(timeout=WAIT) is True
    assert batcher.working


def test_requests_that_fail_alone_do_not_make_a_backend_fail(
    engine: Gate, watched: tuple[Batcher, Queue[bool]]
) -> None:
    """Three that are too large, say: the image in between works, and so nobody is kept away."""
    batcher, told = watched
    submit(batcher, "a").done.result(WAIT)
    engine.bad = {"b"}
    for _ in range(7):
        fail(batcher, "b")
    submit(batcher, "c").done.result(WAIT)
    assert prompts(engine)[:5] == list("abbba")
    assert batcher.working
    assert told.empty()


def test_an_adaptor_at_fault_is_not_the_backends(
    engine: Gate, watched: tuple[Batcher, Queue[bool]]
) -> None:
    batcher, told = watched
    submit(batcher, "a").done.result(WAIT)
    engine.bad = {"b"}
    for _ in range(3):
        with pytest.raises(BackendFailedError, match="bad"):
            submit(batcher, "b", adaptor="huge").done.result(WAIT)
    submit(batcher, "c").done.result(WAIT)
    expected = [(None, ["a"]), *[("huge", ["b"])] * 3, (None, ["a"]), (None, ["c"])]
    assert engine.batches == expected
    assert told.empty()


def test_a_bug_of_each_request_is_a_failure_too(
    engine: Gate, watched: tuple[Batcher, Queue[bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    batcher, told = watched
    monkeypatch.setattr(engine, "make", lambda *_: 1 / 0)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            submit(batcher, "a").done.result(WAIT)
    assert told.get(timeout=WAIT) is False


def test_closing_makes_what_waits_and_accepts_nothing(engine: Gate) -> None:
    batcher = Batcher(engine, queue=8, wait=0.0, watch=Watch())
    first = submit(batcher, "a")
    engine.wait_for_batch()
    second = submit(batcher, "b")
    closing = threading.Thread(target=batcher.close)
    closing.start()
    time.sleep(0.05)
    with pytest.raises(StoppingError):
        batcher.reserve(1)
    engine.let_go(2)
    closing.join(WAIT)
    assert first.done.result(0)
    assert second.done.result(0)


def test_a_swap_that_fails_leaves_the_model_that_is_loaded(engine: Gate, batcher: Batcher) -> None:
    """It is as before: no swap back, which fails too where the bundle's files have changed."""
    engine.let_go(10)
    submit(batcher, "a", adaptor="good").done.result(WAIT)
    with pytest.raises(BackendFailedError, match="broken"):
        submit(batcher, "b", adaptor="broken").done.result(WAIT)

    def no_swap(adaptor: str | None) -> None:
        raise HipaError("the bundle has moved")

    engine.swap_adaptor = no_swap  # type: ignore[method-assign]
    submit(batcher, "c", adaptor="good").done.result(WAIT)
    assert engine.batches == [("good", ["a"]), ("good", ["c"])]

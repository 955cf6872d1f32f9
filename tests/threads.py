"""Run something in several threads at once."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

THREADS = 8
Result = TypeVar("Result")


@contextmanager
def frequent_switches() -> Iterator[None]:
    """Let Python change threads every microsecond, so that what can go wrong does."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(usual)


def in_threads(call: Callable[[int], Result], threads: int = THREADS) -> list[Result]:
    """Return the results of ``call(0)`` to ``call(threads - 1)``, which start together.

    The first exception of one of them is raised here.
    """
    start = threading.Barrier(threads)

    def begin(number: int) -> Result:
        start.wait()
        return call(number)

    with frequent_switches(), ThreadPoolExecutor(threads) as pool:
        return list(pool.map(begin, range(threads)))

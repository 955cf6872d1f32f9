"""Ctrl-C and SIGTERM between two steps, never inside one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def interruptible(patient: bool = False) -> Iterator[threading.Event]:
    """Turn the first Ctrl-C or SIGTERM into an event, so that a step is never cut in half; the second one ends at once.

    When ``patient`` it does not: a launcher sends its processes on what the terminal has sent them already.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(*_: Any) -> None:
        stop.set()
        if not patient:
            restore()

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        restore()

"""Ctrl-C and SIGTERM stop a training between two steps, never inside one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def interruptible(under_launcher: bool = False) -> Iterator[threading.Event]:
    """Turn the first Ctrl-C or SIGTERM into an event, so that no step is cut in half.

    Outside the main thread, where Python allows no signal handlers, the event is never set.

    Args:
        under_launcher: If False, the second signal takes its usual effect at once. If True, later
            signals set the event too: a launcher passes on to its processes the Ctrl-C that the
            terminal has already sent them, so that a second signal does not mean a second request.

    Example:
        >>> with interruptible() as stop:
        ...     while not stop.is_set():
        ...         take_a_step()

    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(*_: Any) -> None:
        stop.set()
        if not under_launcher:
            restore()

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        restore()

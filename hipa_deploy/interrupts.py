"""Ctrl-C and SIGTERM end a command in order, and a child process ends with its parent."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

STOPPING = (signal.SIGINT, signal.SIGTERM)
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM asked a command to stop. What cleans up after Ctrl-C does so after both.

    It is a class of its own, because CPython keeps in mind that a plain KeyboardInterrupt has ended
    the ``exec`` of a text, as dataclasses use it. However that is handled, the process then ends
    by SIGINT in place of its exit code (``unhandled_keyboard_interrupt`` in Python/pythonrun.c).
    """


class Interruption:
    """Which signal interrupted a command, if any did.

    Libraries lose KeyboardInterrupt. Python itself turns one that is raised while a class is made
    into a RuntimeError, modules in C++ into an ImportError, and in a destructor it vanishes. So
    the handler remembers the signal, and how a command ended is asked here and not of its
    exception.
    """

    number: int | None = None


_current: Interruption | None = None


@contextmanager
def signals_interrupt() -> Iterator[Interruption]:
    """Let Ctrl-C and SIGTERM raise ``Interrupted`` within the block, and remember the first.

    A signal that is ignored stays ignored. Outside the main thread, where Python allows no signal
    handlers, the block changes nothing.

    Example:
        >>> with signals_interrupt() as interruption:
        ...     work()
        >>> interruption.number is None
        True

    """
    global _current
    interruption = Interruption()
    if not _in_main_thread():
        yield interruption
        return

    def handle(number: int, _: Any) -> None:
        if interruption.number is None:
            interruption.number = number
        raise Interrupted

    previous = {}
    for number in STOPPING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            previous[int(number)] = signal.signal(number, handle)
    outer = _current
    _current = interruption
    try:
        yield interruption
    finally:
        _current = outer
        _restore(previous)


def interrupting_signal() -> int | None:
    """The number of the signal that has interrupted this command; None if none has."""
    return None if _current is None else _current.number


def raise_interruption() -> None:
    """Raise ``Interrupted`` again if this command was interrupted, and something lost it.

    What reports errors of libraries calls this first, and what puts a result in its place.
    """
    if interrupting_signal() is not None:
        raise Interrupted


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM back until the end of the block, as for the removal of files.

    Outside the main thread the block changes nothing: signals never interrupt such a thread.
    """
    if not _in_main_thread():
        yield
        return
    arrived: list[int] = []
    previous = _set_handlers(lambda number, _: arrived.append(number))
    try:
        yield
    finally:
        _restore(previous)
        if arrived:
            signal.raise_signal(arrived[0])


@contextmanager
def keeping_handlers() -> Iterator[None]:
    """Take back the handlers of Ctrl-C and SIGTERM that a library sets within the block.

    Ray's handler of SIGTERM ends the process with exit code 15, so that an orderly stop looks like
    an error. Outside the main thread the block changes nothing: no library can set one there.
    """
    if not _in_main_thread():
        yield
        return
    previous = {}
    for number in STOPPING:
        previous[int(number)] = signal.getsignal(number)
    try:
        yield
    finally:
        _restore(previous)


class StopRequest(threading.Event):
    """Is set when a signal asks for a stop; ``number`` is that signal's."""

    number: int = signal.SIGINT


@contextmanager
def interruptible(under_launcher: bool = False) -> Iterator[StopRequest]:
    """Turn the first Ctrl-C or SIGTERM into an event, so that no training step is cut in half.

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
    stop = StopRequest()
    if not _in_main_thread():
        yield stop
        return

    def handle(number: int, _: Any) -> None:
        if not stop.is_set():
            stop.number = number
        stop.set()
        if not under_launcher:
            _restore(previous)

    previous = _set_handlers(handle)
    try:
        yield stop
    finally:
        _restore(previous)


def die_with_parent() -> None:
    """Let this process end when its parent does, even if SIGKILL ends the parent.

    The standard input must be a pipe that the parent holds open and writes nothing more into: the
    system closes it when the parent ends. Linux also sends a signal, which ends a process inside a
    native call that lets no other Python thread run.
    """
    if sys.platform == "linux":
        # A system without prctl still has the pipe.
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    threading.Thread(target=_wait_for_end_of_input, daemon=True).start()


def _wait_for_end_of_input() -> None:
    # os.read and not sys.stdin: a thread that waits in sys.stdin holds a lock, with which the
    # interpreter cannot shut down.
    while os.read(0, 4096):
        pass
    os._exit(1)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _set_handlers(handler: Any) -> dict[int, Any]:
    """Set the handler of both signals, and return those that they had."""
    previous = {}
    for number in STOPPING:
        previous[int(number)] = signal.signal(number, handler)
    return previous


def _restore(handlers: dict[int, Any]) -> None:
    for number, handler in handlers.items():
        # None stands for a handler that was not set from Python, which cannot be set again.
        signal.signal(number, signal.SIG_DFL if handler is None else handler)

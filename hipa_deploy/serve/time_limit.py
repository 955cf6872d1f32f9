"""A time limit for a part of a coroutine, without a task of its own."""

from __future__ import annotations

import asyncio
import sys
from types import TracebackType


class LateError(Exception):
    """The time is over."""


class TimeLimit:
    """Ends what runs in its block after some seconds.

    ``asyncio.wait_for`` makes a task each time, also where nothing has to be waited for: three of
    them are a tenth of what a request costs on top of its image. Python 3.11's ``asyncio.timeout``
    does what this class does.

    Args:
        seconds: 0 or less ends the block at its first wait.

    Raises:
        LateError: at the end of the block, if it was ended.

    Example:
        >>> with TimeLimit(30):
        ...     message = await receive()

    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._late = False

    def __enter__(self) -> TimeLimit:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        # Cancellations that others asked for before are not ours to take back.
        self._timer = asyncio.get_running_loop().call_later(max(0, self._seconds), self._end)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._timer.cancel()
        if not self._late:
            return
        others = 0
        if sys.version_info >= (3, 11):
            others = self._task.uncancel()
        if kind is asyncio.CancelledError and not others:
            raise LateError from None

    def _end(self) -> None:
        self._late = True
        self._task.cancel()

"""Waiting for an order's files, as long as somebody wants them and there is time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

_LISTEN_AFTER = 0.004  # seconds; a small model's images are on their way by then


class FileWait:
    """Ends when files are made, when whoever wants them has gone away, or when time is over.

    One future for all three. ``asyncio.wait`` on one for each goes through the event loop twice
    more, and a task that listens for the client would begin where the batch's thread wants
    Python's lock: together a tenth of what a request costs on top of its image.

    Args:
        files: another thread makes them.
        gone: returns when whoever asked has gone away.
        seconds: that are left.

    Attributes:
        ended: done when the wait is over.

    """

    def __init__(
        self, files: Future[Any], gone: Callable[[], Awaitable[None]], seconds: float
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._gone = gone
        self._leaving: asyncio.Future[None] | None = None
        self.ended: asyncio.Future[None] = self._loop.create_future()
        self._limit = self._loop.call_later(seconds, self._end)
        self._listening = self._loop.call_later(_LISTEN_AFTER, self._listen)
        files.add_done_callback(self._end_from_thread)

    @property
    def has_left(self) -> bool:
        """Whether whoever asked has gone away."""
        return self._leaving is not None and self._leaving.done()

    def close(self) -> None:
        """Stop waiting."""
        self._limit.cancel()
        self._listening.cancel()
        if self._leaving is not None:
            self._leaving.cancel()

    def _listen(self) -> None:
        self._leaving = asyncio.ensure_future(self._gone())
        self._leaving.add_done_callback(self._end)

    def _end(self, _: object = None) -> None:
        if not self.ended.done():
            self.ended.set_result(None)

    def _end_from_thread(self, _: object) -> None:
        # Where the service has ended meanwhile, nobody waits.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._end)

"""Requests that came in, and have no place in a queue yet."""

from __future__ import annotations

from collections.abc import Callable


class Arrivals:
    """Counts the requests for images between the socket and the queue.

    Between the two a request is parsed and checked. A crowd that comes at once is there before the
    first of it reaches the queue, so the length of the queue alone would let all of it in.

    Args:
        full: takes the number of requests on their way to a queue. Gives seconds after which to
            try again, or None where another image can wait.

    Example:
        >>> arrivals = Arrivals(service.full)
        >>> if arrivals.refused_for() is None:
        ...     place = arrivals.enter()

    """

    def __init__(self, full: Callable[[int], int | None] = lambda arriving: None) -> None:
        self._full = full
        self._on_their_way: set[object] = set()

    def refused_for(self) -> int | None:
        """Seconds after which the next request should try again; None: it can come in."""
        return self._full(len(self._on_their_way))

    def enter(self) -> object:
        """Count a request; the result is for ``leave``."""
        place = object()
        self._on_their_way.add(place)
        return place

    def leave(self, place: object | None) -> None:
        """Count a request no more: the queue knows of it, or it was answered. Twice does no harm.

        Args:
            place: what ``enter`` gave; None does nothing.

        """
        self._on_their_way.discard(place)

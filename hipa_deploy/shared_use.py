"""Many calls at once, or one change alone: what several threads do to one loaded pipeline."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from hipa_deploy.errors import HipaError


class SharedUse:
    """A lock that any number of calls hold together, and that a change holds alone.

    A change that waits goes before calls that come later. Otherwise calls without a pause, from
    several threads, would keep it waiting for ever.

    Example:
        >>> use = SharedUse()
        >>> with use.shared():
        ...     images = run(stages)
        >>> with use.alone():
        ...     stages = changed(stages)

    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._calls: dict[int, int] = {}  # calls under way, by thread
        self._change_wanted = False
        self._one_change = threading.Lock()

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Hold the lock together with other calls; waits for a change that is under way."""
        me = threading.get_ident()
        with self._condition:
            # A call within a call goes on: the change waits for the outer one.
            self._condition.wait_for(lambda: me in self._calls or not self._change_wanted)
            self._calls[me] = self._calls.get(me, 0) + 1
        try:
            yield
        finally:
            with self._condition:
                self._calls[me] -= 1
                if not self._calls[me]:
                    del self._calls[me]
                self._condition.notify_all()

    def check_outside(self) -> None:
        """Check that this thread may wait for ``alone``, or for another thread that does.

        Raises:
            HipaError: this thread is inside a call, for whose end both would wait for ever.

        """
        if threading.get_ident() in self._calls:
            raise HipaError(
                "the pipeline was changed or closed from inside one of its own calls. "
                "Do that after the call."
            )

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the lock alone; waits until every call that is under way has ended.

        Raises:
            HipaError: this thread is inside a call, for whose end it would wait for ever.

        """
        self.check_outside()
        with self._one_change:
            self._change_wanted = True  # calls that come now wait
            try:
                with self._condition:
                    self._condition.wait_for(lambda: not self._calls)
                yield
            finally:
                with self._condition:
                    self._change_wanted = False
                    self._condition.notify_all()

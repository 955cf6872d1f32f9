"""Pillow's warnings are left out while an image of a user is read, in any number of threads."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


class _Quiet:
    """Filters that are there from the first reader's start to the last one's end.

    ``warnings.catch_warnings`` of each reader alone would not do. It changes the filters of the
    whole process and brings back those that it found: of two threads, the second brings back the
    filters of the first, and they stay for ever.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._readers = 0
        self._filters = warnings.catch_warnings()

    def begin(self) -> None:
        with self._lock:
            if self._readers == 0:
                self._filters = warnings.catch_warnings()
                self._filters.__enter__()
                _ignore()
            self._readers += 1

    def end(self) -> None:
        with self._lock:
            self._readers -= 1
            if self._readers == 0:
                self._filters.__exit__(None, None, None)


_QUIET = _Quiet()


def _ignore() -> None:
    from PIL import Image

    # Of large photos: readers have limits of their own.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    # Of details in damaged files, which Pillow leaves out.
    warnings.filterwarnings("ignore", module="PIL")


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """Leave Pillow's own warnings out in this block.

    Example:
        >>> with quiet_pillow(), Image.open("photo.jpg") as image:
        ...     image.load()

    """
    # An option of Python 3.14: each thread has filters of its own.
    if getattr(sys.flags, "context_aware_warnings", False):
        with warnings.catch_warnings():
            _ignore()
            yield
        return
    _QUIET.begin()
    try:
        yield
    finally:
        _QUIET.end()

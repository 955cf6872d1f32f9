"""Pillow's words about the images of users: its warnings are left out, in any number of threads.

Its limit on pixels is said as ours.
"""

from __future__ import annotations

import re
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 1 << 27  # 134 megapixels; more than any camera but a few medium formats has


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


def bomb_in_words(error: Image.DecompressionBombError) -> str:
    """What to say of an image that Pillow does not open, since it has more than 179 megapixels."""
    # Pillow tells the number of pixels, but neither width nor height.
    number = re.search(r"[0-9]+(?= pixels)", str(error))
    count = number[0] if number else "too many"
    return (
        f"the image has {count} pixels. Expected 1 to {MAX_PIXELS} pixels in all. Make it smaller."
    )

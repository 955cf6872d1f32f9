"""How often something was begun and not finished, in files that all machines of a cluster share.

A process that is killed can say nothing. What it has begun stands in its file.
"""

from __future__ import annotations

from pathlib import Path

MOST = 3  # as an order of the service that kills its replica


class Tries:
    """A count a name, in a folder.

    Args:
        folder: that exists, on a disk that all machines share.

    Example:
        >>> tries = Tries(out / ".tries")
        >>> tries.begin("shard-0")
        0
        >>> tries.end("shard-0")

    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def begin(self, name: str) -> int:
        """Count one more try, and return how many there were before."""
        with (self._folder / name).open("ab") as file:
            before = file.tell()
            file.write(b"x")
        return before

    def end(self, name: str) -> None:
        """Forget the tries of what was finished."""
        (self._folder / name).unlink(missing_ok=True)

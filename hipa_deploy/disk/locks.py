"""Locks between processes: held by an open file, and released by the system with the process.

A lock is that of flock(2). It holds between processes on one machine, also in different containers,
and on network disks that support it. Where a system or a disk has no such locks, nothing is locked,
and nothing is taken for the leftover of a process that has ended.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from hipa_deploy.errors import HipaError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

HAS_LOCKS = fcntl is not None


def is_locked_now(file: IO[str] | IO[bytes]) -> bool | None:
    """Try to lock an open file, until it is closed.

    Returns:
        True if this process has the lock now, False if another one has it, None if there are no
        locks here.

    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a network disk without locks
        return None
    return True


def is_still_at(file: IO[str] | IO[bytes], path: Path) -> bool:
    """Whether ``path`` is still the open file, and has not been removed or replaced."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


@contextmanager
def locked(path: Path, what: str, remedy: str = "Wait until it ends.") -> Iterator[None]:
    """Hold the lock file ``path`` for the block, so that one process writes ``what`` at a time.

    The file is made, and removed at the end. Its folder must exist. One that a killed process left
    is not locked, and is used again.

    Args:
        path: the lock file.
        what: what is protected, for the message.
        remedy: what a user can do, for the message.

    Raises:
        HipaError: another process holds the lock; the message names it.
        OSError: the file cannot be written.

    Example:
        >>> with locked(Path("adaptor.run/.lock"), "run folder adaptor.run"):
        ...     train()

    """
    with _take(path, what, remedy) as file:
        file.truncate(0)
        file.write(_owner())
        file.flush()
        try:
            yield
        finally:
            # While the lock is held: a process that waits for this very file finds it gone, and
            # makes a new one.
            with suppress(OSError):
                path.unlink()


def _take(path: Path, what: str, remedy: str) -> IO[str]:
    """Open and lock the lock file."""
    while True:
        file = path.open("a+", encoding="utf-8", errors="replace")
        if is_locked_now(file) is False:
            file.seek(0)
            owner = file.read().strip() or "another process"
            file.close()
            raise HipaError(f"{what}: {owner} is writing here. {remedy}")
        # Its owner may have removed the file between the two calls.
        if is_still_at(file, path):
            return file
        file.close()


def _owner() -> str:
    """This process, for the message that another one shows."""
    command = Path(sys.argv[0]).name or "python"
    return f"process {os.getpid()} ({command}) on {platform.node()}"

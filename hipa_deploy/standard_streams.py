"""Standard streams that are closed: by the shell before the start, or by a reader that has gone."""

from __future__ import annotations

import os
import select
import sys
from pathlib import Path
from typing import TextIO

BROKEN_PIPE_CODE = 141  # 128 + SIGPIPE, as the shell shows of programs that end by that signal


def open_closed_streams() -> None:
    """Let every standard stream that the shell has closed lead to nowhere (``>&-``).

    Without this the next file that is opened gets the free number, and whatever a library prints
    is written into it. Python has None in place of the stream, on which ``write`` fails.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number is given, and all below this one are taken.
            os.open(os.devnull, os.O_RDWR)
    if sys.stdout is None:
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115


def is_broken() -> bool:
    """Whether nothing reads standard output or standard error any more."""
    return any(_has_no_reader(stream) for stream in (sys.stdout, sys.stderr))


def _has_no_reader(stream: TextIO) -> bool:
    try:
        # What could not be written may still be in the buffer: then it fails again.
        stream.flush()
        number = stream.fileno()
    except BrokenPipeError:
        return True
    except (OSError, ValueError):
        return False
    # Windows has no poll, and its pipes are never asked.
    if not hasattr(select, "poll"):
        return False
    poll = select.poll()
    poll.register(number, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def silence_broken_streams() -> None:
    """Let broken streams lead to nowhere: Python flushes them once more when it ends.

    Source: https://docs.python.org/3/library/signal.html#note-on-sigpipe
    """
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.__stdout__, sys.__stderr__):
        if stream is None:
            continue
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(nowhere, stream.fileno())
        except (OSError, ValueError):
            pass
    os.close(nowhere)


def caused_by_broken_pipe(problem: BaseException | None) -> bool:
    """Whether a library ended the command because of a stream that nobody reads.

    rich and Click both turn ``BrokenPipeError`` into ``SystemExit``.
    """
    return isinstance(problem, SystemExit) and isinstance(problem.__context__, BrokenPipeError)

"""One error class for what a user can mend; everything else is a bug and keeps its traceback."""

from __future__ import annotations


class HipaError(Exception):
    """A mistake the user can mend. The message is one line: what, got, expected, remedy."""


class MissingDependencyError(HipaError):
    """A package that an extra provides is not installed; the message carries the pip command."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed. Run: pip install 'hipa-deploy[{extra}]'")


def first_line(error: BaseException) -> str:
    """The first line of another library's error; the name of its class if it has no message."""
    return str(error).strip().split("\n")[0][:300] or type(error).__name__


def last_line(error: BaseException) -> str:
    """The last line of an error that says there what is wrong.

    PyTorch does so of weights that do not fit.
    """
    return str(error).strip().rpartition("\n")[2].strip()

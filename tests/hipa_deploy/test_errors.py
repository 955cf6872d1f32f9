"""Errors of libraries become one line."""

from __future__ import annotations

import pytest

from hipa_deploy.errors import HipaError, as_line, printable, reason_of


class PanicError(BaseException):
    """As pyo3's PanicException is no Exception."""


@pytest.mark.parametrize(
    "error", [PanicError("at line 3\nmore"), EOFError(), MemoryError(), SystemExit(0)]
)
def test_whatever_a_library_raises_is_one_line(error: BaseException) -> None:
    with (
        pytest.raises(HipaError, match=r"^it fails: .*\. Mend it\.$"),
        as_line("it fails", "Mend it."),
    ):
        raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), HipaError("mine")])
def test_what_is_no_fault_of_a_library_passes(error: BaseException) -> None:
    with pytest.raises(type(error)), as_line("it fails", "Mend it."):
        raise error


def test_the_reason_of_an_error_stands_in_brackets() -> None:
    assert reason_of(HipaError("x is 1. Expected 2. ")) == "x is 1. Expected 2"


def test_what_would_steer_a_terminal_is_escaped() -> None:
    assert printable("ä \x1b[2J\ud800\u202e") == r"ä \x1b[2J\ud800\u202e"

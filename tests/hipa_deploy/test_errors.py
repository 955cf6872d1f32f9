"""Errors of libraries become one line."""

from __future__ import annotations

import pickle

import pytest
import torch

from hipa_deploy.errors import (
    HipaError,
    RequestError,
    as_line,
    memory_remedy,
    printable,
    reason_of,
)


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


def test_too_little_memory_is_one_line_with_its_remedy() -> None:
    with (
        pytest.raises(HipaError, match=r"^not enough memory \(.*alloc.*\)\. Lower it\.$"),
        memory_remedy("Lower it."),
    ):
        torch.empty(1 << 50)
    with (
        pytest.raises(HipaError, match=r"\(CUDA out of memory\. Tried to allocate 2\.00 GiB\)"),
        memory_remedy("Lower it."),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    with pytest.raises(RuntimeError, match="a bug"), memory_remedy("Lower it."):
        raise RuntimeError("a bug")


def test_the_reason_of_an_error_stands_in_brackets() -> None:
    assert reason_of(HipaError("x is 1. Expected 2. ")) == "x is 1. Expected 2"


def test_what_would_steer_a_terminal_is_escaped() -> None:
    assert printable("ä \x1b[2J\ud800\u202e") == r"ä \x1b[2J\ud800\u202e"


def test_a_request_error_outlives_a_pickle() -> None:
    error = RequestError("Give --x.", argument="x", code="odd", told="x is odd.", owner="mend it")
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == "Give --x."
    assert vars(copy) == vars(error)
    assert RequestError("x is odd.").told == "x is odd."

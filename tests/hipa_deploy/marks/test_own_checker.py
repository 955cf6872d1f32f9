"""A checker that an option names: what is imported, and what is refused before that."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from hipa_deploy.errors import HipaError
from hipa_deploy.marks.own_checker import check_checker_name, chosen_checker, import_checker
from hipa_deploy.marks.safety import CheckerError, ask_checker
from hipa_deploy.user_code import code_allowed

MODULE = "checkers_of_a_test"
SOURCE = """
import builtins

def fine(images):
    return [False] * len(images)

def none():
    return []

def two(images, limit):
    return []

class Model:
    def __call__(self, images):
        return [True] * len(images)

model = Model()
kind = builtins.list
NUMBER = 7
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / f"{MODULE}.py").write_text(SOURCE, encoding="utf-8")
    (tmp_path / "ends_here.py").write_text("raise SystemExit(0)\n", encoding="utf-8")
    (tmp_path / "broken_here.py").write_text("1 / 0\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield MODULE
    for name in (MODULE, "ends_here", "broken_here"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", ["fine", "model", "kind"])
def test_what_takes_images_is_a_checker(module: str, name: str) -> None:
    checker = chosen_checker(f"{module}:{name}", allow_code=True)
    assert checker is getattr(sys.modules[module], name)


def test_without_a_name_there_is_none() -> None:
    assert chosen_checker(None, allow_code=True) is None


def test_nothing_is_imported_unless_it_is_allowed(module: str) -> None:
    for refuse in (check_checker_name, import_checker, lambda name: chosen_checker(name, False)):
        with pytest.raises(HipaError) as refused:
            refuse(f"{module}:fine")
        assert str(refused.value) == (
            f"--checker {module}:fine runs code of the module {module}. If you trust it, pass "
            "--allow-code (in Python: with code_allowed())."
        )
    assert module not in sys.modules
    with code_allowed():
        check_checker_name(f"{module}:fine")
    assert module not in sys.modules


@pytest.mark.parametrize("name", ["", ":", "a", "a:", ":f", "a b:f", "a:f:g", "../a:f", "a..b:f"])
def test_names_of_another_form(name: str) -> None:
    with pytest.raises(HipaError, match="Expected MODULE:FUNCTION"):
        chosen_checker(name, allow_code=True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere_to_find:f", "No module named 'nowhere_to_find'.*PYTHONPATH"),
        (f"{MODULE}:missing", "no attribute 'missing'"),
        ("ends_here:f", "SystemExit"),
        ("broken_here:f", "ZeroDivisionError: division by zero"),
        (f"{MODULE}:NUMBER", "is 7. Expected a function of one argument"),
        (f"{MODULE}:none", "Expected a function of one argument"),
        (f"{MODULE}:two", "Expected a function of one argument"),
    ],
)
def test_what_is_no_checker(module: str, name: str, message: str) -> None:
    with pytest.raises(HipaError, match=message) as refused:
        chosen_checker(name, allow_code=True)
    assert "\n" not in str(refused.value)


def test_a_checker_cannot_end_a_command_as_if_all_were_well() -> None:
    def ends(images_BHWC: np.ndarray) -> list[bool]:
        raise SystemExit(0)

    with pytest.raises(CheckerError, match="so no image is shown"):
        ask_checker(ends, np.zeros((1, 8, 8, 3), np.uint8))

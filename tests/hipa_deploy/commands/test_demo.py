"""``hipa-demo``: options that do not go together are refused. What it makes: tests of demo/."""

from __future__ import annotations

from collections.abc import Callable


def test_quick_is_for_a_demo_that_trains(refused: Callable[..., str]) -> None:
    error = refused("demo", "--task", "edit", "--quick", "--out", "x")
    assert "edit demo trains nothing" in error

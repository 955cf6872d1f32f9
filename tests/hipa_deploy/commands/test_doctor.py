"""``hipa-doctor``: options that do not go together are refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["emoji", "--self-test"], "Leave SUBJECT out"),
        (["--out", "x"], "--out is for --self-test"),
    ],
)
def test_a_mistake(arguments: list[str], message: str, refused: Callable[..., str]) -> None:
    assert message in refused("doctor", *arguments)

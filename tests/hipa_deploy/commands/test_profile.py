"""``hipa-profile``, ``hipa-profile compare`` and ``hipa-profile table``: mistakes are refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["emoji", "--roofline", "rtx60"], "'rtx60' is unknown"),
        (["emoji", "--runs", "0"], "got 0 runs"),
        (["compare", "a.json"], "Missing argument"),
        (["compare", "a.json", "b.json"], "a.json is missing"),
        (["compare", "a.json", "b.json", "--threshold", "much"], "'much' is not a percentage"),
        (["table"], "Missing argument"),
    ],
)
def test_a_mistake(arguments: list[str], message: str, refused: Callable[..., str]) -> None:
    assert message in refused("profile", *arguments)

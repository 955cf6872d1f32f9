"""``hipa-generate``: mistakes are refused before a bundle is loaded."""

from __future__ import annotations

from collections.abc import Callable

import pytest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["emoji"], "Missing argument"),
        (["emoji", "apple", "--count", "many"], "--count"),
        (["emoji", "apple", "--nope"], "--nope"),
        (["/no/such", "apple"], "does not exist"),
        (["emoji", "apple", "--backend", "vulkan"], "vulkan"),
        (["emoji", "apple", "--out", "x.jpg"], ".png"),
        (["emoji", "apple", "--out", "x.png", "--count", "2"], "one file"),
        (["emoji", "apple", "--adaptor", "night"], "no adaptor 'night' to swap in"),
    ],
)
def test_a_mistake(arguments: list[str], message: str, refused: Callable[..., str]) -> None:
    assert message in refused("generate", *arguments)

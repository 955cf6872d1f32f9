"""``hipa-edit``, ``hipa-inpaint`` and ``hipa-upscale``: mistakes are refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["edit", "emoji", "a.png", "apple"],
            "to generate, not to edit. Use hipa-generate, or pipe(prompt)",
        ),
        (
            ["inpaint", "emoji", "a.png", "b.png", "apple"],
            "is a bundle to generate, not to inpaint",
        ),
        (["inpaint", "emoji", "a.png", "apple"], "Missing argument"),
        (["upscale", "emoji", "a.png"], "is a bundle to generate, not to upscale"),
        (["upscale", "emoji", "a.png", "--out", "x.gif"], ".png"),
    ],
)
def test_a_mistake(arguments: list[str], message: str, refused: Callable[..., str]) -> None:
    assert message in refused(*arguments)

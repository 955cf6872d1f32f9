"""``hipa-edit``, ``hipa-inpaint`` and ``hipa-upscale``: mistakes are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image


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
        (["upscale", "emoji", "a.png", "--out", "x.gif"], "a name that ends in .png"),
    ],
)
def test_a_mistake(
    arguments: list[str], message: str, refused: Callable[..., str], tmp_path: Path
) -> None:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (64, 64)).save(tmp_path / name)
    assert message in refused(*arguments)

"""``hipa-edit``, ``hipa-inpaint`` and ``hipa-upscale``: mistakes are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from hipa_deploy.commands import from_image
from tests.served import tiny_bundles


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


def test_a_result_too_large_for_its_format_is_refused_before_it_is_made(
    refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An enlargement takes hours, and must not be lost when it is written."""
    bundle = tiny_bundles(tmp_path / "bundles")["tiny-upscale"]
    factor = bundle.manifest.upscale or 1
    Image.new("RGB", (16_383 // factor + 1, 8)).save(tmp_path / "a.png")
    loads: list[object] = []
    monkeypatch.setattr(from_image, "load_pipeline", lambda *given, **more: loads.append(given))
    error = refused("upscale", str(bundle.root), "a.png", "--out", "x.webp")
    assert "a WEBP at most 16383 each way. Write PNG." in error
    assert loads == []

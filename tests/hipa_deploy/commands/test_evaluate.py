"""``hipa-evaluate``: mistakes are refused before any image is made."""

from __future__ import annotations

from collections.abc import Callable

import pytest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "sd15"], "--config is for a checkpoint in one file"),
        (["--adaptor", "nope"], "nope does not exist. Expected an adaptor folder"),
        (["--one-step", "lcm-sd15"], "is an adaptor of HiPA, which says its own step"),
        (["--rival", "lcm-sd15"], "Name its file too: --rival FILE=lcm-sd15"),
        (["--adaptor", "none", "--rival", "sdxl-turbo"], "sdxl-turbo is for SDXL"),
        (["--clip-skip", "1"], "trained with clip skip 0, not 1. Leave out --clip-skip"),
        (["--context-tokens", "80"], "Expected one of: 77, 154, 231"),
        (["--prompts", "nope.txt"], "nope.txt cannot be read"),
        (["--captions", "first"], "--captions is for --coco. Give --coco DIR too"),
        (["--coco", ".", "--out", "o"], "has no annotations/captions_val2017.json"),
        (["--adaptor", "none", "--rival", "lcm-sd15@2000"], "Name its file too"),
    ],
)
def test_a_mistake(arguments: list[str], message: str, refused: Callable[..., str]) -> None:
    assert message in refused("evaluate", *arguments)

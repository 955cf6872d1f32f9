"""The measure of variety: nothing for a model that knows one picture a prompt."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from augment import Pictures
from captions import LEVELS
from variety import measure_variety, nearest, real_images, themes

from tests.emoji.emoji_run import write_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


def test_a_theme_stands_for_the_emoji_of_its_caption(run: Path) -> None:
    pictures = Pictures(run, "train")
    chosen = themes(pictures, LEVELS.index("kind"), 9, np.random.default_rng(0))
    emoji = {}
    for theme in chosen:
        emoji[theme.caption.split(" on a ")[0]] = theme.emoji
    assert emoji == {
        "3d emoji of a fruit": [0, 2],
        "flat emoji of a fruit": [1],
        "3d emoji of a vehicle": [3],
    }
    coloured = [theme for theme in chosen if theme.colour]
    assert len(coloured) == 1
    assert coloured[0].caption.endswith(f"on a {coloured[0].colour} background")
    real = real_images(pictures, chosen[0], 5, np.random.default_rng(0))
    assert real.shape == (5, 128, 128, 3)


def test_a_model_that_has_learned_one_picture_by_heart_has_no_variety(run: Path) -> None:
    def by_heart(prompts: list[str], seeds: list[int]) -> np.ndarray:
        pictures = []
        for prompt in prompts:
            rng = np.random.default_rng(len(prompt))
            pictures.append(rng.integers(256, size=(128, 128, 3), dtype=np.uint8))
        return np.stack(pictures)

    def all_different(prompts: list[str], seeds: list[int]) -> np.ndarray:
        assert len(set(seeds)) == len(seeds)
        rng = np.random.default_rng(0)
        return rng.integers(256, size=(len(seeds), 128, 128, 3), dtype=np.uint8)

    rows = measure_variety(run, by_heart, prompts=2, noises=3)
    assert list(rows) == list(LEVELS)
    for row in rows.values():
        assert row["model"] == pytest.approx(0, abs=1e-3)
        assert row["real"] > 0.01
    lively = measure_variety(run, all_different, prompts=2, noises=3)
    assert lively["kind"]["model"] > 10 * rows["kind"]["model"]
    assert lively["kind"]["real"] == rows["kind"]["real"]


def test_nearest_is_zero_for_a_training_image_and_grows_with_the_angle() -> None:
    training = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert nearest(torch.tensor([[3.0, 0.0]]), training) == pytest.approx(0)
    assert nearest(torch.tensor([[1.0, 1.0]]), training) == pytest.approx(1 - 0.5**0.5)

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from hipa_deploy.train.evaluation.figures import (
    premise_picture,
    samples_picture,
    save_picture,
    spectra_figure,
)


def images(seed: int) -> np.ndarray:
    """Noise, uint8 [3, 32, 32, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)


def test_the_premise_has_four_columns() -> None:
    assert premise_picture(images(0), images(1), shown=2).shape == (2 * 34, 4 * 34, 3)


def test_samples_have_a_column_for_each_set() -> None:
    rows = {"one": images(0), "two": images(1), "three": images(2)}
    assert samples_picture(rows, shown=2).shape == (2 * 34, 3 * 34, 3)


def test_a_picture_is_stored_twice_as_large_with_its_own_pixels(tmp_path: Path) -> None:
    pixels = images(0)[0]
    save_picture(tmp_path / "a.png", pixels)
    stored = np.asarray(Image.open(tmp_path / "a.png"))
    assert np.array_equal(stored, pixels.repeat(2, axis=0).repeat(2, axis=1))


def test_the_spectra_are_a_png(tmp_path: Path) -> None:
    spectra_figure(tmp_path / "spectra.png", {"a": images(0), "b": images(1)}, "a")
    assert Image.open(tmp_path / "spectra.png").size == (11 * 120, 4 * 120)


def test_tall_spectra_are_narrow(tmp_path: Path) -> None:
    rows = {"a": images(0), "b": images(1)}
    spectra_figure(tmp_path / "spectra.png", rows, "a", tall=True)
    assert Image.open(tmp_path / "spectra.png").size == (324, 720)

from __future__ import annotations

import numpy as np
import torch

from hipa_deploy.train.evaluation.sample_grid import headed_grid


def colour(level: int, size: int = 64) -> torch.Tensor:
    return torch.full((2, size, size, 3), level, dtype=torch.uint8)


def test_images_stand_below_their_headings_enlarged_and_unchanged() -> None:
    sheet = headed_grid({"teacher": colour(10), "HiPA": colour(200)}, ["a cat", "a dog"], 100)
    assert sheet.shape == (2 * 17 + 8 + 2 * 132, 208 + 2 * 132, 3)
    assert (sheet[42 : 42 + 128, 208 : 208 + 128] == 10).all()
    assert (sheet[42 + 132 : 42 + 260, 340 : 340 + 128] == 200).all()


def test_headings_step_and_prompts_are_written() -> None:
    columns = {"teacher": colour(255)}
    blank = headed_grid({"": colour(255)}, ["", ""], 1)

    def ink(sheet: np.ndarray, rows: slice, columns: slice) -> bool:
        return bool((sheet[rows, columns] < 128).any())

    sheet = headed_grid(columns, ["a cat " * 100, "Ελλάδα"], 1)
    assert ink(sheet, slice(21, 42), slice(208, 340))  # heading
    assert ink(sheet, slice(0, 21), slice(0, 200))  # step
    assert ink(sheet, slice(42, 170), slice(0, 208))  # a long prompt stays in its row and column
    assert ink(sheet, slice(174, 200), slice(0, 208))
    assert (sheet[42:, 208:] == blank[42:, 208:]).all()
    other = headed_grid(columns, ["a cat " * 100, "Ελλάδα"], 2)
    assert (other[:21] != sheet[:21]).any()


def test_large_images_keep_their_size_and_prompts_may_be_left_out() -> None:
    assert headed_grid({"a": colour(0, 200)}, (), 1).shape == (42 + 2 * 204, 4 + 204, 3)

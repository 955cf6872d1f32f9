"""Squares of latents: where they lie, and that student and teacher have the same ones."""

from __future__ import annotations

import pytest
import torch

from hipa_deploy.errors import HipaError
from hipa_deploy.train.data.crops import crop_corners, cropped
from hipa_deploy.train.recipes.recipe import check_crop


def test_corners_are_a_function_of_seed_step_and_row() -> None:
    rows = torch.tensor([4, 9])
    corners = crop_corners(0, 7, rows, 8, (16, 24))
    assert corners == crop_corners(0, 7, rows, 8, (16, 24))
    assert corners[1:] == crop_corners(0, 7, rows[1:], 8, (16, 24))
    assert corners != crop_corners(0, 8, rows, 8, (16, 24))
    assert corners != crop_corners(1, 7, rows, 8, (16, 24))


def test_every_place_is_chosen_equally_often() -> None:
    corners = crop_corners(0, 0, torch.arange(3000), 14, (16, 15))
    tops = torch.tensor([top for top, _ in corners]).bincount()
    lefts = torch.tensor([left for _, left in corners]).bincount()
    assert tops.tolist() == pytest.approx([1000] * 3, abs=120)
    assert lefts.tolist() == pytest.approx([1500] * 2, abs=150)


def test_squares_are_cut_out_of_each_row() -> None:
    latents = torch.arange(2 * 5 * 6).view(2, 1, 5, 6).float().requires_grad_(True)
    squares = cropped(latents, [(0, 4), (3, 1)], 2)
    assert squares[:, 0].tolist() == [[[4, 5], [10, 11]], [[49, 50], [55, 56]]]
    squares.sum().backward()
    assert latents.grad is not None
    assert latents.grad.sum() == 8
    whole = torch.zeros(1, 4, 8, 8)
    assert cropped(whole, [(0, 0)], 8) is whole


def test_a_square_fits_into_the_latents() -> None:
    check_crop(None, (4, 8, 8))
    check_crop(8, (4, 8, 9))
    with pytest.raises(HipaError, match=r"decode_crop = 9 is larger .* Expected at most 8, or"):
        check_crop(9, (4, 8, 9))

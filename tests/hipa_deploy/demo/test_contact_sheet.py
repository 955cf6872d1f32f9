"""The contact sheet: rows spread over the prompts, every column and row with its label."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hipa_deploy.demo import contact_sheet
from hipa_deploy.demo.contact_sheet import HEADING_HEIGHT, PROMPT_WIDTH, labelled_sheet, write_sheet
from hipa_deploy.images.png import read_parameters


def colours(*values: int) -> np.ndarray:
    """One grey 64x64 image for each value, uint8 [N, 64, 64, 3]."""
    return np.stack([np.full((64, 64, 3), value, np.uint8) for value in values])


def test_images_stand_under_their_heading_and_beside_their_prompt() -> None:
    sheet = labelled_sheet({"one": colours(50, 100), "two": colours(150, 200)}, ["a", "b"])
    assert sheet.shape == (HEADING_HEIGHT + 2 * 130, PROMPT_WIDTH + 2 * 130, 3)
    for row in range(2):
        for column in range(2):
            top = HEADING_HEIGHT + row * 130
            left = PROMPT_WIDTH + column * 130
            value = 50 + 50 * row + 100 * column
            assert (sheet[top : top + 128, left : left + 128] == value).all()


def test_labels_are_dark_on_white_and_touch_no_image() -> None:
    white = colours(255, 255)
    long_prompt = "a very long prompt about many different things in one and the same image"
    sheet = labelled_sheet({"first": white, "second": white}, [long_prompt, "short"])
    pictures = sheet[HEADING_HEIGHT:, PROMPT_WIDTH:]
    assert (pictures == 255).all()
    first_heading = sheet[:HEADING_HEIGHT, PROMPT_WIDTH : PROMPT_WIDTH + 128]
    second_heading = sheet[:HEADING_HEIGHT, PROMPT_WIDTH + 130 :]
    first_prompt = sheet[HEADING_HEIGHT : HEADING_HEIGHT + 128, :PROMPT_WIDTH]
    second_prompt = sheet[HEADING_HEIGHT + 130 :, :PROMPT_WIDTH]
    for label in (first_heading, second_heading, first_prompt, second_prompt):
        assert label.min() < 100
        assert label.mean() > 200


def test_a_sheet_of_many_prompts_shows_some_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contact_sheet, "SHEET_ROWS", 2)
    path = tmp_path / "sheet.png"
    write_sheet(path, {"one": colours(0, 50, 100, 150)}, ["a", "b", "c", "d"])
    with Image.open(path) as sheet:
        assert sheet.size == (PROMPT_WIDTH + 130, HEADING_HEIGHT + 2 * 130)
    assert read_parameters(path) == {"columns": ["one"], "rows": ["a", "c"]}

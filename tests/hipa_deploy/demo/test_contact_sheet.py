"""The contact sheet: rows spread over the prompts, every column and row with its label."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hipa_deploy.demo import contact_sheet
from hipa_deploy.demo.contact_sheet import (
    HEADING_HEIGHT,
    HEADING_LINE_HEIGHT,
    LINE_HEIGHT,
    MARGIN,
    PROMPT_WIDTH,
    labelled_sheet,
    spread,
    write_sheet,
)
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


def changed(one_HWC: np.ndarray, other_HWC: np.ndarray) -> tuple[slice, slice]:
    """The smallest region with all the pixels in which two sheets differ."""
    rows, columns = (one_HWC != other_HWC).any(axis=2).nonzero()
    return slice(rows.min(), rows.max() + 1), slice(columns.min(), columns.max() + 1)


def inside(region: tuple[slice, slice], top: int, left: int, bottom: int, right: int) -> bool:
    rows, columns = region
    return top <= rows.start < rows.stop <= bottom and left <= columns.start < columns.stop <= right


def test_each_line_of_a_heading_is_drawn_over_its_column() -> None:
    images_NHWC = colours(255)
    before = labelled_sheet({"base": images_NHWC, "HiPA\n45 ms": images_NHWC}, ["a"])
    after = labelled_sheet({"base": images_NHWC, "HiPA\n82 ms": images_NHWC}, ["a"])
    left = PROMPT_WIDTH + 130
    bottom = HEADING_HEIGHT + HEADING_LINE_HEIGHT
    region = changed(before, after)
    assert inside(region, HEADING_LINE_HEIGHT, left, bottom, left + 130)
    # Letters that can be read: a figure of the latency is at least 12 pixels high.
    assert region[0].stop - region[0].start >= 12


def test_a_heading_that_is_too_wide_is_drawn_smaller() -> None:
    images_NHWC = colours(255)
    wide = "a heading of thirty characters"
    sheet = labelled_sheet({wide: images_NHWC, "": images_NHWC}, ["a"])
    assert sheet[:HEADING_HEIGHT, PROMPT_WIDTH : PROMPT_WIDTH + 130].min() < 100
    assert (sheet[:HEADING_HEIGHT, PROMPT_WIDTH + 130 :] == 255).all()


def test_a_long_prompt_ends_before_the_next_one() -> None:
    columns = {"one": colours(255, 255)}
    short = labelled_sheet(columns, ["", "next"])
    long = labelled_sheet(columns, ["word " * 200, "next"])
    assert inside(changed(short, long), HEADING_HEIGHT, 0, HEADING_HEIGHT + 130, PROMPT_WIDTH)


def test_a_note_stands_above_the_headings() -> None:
    columns = {"one": colours(0), "two": colours(0)}
    plain = labelled_sheet(columns, ["a"])
    noted = labelled_sheet(columns, ["a"], "how they were chosen")
    height = LINE_HEIGHT + MARGIN
    assert (noted[height:] == plain).all()
    assert noted[:height].min() < 100


def test_a_picture_lies_to_the_right_of_the_table_at_its_top(tmp_path: Path) -> None:
    columns = {"one": colours(0)}
    write_sheet(tmp_path / "plain.png", columns, ["a"])
    red = Image.new("RGB", (20, 30), "red")
    write_sheet(tmp_path / "both.png", columns, ["a"], beside=red)
    plain = np.asarray(Image.open(tmp_path / "plain.png"))
    both = np.asarray(Image.open(tmp_path / "both.png"))
    width = plain.shape[1]
    assert both.shape == (plain.shape[0], width + 20, 3)
    assert (both[:, :width] == plain).all()
    assert (both[:30, width:] == (255, 0, 0)).all()
    assert (both[30:, width:] == 255).all()


@pytest.mark.parametrize(
    ("count", "most", "places"),
    [(10, 4, [0, 2, 5, 7]), (3, 8, [0, 1, 2]), (0, 8, []), (8, 8, list(range(8)))],
)
def test_places_are_spread_over_the_whole_list(count: int, most: int, places: list[int]) -> None:
    assert spread(count, most) == places

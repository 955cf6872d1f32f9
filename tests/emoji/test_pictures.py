"""The pictures that the embedded model is trained on, and their captions."""

from __future__ import annotations

import colorsys
import json
from pathlib import Path

import numpy as np
import pytest
from augment import SIZE, Pictures, Placement, draw, random_placement, shade_of
from captions import (
    COLOURS,
    KIND_BY_SUBGROUP,
    KINDS,
    exact_caption,
    levels,
    may_mirror,
    with_article,
)
from PIL import Image
from write_pictures import main as write_pictures

from tests.emoji.emoji_run import ROWS, one_sided_sprite, write_run

# Where each colour lies on the wheel of hues, in degrees; a person would agree with these names.
HUES = {
    "blue": (190, 250),
    "green": (90, 165),
    "yellow": (42, 60),
    "pink": (320, 350),
    "purple": (255, 295),
}


def test_an_image_has_a_caption_of_each_level() -> None:
    assert levels("3d", "red apple", "a fruit") == (
        "3d emoji of a red apple",
        "3d emoji of a fruit",
        "3d emoji",
    )
    assert levels("noto", "eagle", "a bird", "blue") == (
        "noto emoji of an eagle on a blue background",
        "noto emoji of a bird on a blue background",
        "noto emoji on a blue background",
    )


@pytest.mark.parametrize(
    ("concept", "phrase"),
    [("grapes", "grapes"), ("cactus", "a cactus"), ("owl", "an owl"), ("hourglass", "a hourglass")],
)
def test_plurals_take_no_article(concept: str, phrase: str) -> None:
    assert with_article(concept) == phrase


def test_kinds_are_words_and_not_unicode_names() -> None:
    assert KIND_BY_SUBGROUP["food-fruit"] == "a fruit"
    assert len(set(KINDS)) == len(KINDS)
    for kind in KINDS:
        assert kind.replace(" ", "").isalpha()


@pytest.mark.parametrize(
    ("concept", "kind", "allowed"),
    [
        ("red apple", "a fruit", True),
        ("ambulance", "a vehicle", False),  # it has letters
        ("flag france", "a flag", False),
        ("left arrow", "an arrow", False),
        ("person facing right", "a person", False),
    ],
)
def test_nothing_is_mirrored_that_would_then_be_wrong(
    concept: str, kind: str, allowed: bool
) -> None:
    assert may_mirror(concept, kind) is allowed


def test_a_placement_keeps_the_emoji_inside_the_picture() -> None:
    rng = np.random.default_rng(0)
    mirrored = 0
    for _ in range(300):
        placement = random_placement(rng, may_mirror=True)
        assert 0 <= placement.left <= SIZE - placement.side
        assert 0 <= placement.top <= SIZE - placement.side
        mirrored += placement.mirrored
        assert not random_placement(rng, may_mirror=False).mirrored
    assert 110 < mirrored < 190


@pytest.mark.parametrize("colour", sorted(HUES))
def test_a_shade_has_the_hue_of_its_name(colour: str) -> None:
    low, high = HUES[colour]
    rng = np.random.default_rng(0)
    for _ in range(100):
        red, green, blue = shade_of(colour, rng)
        hue, saturation, _ = colorsys.rgb_to_hsv(red / 255, green / 255, blue / 255)
        assert low <= 360 * hue <= high
        assert saturation > 0.2


def test_gray_has_no_hue_and_white_is_white() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        shade = shade_of("gray", rng)
        assert max(shade) - min(shade) <= 10
    assert shade_of("", rng) == (255, 255, 255)


def test_draw_puts_the_emoji_where_the_placement_says() -> None:
    shade = (10, 200, 30)
    # Half size, so that the bar of rows 40 to 149 and columns 40 to 79 comes to 20 to 74, 20 to 39.
    plain = Placement("green", shade, 96, 16, 8, 0.0, False)
    picture = draw(one_sided_sprite(), plain)
    assert picture.shape == (SIZE, SIZE, 3)
    assert picture[8 + 50, 16 + 30].tolist() == [255, 0, 0]
    assert picture[8 + 50, 16 + 96 - 30].tolist() == list(shade)
    assert picture[0, 0].tolist() == list(shade)

    mirrored = draw(one_sided_sprite(), Placement("green", shade, 96, 16, 8, 0.0, True))
    assert mirrored[8 + 50, 16 + 96 - 30].tolist() == [255, 0, 0]
    assert mirrored[8 + 50, 16 + 30].tolist() == list(shade)


def test_pictures_are_those_of_the_split_and_repeat_with_the_seed(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    train = Pictures(run, "train")
    assert len(train) == len([row for row in ROWS if row[3] == "train"])
    first, colours = train.draw_batch([0, 3, 0], np.random.default_rng(7))
    again, _ = train.draw_batch([0, 3, 0], np.random.default_rng(7))
    assert (first == again).all()
    assert (first[0] != first[2]).any()
    assert set(colours) <= {"", *COLOURS}
    on_pink, names = train.draw_batch([1], np.random.default_rng(7), "pink")
    assert names == ["pink"]
    assert on_pink[0, 0, 0, 0] > on_pink[0, 0, 0, 1]


def test_a_folder_of_pictures_has_each_emoji_on_white_and_on_the_colour_of_its_caption(
    tmp_path: Path,
) -> None:
    run = write_run(tmp_path / "run")
    write_pictures(run, tmp_path / "pictures")
    lines = (tmp_path / "pictures" / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    trained = [exact_caption(row[0], row[1]) for row in ROWS if row[3] == "train"]
    half = len(trained)
    assert [row["text"] for row in rows[:half]] == trained
    for row, caption in zip(rows[half:], trained, strict=True):
        assert row["text"].removeprefix(f"{caption} on a ").removesuffix(" background") in COLOURS

    for row in rows:
        with Image.open(tmp_path / "pictures" / row["file_name"]) as image:
            assert image.size == (SIZE, SIZE)
            is_white = image.getpixel((0, 0)) == (255, 255, 255)
        assert is_white == ("background" not in row["text"])

    with pytest.raises(SystemExit, match="exists already"):
        write_pictures(run, tmp_path / "pictures")

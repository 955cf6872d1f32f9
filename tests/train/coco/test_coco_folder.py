from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hipa_deploy.errors import HipaError
from hipa_deploy.train.coco.coco_folder import find_sets, read_coco
from hipa_deploy.train.coco.protocol import SETS
from tests.coco_samples import WORDS, write_coco

KNOWN = SETS[2017]


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    return write_coco(tmp_path / "coco")


def test_a_caption_of_each_image_in_the_order_of_their_numbers(coco: Path) -> None:
    first = read_coco(coco, KNOWN, captions="first")
    assert first.captions[:2] == ["a hat", "a tree"]  # of the smallest numbers; without the newline
    assert [path.stem for path in first.real] == sorted(path.stem for path in first.real)
    drawn = read_coco(coco, KNOWN)
    assert drawn.captions == read_coco(coco, KNOWN).captions
    assert {len(text.split()) for text in drawn.captions} == {2, 4}  # of both kinds
    assert len(drawn.captions) == len(drawn.real) == 10


def test_fewer_images_and_only_the_captioned_ones(coco: Path) -> None:
    some = read_coco(coco, KNOWN, captions="first", reference="captioned", images=4)
    assert len(some.captions) == len(some.real) == 4
    places = [(900 - int(path.stem)) // 7 for path in some.real]
    assert some.captions == [f"a {WORDS[place]}" for place in places]
    assert len(read_coco(coco, KNOWN, images=4).real) == 10


def test_a_list_keeps_its_order_and_its_repetitions(coco: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("a boat\na cat\n\na boat\n  a  dog \n")
    data = read_coco(coco, KNOWN, captions=str(tmp_path / "list.txt"))
    assert data.captions == ["a boat", "a cat", "a boat", "a dog"]
    assert data.chosen == "file"


def test_which_sets_are_there(coco: Path) -> None:
    assert [known.year for known in find_sets(coco, None)] == [2017]
    write_coco(coco.with_name("other"), year=2014)
    with pytest.raises(HipaError, match=r"has no annotations/captions_val2014.json.*curl -O"):
        find_sets(coco, 2014)
    with pytest.raises(HipaError, match="Expected 2014 or 2017"):
        find_sets(coco, 2015)


Change = Callable[[dict[str, Any]], None]


def outside(content: dict[str, Any]) -> None:
    content["images"][0]["file_name"] = "../secret.jpg"


def unlisted(content: dict[str, Any]) -> None:
    content["annotations"][0]["image_id"] = 1


def twice(content: dict[str, Any]) -> None:
    content["images"].append(content["images"][0])


def untyped(content: dict[str, Any]) -> None:
    content["annotations"][0]["caption"] = 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (outside, "has the part '..'"),
        (unlisted, "caption 0 is of an image that is not listed"),
        (twice, "two images have one id"),
        (untyped, "annotations.0.caption"),
    ],
)
def test_a_damaged_table(coco: Path, change: Change, message: str) -> None:
    path = coco / "annotations" / KNOWN.captions
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(HipaError) as error:
        read_coco(coco, KNOWN)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": 3}, "Expected at least 4"),
        ({"images": 11}, "there are 10 images of val2017 with captions"),
        ({"captions": "nope.txt"}, "Expected random, first, or a text file"),
        ({"captions": "nope.txt", "reference": "captioned"}, "name no images"),
    ],
)
def test_what_cannot_be_drawn(coco: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(HipaError) as error:
        read_coco(coco, KNOWN, **options)
    assert message in str(error.value)


def test_a_missing_image_is_named(coco: Path) -> None:
    next(iter(sorted((coco / "val2017").iterdir()))).unlink()
    with pytest.raises(HipaError, match=r"lacks 1 of 10 images .* 000000000837\.jpg"):
        read_coco(coco, KNOWN)

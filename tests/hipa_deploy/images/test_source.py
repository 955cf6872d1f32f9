"""Sources of the tasks; their bundle is a manifest without graphs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hipa_deploy.errors import HipaError
from hipa_deploy.images.compositing import hide_hole
from hipa_deploy.images.example_source import example_image, example_mask
from hipa_deploy.images.png import enlarge
from hipa_deploy.images.source import (
    EncodedImages,
    Source,
    batch_inputs,
    edit_source,
    inpaint_source,
    upscaling,
)
from tests.hipa_deploy.images.manifests import bundle, strengths

IMAGE_HWC = example_image(64, 64, number=1)
MASK_HW = example_mask(64, 64)


def test_an_edits_source() -> None:
    two = edit_source(
        bundle("edit", strengths=strengths(0.75, 0.5)),
        IMAGE_HWC,
        strength=0.5,
        height=None,
        width=None,
    )
    np.testing.assert_array_equal(two.image_HWC, IMAGE_HWC)
    assert (two.step, two.mask_1hw, two.facts["strength"]) == (1, None, 0.5)
    one = edit_source(bundle("edit", strengths=strengths(0.5)), IMAGE_HWC, height=None, width=None)
    assert (one.step, one.facts["source"]) == (None, two.facts["source"])


def test_an_inpaintings_source_hides_the_hole_and_finishes_with_the_original() -> None:
    source = inpaint_source(
        bundle("inpaint"), IMAGE_HWC, MASK_HW, feather=0, match=False, height=None, width=None
    )
    np.testing.assert_array_equal(source.image_HWC, hide_hole(IMAGE_HWC, MASK_HW))
    assert source.mask_1hw is not None
    np.testing.assert_array_equal(source.mask_1hw[0].repeat(4, 0).repeat(4, 1), MASK_HW)
    black = source.finish(np.zeros((2, 64, 64, 3), np.uint8))
    np.testing.assert_array_equal(black[1], IMAGE_HWC * (MASK_HW == 0)[..., None])


@pytest.mark.parametrize(
    ("height", "width", "count"), [(16, 16, 1), (3, 5, 1), (17, 16, 2), (40, 30, 6)]
)
def test_tiles_of_an_enlarged_image_merge_to_it(height: int, width: int, count: int) -> None:
    small_HWC = example_image(height, width)
    upscaled = upscaling(bundle("upscale", upscale=4), small_HWC)
    assert len(upscaled.tiles) == count
    assert {tile.image_HWC.shape for tile in upscaled.tiles} == {(64, 64, 3)}
    merged = upscaled.merge(np.stack([tile.image_HWC for tile in upscaled.tiles]))
    np.testing.assert_array_equal(merged, enlarge(small_HWC, 4))


def test_the_border_is_repeated_beyond_a_small_image() -> None:
    upscaled = upscaling(bundle("upscale", upscale=4), example_image(8, 16))
    tile_HWC = upscaled.tiles[0].image_HWC
    np.testing.assert_array_equal(tile_HWC[32:], np.broadcast_to(tile_HWC[31], (32, 64, 3)))


def test_too_many_tiles_are_refused_before_the_image_is_enlarged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    upscale_bundle = bundle("upscale", upscale=4)
    small_HWC = example_image(40, 30)
    assert len(upscaling(upscale_bundle, small_HWC, most_tiles=6).tiles) == 6
    monkeypatch.setattr("hipa_deploy.images.source.enlarge", None)
    words = "takes 6 tiles of this model. Expected at most 5. Make it smaller. A lower overlap"
    with pytest.raises(HipaError, match=words):
        upscaling(upscale_bundle, small_HWC, most_tiles=5)


def test_the_same_picture_has_the_same_hash_and_another_shape_another() -> None:
    upscale_bundle = bundle("upscale", upscale=4)
    square = upscaling(upscale_bundle, np.zeros((4, 4), np.uint8))
    flat = upscaling(upscale_bundle, np.zeros((2, 8), np.uint8))
    assert square.facts["source"] != flat.facts["source"]
    again = upscaling(upscale_bundle, np.zeros((4, 4, 3), np.float32))
    assert again.facts["source"] == square.facts["source"]


@pytest.mark.parametrize("feather", [8.0, "8", None])
def test_a_feather_that_is_no_number_of_pixels(feather: Any) -> None:
    with pytest.raises(HipaError, match=r"feather is .*\. Expected a whole number"):
        inpaint_source(
            bundle("inpaint"), IMAGE_HWC, MASK_HW, feather=feather, height=None, width=None
        )


def test_wishes_that_are_no_numbers() -> None:
    edits = bundle("edit", strengths=strengths(0.75, 0.5))
    text: Any = "0.5"
    with pytest.raises(HipaError, match=r"strength '0\.5' is out of range"):
        edit_source(edits, IMAGE_HWC, strength=text, height=None, width=None)
    half: Any = 8.0
    with pytest.raises(HipaError, match=r"overlap is 8\.0\. Expected a whole number"):
        upscaling(bundle("upscale", upscale=4), IMAGE_HWC, overlap=half)


def test_a_batch_of_sources() -> None:
    mask_1hw = np.ones((1, 16, 16), np.float32)
    source = Source("edit", IMAGE_HWC, mask_1hw, 1)
    inputs = batch_inputs([source, source])
    assert {name: (tensor.shape, str(tensor.dtype)) for name, tensor in inputs.items()} == {
        "image": ((2, 64, 64, 3), "uint8"),
        "mask": ((2, 1, 16, 16), "float32"),
        "step": ((1,), "int64"),
    }
    assert batch_inputs([]) == {}
    assert list(batch_inputs([Source("upscale", IMAGE_HWC)])) == ["image"]


def test_the_latest_encoding_is_known() -> None:
    known = EncodedImages()
    image = IMAGE_HWC[None]
    source = np.ones((1, 4, 16, 16), np.float32)
    assert known.feed({"image": image, "noise": source}).keys() == {"image", "noise"}
    known.keep(image, source)
    assert known.feed({"image": image.copy(), "noise": source}).keys() == {"source", "noise"}
    assert known.feed({"image": 255 - image}).keys() == {"image"}
    assert known.feed({"noise": source}).keys() == {"noise"}

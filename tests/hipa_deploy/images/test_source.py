"""Sources of the tasks: the bundle's side is a manifest alone, without graphs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.bundle.manifest import Strength
from hipa_deploy.embedded import BUNDLE
from hipa_deploy.images.compositing import hide_hole
from hipa_deploy.images.example_source import (
    example_image,
    example_inputs,
    example_mask,
    example_source,
)
from hipa_deploy.images.png import enlarge
from hipa_deploy.images.source import (
    EncodedImages,
    Source,
    batch_inputs,
    edit_source,
    inpaint_source,
    upscaling,
)
from hipa_deploy.tasks import Task

IMAGE_HWC, MASK_HW = example_image(64, 64, number=1), example_mask(64, 64)


def bundle(task: Task, **changes) -> Bundle:
    """The embedded bundle, 64 x 64 pixels and 16 x 16 latents, as if it were for ``task``."""
    return Bundle(
        Path("b"), Bundle.open(BUNDLE).manifest.model_copy(update={"task": task, **changes})
    )


def strengths(*values: float) -> tuple[Strength, ...]:
    return tuple(
        Strength(strength=value, timestep=round(999 * value), alpha_bar=0.5) for value in values
    )


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
        bundle("inpaint"), IMAGE_HWC, MASK_HW, feather=0, height=None, width=None
    )
    np.testing.assert_array_equal(source.image_HWC, hide_hole(IMAGE_HWC, MASK_HW))
    assert source.mask_1hw is not None
    np.testing.assert_array_equal(source.mask_1hw[0].repeat(4, 0).repeat(4, 1), MASK_HW)
    black = source.finish(np.zeros((2, 64, 64, 3), np.uint8))
    np.testing.assert_array_equal(black[1], IMAGE_HWC * (MASK_HW == 0)[..., None])


@pytest.mark.parametrize(
    ("height", "width", "count"), [(16, 16, 1), (3, 5, 1), (17, 16, 2), (40, 30, 6)]
)
def test_tiles_of_an_enlarged_image_are_it(height: int, width: int, count: int) -> None:
    small_HWC = example_image(height, width)
    job = upscaling(bundle("upscale", upscale=4), small_HWC)
    assert len(job.tiles) == count
    assert {tile.image_HWC.shape for tile in job.tiles} == {(64, 64, 3)}
    merged = job.merge(np.stack([tile.image_HWC for tile in job.tiles]))
    np.testing.assert_array_equal(merged, enlarge(small_HWC, 4))


def test_the_border_goes_on_beyond_a_small_image() -> None:
    tile_HWC = upscaling(bundle("upscale", upscale=4), example_image(8, 16)).tiles[0].image_HWC
    np.testing.assert_array_equal(tile_HWC[32:], np.broadcast_to(tile_HWC[31], (32, 64, 3)))


def test_the_same_picture_has_the_same_hash_and_another_shape_another() -> None:
    square, flat = (
        upscaling(bundle("upscale", upscale=4), np.zeros(shape, np.uint8))
        for shape in ((4, 4), (2, 8))
    )
    assert square.facts["source"] != flat.facts["source"]
    again = upscaling(bundle("upscale", upscale=4), np.zeros((4, 4, 3), np.float32))
    assert again.facts["source"] == square.facts["source"]


def test_a_batch_of_sources() -> None:
    mask_1hw = np.ones((1, 16, 16), np.float32)
    given = batch_inputs(
        [Source("edit", IMAGE_HWC, mask_1hw, 1), Source("edit", IMAGE_HWC, mask_1hw, 1)]
    )
    assert {name: (value.shape, str(value.dtype)) for name, value in given.items()} == {
        "image": ((2, 64, 64, 3), "uint8"),
        "mask": ((2, 1, 16, 16), "float32"),
        "step": ((1,), "int64"),
    }
    assert batch_inputs([]) == {}
    assert list(batch_inputs([Source("upscale", IMAGE_HWC)])) == ["image"]


def test_the_latest_encoding_is_known() -> None:
    known, image, source = EncodedImages(), IMAGE_HWC[None], np.ones((1, 4, 16, 16), np.float32)
    assert known.feed({"image": image, "noise": source}).keys() == {"image", "noise"}
    known.keep(image, source)
    assert known.feed({"image": image.copy(), "noise": source}).keys() == {"source", "noise"}
    assert known.feed({"image": 255 - image}).keys() == {"image"}
    assert known.feed({"noise": source}).keys() == {"noise"}


def test_examples_differ_by_number_and_fit_the_bundle() -> None:
    assert example_source(bundle("generate")) is None
    first, second = (
        example_source(bundle("edit", strengths=strengths(1, 0.5)), number) for number in (0, 1)
    )
    assert first is not None
    assert second is not None
    assert first.step == 0
    assert not np.array_equal(first.image_HWC, second.image_HWC)
    inputs = example_inputs("inpaint", 64, 64, 4)
    assert inputs["mask"].shape == (1, 16, 16)
    assert 0 < inputs["mask"].mean() < 1
    blurred = example_inputs("upscale", 64, 64, 4, upscale=4)["image"].astype(float)
    sharp = example_inputs("edit", 64, 64, 4)["image"].astype(float)
    assert np.abs(np.diff(blurred, axis=0)).max() < np.abs(np.diff(sharp, axis=0)).max()

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hipa_deploy.errors import HipaError
from hipa_deploy.images.tiling import merge_tiles, tiles
from tests.traced_memory import traced_peak

Case = tuple[int, int, int]


def tile_and_size(tile: int) -> st.SearchStrategy[tuple[int, int]]:
    """A tile's size along one axis, and the image's: one to six tiles."""
    return st.tuples(st.just(tile), st.integers(tile, 6 * tile))


AXES = st.integers(2, 12).flatmap(tile_and_size)


@given(AXES, AXES, st.integers(0, 11))
def test_tiles_cover_everything_overlap_enough_and_are_few(
    rows: tuple[int, int], columns: tuple[int, int], overlap: int
) -> None:
    tile_h, height = rows
    tile_w, width = columns
    overlap = min(overlap, tile_h - 1, tile_w - 1)
    offsets = tiles(height, width, tile_h, tile_w, overlap)
    covered = np.zeros((height, width), int)
    for top, left in offsets:
        assert 0 <= top <= height - tile_h
        assert 0 <= left <= width - tile_w
        covered[top : top + tile_h, left : left + tile_w] += 1
    assert covered.min() >= 1
    tops = sorted({top for top, _ in offsets})
    lefts = sorted({left for _, left in offsets})
    check_axis(tops, height, tile_h, overlap)
    check_axis(lefts, width, tile_w, overlap)


def check_axis(starts: list[int], size: int, tile: int, overlap: int) -> None:
    """Check that tiles overlap enough along one axis, and that one tile fewer would not do."""
    assert (tile - np.diff(starts) >= overlap).all()
    fewer = len(starts) - 1
    assert fewer == 0 or fewer * tile - (fewer - 1) * overlap < size


@given(AXES, AXES, st.integers(0, 11), st.integers(0, 255))
def test_constant_tiles_give_that_constant(
    rows: tuple[int, int], columns: tuple[int, int], overlap: int, level: int
) -> None:
    tile_h, height = rows
    tile_w, width = columns
    offsets = tiles(height, width, tile_h, tile_w, min(overlap, tile_h - 1, tile_w - 1))
    constant = np.full((len(offsets), tile_h, tile_w, 3), level, np.uint8)
    merged = merge_tiles(constant, offsets, height, width)
    assert merged.dtype == np.uint8
    assert merged.shape == (height, width, 3)
    assert (merged == level).all()


@given(AXES, AXES, st.integers(0, 11))
def test_tiles_cut_from_an_image_merge_to_it(
    rows: tuple[int, int], columns: tuple[int, int], overlap: int
) -> None:
    tile_h, height = rows
    tile_w, width = columns
    rng = np.random.default_rng(height * width)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    offsets = tiles(height, width, tile_h, tile_w, min(overlap, tile_h - 1, tile_w - 1))
    cut = [image[top : top + tile_h, left : left + tile_w] for top, left in offsets]
    np.testing.assert_array_equal(merge_tiles(cut, offsets, height, width), image)


def test_one_tile_is_the_image_and_large_ones_spread_evenly() -> None:
    assert tiles(64, 64, 64, 64, 8) == [(0, 0)]
    assert tiles(512, 1000, 512, 512, 64) == [(0, 0), (0, 244), (0, 488)]


def test_two_tiles_fade_linearly() -> None:
    black = np.zeros((1, 8, 3), np.uint8)
    white = np.full((1, 8, 3), 250, np.uint8)
    merged = merge_tiles([black, white], [(0, 0), (0, 4)], 1, 12)
    assert merged[0, :, 0].tolist() == [0, 0, 0, 0, 50, 100, 150, 200, 250, 250, 250, 250]


def test_too_small_an_image_and_too_large_an_overlap_are_refused() -> None:
    with pytest.raises(HipaError, match="height is 63 pixels, a tile 64"):
        tiles(63, 64, 64, 64, 8)
    with pytest.raises(HipaError, match="overlap is 64"):
        tiles(128, 128, 64, 64, 64)
    with pytest.raises(HipaError, match="overlap is -1"):
        tiles(128, 128, 64, 64, -1)


def test_tiles_that_do_not_fit_the_image_are_refused() -> None:
    tile = np.zeros((4, 4, 3), np.uint8)
    with pytest.raises(HipaError, match="1 tiles and 2 offsets"):
        merge_tiles([tile], [(0, 0), (0, 4)], 4, 8)
    with pytest.raises(HipaError, match="16 of 32 pixels uncovered"):
        merge_tiles([tile], [(0, 0)], 4, 8)
    for offset in ((0, 5), (-1, 0)):
        with pytest.raises(HipaError, match="does not lie in"):
            merge_tiles([tile], [offset], 4, 8)


def test_a_large_image_is_merged_in_little_more_than_its_own_memory() -> None:
    tile_hwC = np.zeros((256, 256, 3), np.uint8)
    height, width = 16384, 256
    offsets = tiles(height, width, 256, 256, 32)
    with traced_peak() as peak:
        merge_tiles([tile_hwC] * len(offsets), offsets, height, width)
        most = peak()
    assert most < 1.5 * 3 * height * width  # of uint8 [height, width, 3]

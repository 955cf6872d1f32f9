"""Colours that meet those around a hole, against the equations solved exactly."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hipa_deploy.images.compositing import composite
from hipa_deploy.images.membrane import meet_edge, membrane

SIZE = 48


def a_hole(kind: str) -> np.ndarray:
    hole_HW = np.zeros((SIZE, SIZE), bool)
    if kind == "box":
        hole_HW[10:35, 8:40] = True
    elif kind == "ring":
        hole_HW[8:40, 8:40] = True
        hole_HW[18:26, 20:30] = False
    elif kind == "corner":
        hole_HW[:30, :25] = True
    else:
        hole_HW[5:9, 4:44] = True
        hole_HW[30:44, 20:23] = True
    return hole_HW


def edge_of(hole_HW: np.ndarray) -> np.ndarray:
    wide_HW = np.pad(hole_HW, 1)
    around_HW = wide_HW[:-2, 1:-1] | wide_HW[2:, 1:-1] | wide_HW[1:-1, :-2] | wide_HW[1:-1, 2:]
    return around_HW & ~hole_HW


def solved(values_HWC: np.ndarray, edge_HW: np.ndarray, hole_HW: np.ndarray) -> np.ndarray:
    """Laplace's equation in the hole, as a matrix: each value is the mean of its neighbours'."""
    number_HW = np.full(hole_HW.shape, -1)
    number_HW[hole_HW] = np.arange(hole_HW.sum())
    count = int(hole_HW.sum())
    matrix = np.zeros((count, count))
    right = np.zeros((count, 3))
    for y, x in zip(*np.nonzero(hole_HW), strict=True):
        row = number_HW[y, x]
        for v, u in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
            if not (0 <= v < SIZE and 0 <= u < SIZE):
                continue
            matrix[row, row] += 1
            if hole_HW[v, u]:
                matrix[row, number_HW[v, u]] -= 1
            else:
                right[row] += values_HWC[v, u]
    return np.linalg.solve(matrix, right)


def smooth_image(seed: int, cells: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
    return np.asarray(small.resize((SIZE, SIZE), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("kind", ["box", "ring", "corner", "two"])
@pytest.mark.parametrize("cells", [3, 12])
def test_it_is_near_the_exact_solution(kind: str, cells: int) -> None:
    hole_HW = a_hole(kind)
    edge_HW = edge_of(hole_HW)
    values_HWC = smooth_image(1, cells).astype(np.float32) - smooth_image(2, cells)
    got = membrane(values_HWC, edge_HW, hole_HW)[hole_HW]
    expected = solved(values_HWC, edge_HW, hole_HW)
    spread = values_HWC[edge_HW].std()
    assert np.sqrt(((got - expected) ** 2).mean()) < 0.12 * spread
    # Like the solution it is nowhere beyond what is along the edge.
    assert got.min() >= values_HWC[edge_HW].min() - 1e-3
    assert got.max() <= values_HWC[edge_HW].max() + 1e-3


@given(
    seed=st.integers(0, 100),
    shift=st.integers(-60, 60),
    kind=st.sampled_from(["box", "ring", "corner", "two"]),
)
def test_one_shift_everywhere_is_taken_back_exactly(seed: int, shift: int, kind: str) -> None:
    original_HWC = (60 + smooth_image(seed, 6) // 2).astype(np.uint8)
    generated_HWC = (original_HWC.astype(int) + shift).astype(np.uint8)
    np.testing.assert_array_equal(
        meet_edge(generated_HWC, original_HWC, a_hole(kind))[a_hole(kind)],
        original_HWC[a_hole(kind)],
    )


def test_details_stay_and_nothing_outside_changes() -> None:
    hole_HW = a_hole("box")
    original_HWC = np.full((SIZE, SIZE, 3), 100, np.uint8)
    generated_HWC = np.full((SIZE, SIZE, 3), 140, np.uint8)
    generated_HWC[20:24, 20:24] = 180
    met_HWC = meet_edge(generated_HWC, original_HWC, hole_HW)
    assert (met_HWC[20:24, 20:24] == 140).all()
    assert (met_HWC[12, 10:38] == 100).all()
    np.testing.assert_array_equal(met_HWC[~hole_HW], generated_HWC[~hole_HW])
    assert (generated_HWC[12, 12] == 140).all()  # what was given is not written to


def test_without_anything_around_it_nothing_is_shifted() -> None:
    image_HWC = smooth_image(3, 5)
    everywhere_HW = np.ones((SIZE, SIZE), bool)
    np.testing.assert_array_equal(meet_edge(image_HWC, 255 - image_HWC, everywhere_HW), image_HWC)
    nowhere_HW = ~everywhere_HW
    np.testing.assert_array_equal(meet_edge(image_HWC, 255 - image_HWC, nowhere_HW), image_HWC)


@pytest.mark.parametrize("feather", [0, 1, 5, 4096])
def test_a_composite_that_matches_has_no_seam_where_it_ends(feather: int) -> None:
    mask_HW = a_hole("box").astype(np.float32)
    original_HWC = smooth_image(4, 4) // 2
    generated_HWC = original_HWC + np.uint8(50)
    plain_HWC = composite(generated_HWC, original_HWC, mask_HW, feather).astype(int)
    matched_HWC = composite(generated_HWC, original_HWC, mask_HW, feather, match=True).astype(int)
    original = original_HWC.astype(int)
    if feather == 4096:  # the seam ends beyond the image
        np.testing.assert_array_equal(matched_HWC, plain_HWC)
    else:
        inside = mask_HW > 0
        assert np.abs(matched_HWC - original)[inside].mean() < 3
        assert np.abs(plain_HWC - original)[inside].mean() > 30
        far_HW = np.ones((SIZE, SIZE), bool)
        far_HW[10 - feather : 35 + feather, 8 - feather : 40 + feather] = False
        np.testing.assert_array_equal(matched_HWC[far_HW], original[far_HW])

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hipa_deploy.errors import HipaError
from hipa_deploy.images.compositing import (
    check_mask,
    composite,
    hide_hole,
    latent_mask,
    seam_weight,
)

SIZES = st.tuples(st.integers(1, 24), st.integers(1, 24))


def random_mask(seed: int, size: tuple[int, int], share: float) -> np.ndarray:
    return (np.random.default_rng(seed).random(size) < share).astype(np.float32)


def distances(mask_HW: np.ndarray) -> np.ndarray:
    """Return the distance to the nearest pixel of the mask, by comparing all pairs of pixels."""
    y, x = np.nonzero(mask_HW)
    rows, columns = np.indices(mask_HW.shape)
    if not len(y):
        return np.full(mask_HW.shape, np.inf)
    return np.sqrt((rows[..., None] - y) ** 2 + (columns[..., None] - x) ** 2).min(axis=-1)


@given(st.integers(0, 99), SIZES, st.sampled_from([0.0, 0.01, 0.1, 0.9]), st.integers(0, 30))
def test_beyond_the_feather_the_original_is_exact(
    seed: int, size: tuple[int, int], share: float, feather: int
) -> None:
    rng = np.random.default_rng(seed)
    generated, original = rng.integers(0, 256, (2, *size, 3), dtype=np.uint8)
    mask = random_mask(seed, size, share)
    distance = distances(mask)
    mixed = composite(generated, original, mask, feather)
    assert mixed.dtype == np.uint8
    np.testing.assert_array_equal(mixed[distance > feather], original[distance > feather])
    np.testing.assert_array_equal(mixed[mask == 1], generated[mask == 1])
    assert (mixed >= np.minimum(generated, original)).all()
    assert (mixed <= np.maximum(generated, original)).all()


@given(st.integers(0, 99), SIZES, st.integers(0, 30))
def test_the_seam_fades_with_the_distance(seed: int, size: tuple[int, int], feather: int) -> None:
    mask = random_mask(seed, size, 0.05)
    distance = distances(mask)
    expected = np.where(distance <= feather, 1 - distance / (feather + 1), 0)
    np.testing.assert_allclose(seam_weight(mask, feather), expected, atol=1e-6)


def test_a_straight_seam_by_hand() -> None:
    mask = np.array([[0, 0, 0, 0, 1]], np.float32)
    generated = np.full((1, 5, 3), 200, np.uint8)
    original = np.zeros((1, 5, 3), np.uint8)
    assert composite(generated, original, mask, 3)[0, :, 0].tolist() == [0, 50, 100, 150, 200]
    assert composite(generated, original, mask, 0)[0, :, 0].tolist() == [0, 0, 0, 0, 200]


def test_other_sizes_and_a_negative_feather_are_refused() -> None:
    image = np.zeros((4, 5, 3), np.uint8)
    mask = np.zeros((4, 5), np.float32)
    with pytest.raises(HipaError, match=r"shapes .*\(5, 4\)"):
        composite(image, image, mask.T, 0)
    with pytest.raises(HipaError, match="feather is -1"):
        composite(image, image, mask, -1)


@given(
    st.integers(0, 99), SIZES, st.sampled_from([1, 2, 8]), st.sampled_from([0.0, 0.02, 0.5, 1.0])
)
def test_the_latent_mask_covers_the_mask_and_no_cell_more(
    seed: int, cells: tuple[int, int], factor: int, share: float
) -> None:
    rows, columns = cells
    mask = random_mask(seed, (rows * factor, columns * factor), share)
    latent = latent_mask(mask, factor)
    assert latent.shape == (1, *cells)
    assert latent.dtype == np.float32
    enlarged = latent[0].repeat(factor, axis=0).repeat(factor, axis=1)
    assert (enlarged >= mask).all()
    for top, left in np.argwhere(latent[0]):
        assert mask[top * factor : (top + 1) * factor, left * factor : (left + 1) * factor].any()


def test_a_mask_that_does_not_fit_the_latent_grid() -> None:
    with pytest.raises(HipaError, match="multiples of 8"):
        latent_mask(np.zeros((16, 12), np.float32), 8)


def test_the_hole_is_hidden_and_other_pixels_are_kept() -> None:
    image = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    mask = random_mask(0, (4, 5), 0.5)
    before = image.copy()
    hidden = hide_hole(image, mask)
    assert hidden.dtype == np.uint8
    assert (hidden[mask == 1] == 127).all()
    np.testing.assert_array_equal(hidden[mask == 0], image[mask == 0])
    np.testing.assert_array_equal(image, before)


def test_masks_of_another_size_empty_or_full_are_refused() -> None:
    image = np.zeros((4, 5, 3), np.uint8)
    mask = np.zeros((4, 5), np.float32)
    with pytest.raises(HipaError, match="mask is 5x4 pixels, image 4x5"):
        check_mask(mask.T, image)
    with pytest.raises(HipaError, match="empty"):
        check_mask(mask, image)
    with pytest.raises(HipaError, match="full"):
        check_mask(mask + 1, image)
    mask[0, 0] = 1
    check_mask(mask, image)

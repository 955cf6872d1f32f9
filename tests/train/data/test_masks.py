from __future__ import annotations

import numpy as np
import pytest

from hipa_deploy.train.data.masks import random_mask


@pytest.mark.parametrize("coverage", [(0.05, 0.2), (0.1, 0.5), (0.4, 0.9)])
def test_masks_cover_the_share_that_is_wanted(coverage: tuple[float, float]) -> None:
    for seed in range(20):
        mask = random_mask(np.random.default_rng(seed), 40, 56, coverage)
        assert mask.shape == (40, 56)
        assert mask.dtype == np.float32
        assert set(np.unique(mask)) == {0.0, 1.0}
        assert coverage[0] <= mask.mean() <= coverage[1]


def test_a_mask_depends_on_its_seed_alone() -> None:
    first = random_mask(np.random.default_rng(3), 32, 32, (0.1, 0.5))
    again = random_mask(np.random.default_rng(3), 32, 32, (0.1, 0.5))
    other = random_mask(np.random.default_rng(4), 32, 32, (0.1, 0.5))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_share_that_no_shapes_have_becomes_a_box() -> None:
    mask = random_mask(np.random.default_rng(0), 32, 32, (0.98, 0.985))
    side = round(0.9825**0.5 * 32)
    assert mask[:side, :side].all()
    assert mask.sum() == side**2

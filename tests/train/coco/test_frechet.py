from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from hipa_deploy.errors import HipaError
from hipa_deploy.train.coco.frechet import Moments, distances_left_out, frechet_distance
from hipa_deploy.train.evaluation.intervals import jackknife_interval


class Pass(nn.Module):
    """Features in the place of images, for torchmetrics' distance."""

    num_features = 12

    def forward(self, x: Tensor) -> Tensor:
        return x.double()


def features(count: int, seed: int, shift: float = 0.0) -> np.ndarray:
    """Correlated features float32 [count, 12]."""
    generator = np.random.default_rng(seed)
    mixing = np.random.default_rng(7).normal(size=(12, 12))
    return (generator.normal(size=(count, 12)) @ mixing + shift).astype(np.float32)


@pytest.mark.parametrize("count", [400, 9])  # more and fewer images than features
def test_the_distance_is_torchmetrics(count: int) -> None:
    real = features(300, 0)
    made = features(count, 1, shift=0.5)
    theirs = FrechetInceptionDistance(feature=Pass(), normalize=True).set_dtype(torch.float64)
    theirs.update(torch.from_numpy(real), real=True)
    theirs.update(torch.from_numpy(made), real=False)
    ours = frechet_distance(Moments.of(real), made)
    assert ours == pytest.approx(float(theirs.compute()), rel=1e-6)


def test_the_distance_of_one_dimension_by_hand() -> None:
    # Means 1 and 4, variances 2 and 8: (4 - 1)^2 + 2 + 8 - 2 * sqrt(2 * 8).
    real = np.array([[0.0], [2.0]])
    made = np.array([[2.0], [6.0]])
    assert frechet_distance(Moments.of(real), made) == pytest.approx(9 + 10 - 8)


def test_a_set_is_at_no_distance_from_itself() -> None:
    real = features(50, 0)
    assert frechet_distance(Moments.of(real), real) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("count", [60, 20])  # both ways of computing them
def test_a_set_without_a_group_is_the_set_of_the_others(count: int) -> None:
    reference = Moments.of(features(100, 0))
    made = features(count, 1)
    got = distances_left_out(reference, made, groups=5)
    for group in range(5):
        kept = made[np.arange(count) % 5 != group]
        assert got[group] == pytest.approx(frechet_distance(reference, kept))


def test_the_interval_covers_the_distance_of_the_whole_distribution() -> None:
    """About 95 of 100 intervals of sets of 300 images hold the mean distance of such sets."""
    reference = Moments.of(features(2000, 0))
    made = [features(300, seed, shift=0.3) for seed in range(1, 101)]
    distances = [frechet_distance(reference, rows) for rows in made]
    covered = 0
    for rows, distance in zip(made, distances, strict=True):
        low, high = jackknife_interval(distance, distances_left_out(reference, rows))
        covered += low <= np.mean(distances) <= high
    assert 86 <= covered <= 100


@pytest.mark.parametrize("rows", [np.zeros((1, 4)), np.full((5, 4), np.nan)])
def test_what_has_no_moments(rows: np.ndarray) -> None:
    with pytest.raises(HipaError, match=r"Expected at least 2|not finite"):
        Moments.of(rows)

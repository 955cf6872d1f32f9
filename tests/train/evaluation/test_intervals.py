from __future__ import annotations

import numpy as np
import pytest
import torch

from hipa_deploy.train.evaluation.intervals import (
    draw_weights,
    interval,
    kid_of_draws,
    mean_of_draws,
)
from hipa_deploy.train.evaluation.quality import kernels, kid, other_prompts

PROMPTS = ["a", "b", "a", "c", "d", "e"]


def test_prompts_are_drawn_with_all_of_their_images() -> None:
    weights_RN = draw_weights(PROMPTS, draws=200)
    assert torch.equal(weights_RN[:, 0], weights_RN[:, 2])
    of_each_prompt = weights_RN[:, [0, 1, 3, 4, 5]]
    assert (of_each_prompt.sum(1) == 5).all()
    assert ((of_each_prompt > 0).sum(1) >= 2).all()
    assert torch.equal(weights_RN, draw_weights(PROMPTS, draws=200))


def test_a_draw_is_the_distance_of_the_images_that_were_drawn() -> None:
    """Against the distance of sets in which the images are really repeated."""
    generator = torch.Generator().manual_seed(0)
    a_ND = torch.randn(6, 5, generator=generator)
    b_ND = torch.randn(6, 5, generator=generator)
    weights_RN = draw_weights(PROMPTS, draws=20)
    got_R = kid_of_draws(kernels(a_ND, b_ND), other_prompts(PROMPTS, a_ND, b_ND), weights_RN)
    for weights_N, got in zip(weights_RN, got_R, strict=True):
        drawn = torch.repeat_interleave(torch.arange(6), weights_N.long())
        prompts = [PROMPTS[number] for number in drawn]
        assert got == pytest.approx(kid(a_ND[drawn], b_ND[drawn], prompts))


def test_the_interval_of_a_mean_covers_as_often_as_it_says() -> None:
    """Of 200 samples of 40 numbers each, about 95 % of the intervals hold the true mean."""
    generator = np.random.default_rng(1)
    weights_RN = draw_weights([str(number) for number in range(40)], draws=400)
    covered = 0
    for _ in range(200):
        values_N = torch.from_numpy(generator.exponential(1.0, 40))
        low, high = interval(mean_of_draws(values_N, weights_RN))
        covered += low <= 1.0 <= high
    assert 0.88 <= covered / 200 <= 0.98

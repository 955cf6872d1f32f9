from __future__ import annotations

import torch

from hipa_deploy.train.model.weight_average import WeightAverage


def test_the_average_follows_the_weights_and_can_replace_them() -> None:
    weights = {"a": torch.nn.Parameter(torch.zeros(2))}
    average = WeightAverage(weights, decay=0.5)
    with torch.no_grad():
        weights["a"].fill_(1.0)
    average.update(step=1)  # decay (1 + 1) / (10 + 1)
    assert torch.allclose(average.mean["a"], torch.full((2,), 9 / 11))
    average.update(step=1000)  # decay 0.5
    assert torch.allclose(average.mean["a"], torch.full((2,), 10 / 11))
    with average.applied():
        assert torch.equal(weights["a"], average.mean["a"])
    assert torch.equal(weights["a"], torch.ones(2))


def test_without_decay_the_weights_are_the_average() -> None:
    weights = {"a": torch.nn.Parameter(torch.ones(2))}
    average = WeightAverage(weights, decay=0)
    average.update(step=1)
    with average.applied():
        assert torch.equal(weights["a"], torch.ones(2))
    assert average.mean == {}

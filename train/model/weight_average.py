"""Exponential moving average of the weights that train."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class WeightAverage:
    """Exponential moving average of ``weights``, which stay where they are.

    Args:
        weights: The weights, by name. The average starts at their values.
        decay: In [0, 1). 0 keeps no average: ``applied`` then leaves the weights as they are.

    Example:
        >>> weights = {"a": torch.zeros(2)}
        >>> average = WeightAverage(weights, decay=0.5)
        >>> _ = weights["a"].fill_(1.0)
        >>> average.update(step=1000)
        >>> with average.applied():
        ...     weights["a"]
        tensor([0.5000, 0.5000])

    """

    def __init__(self, weights: Mapping[str, Tensor], decay: float) -> None:
        self.weights = weights
        self.decay = decay
        self.mean: dict[str, Tensor] = {}
        if decay:
            self.mean = {name: weight.detach().clone() for name, weight in weights.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after ``step`` steps.

        The decay rises to its value as (1 + step) / (10 + step), with the first step as 1.
        diffusers' EMAModel counts from 0 and so replaces the average at its first update: its
        averages are others (by 0.2 % after 50 steps), which a run that goes on must not get.
        Without that rise the average of a short run would be mostly its start, which for an
        adaptor is zero.
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, mean in self.mean.items():
            mean.lerp_(self.weights[name], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Replace the weights by their average inside the block."""
        saved = {name: self.weights[name].detach().clone() for name in self.mean}
        self._copy(self.mean)
        try:
            yield
        finally:
            self._copy(saved)

    def load(self, mean: Mapping[str, Tensor]) -> None:
        """Restore the average that a checkpoint stored."""
        for name, value in self.mean.items():
            value.copy_(mean[name])

    @torch.no_grad()
    def _copy(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self.weights[name].copy_(value)

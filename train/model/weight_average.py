"""Exponential moving average of the weights that train."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class Average:
    """``decay`` 0 keeps none: then the average is the weights themselves."""

    def __init__(self, weights: Mapping[str, Tensor], decay: float) -> None:
        self.weights, self.decay = weights, decay
        self.mean = (
            {name: weight.detach().clone() for name, weight in weights.items()} if decay else {}
        )

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after ``step`` steps; the decay rises as (1 + step) / (10 + step), as in diffusers.

        Without that a short run's average would be mostly the start, which for an adaptor is nothing.
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, mean in self.mean.items():
            mean.lerp_(self.weights[name], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let the weights be the average inside the block."""
        kept = {name: self.weights[name].detach().clone() for name in self.mean}
        self._copy(self.mean)
        try:
            yield
        finally:
            self._copy(kept)

    def load(self, mean: Mapping[str, Tensor]) -> None:
        """Take back what ``mean`` held at a checkpoint."""
        for name, value in self.mean.items():
            value.copy_(mean[name])

    @torch.no_grad()
    def _copy(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self.weights[name].copy_(value)

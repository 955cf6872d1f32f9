"""The best of a run's held-out measurements, and whether they have stopped getting better."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from hipa_deploy.errors import brief
from hipa_deploy.train.loop.checkpoint import damaged


class Plateau:
    """The best value so far, smaller is better, and the measurements in a row without a better one.

    Args:
        patience: So many in a row end the training; 0 never ends it.
        min_delta: A value is better if it is smaller by more than this.
        key: Of what is measured: values of another key cannot be compared.

    Example:
        >>> plateau = Plateau(patience=2, min_delta=0.0)
        >>> [plateau.take(value, step) for step, value in enumerate([0.3, 0.2, 0.25, 0.22])]
        [True, True, False, False]
        >>> plateau.best, plateau.step, plateau.ends
        (0.2, 1, True)

    """

    def __init__(self, patience: int, min_delta: float, key: str = "") -> None:
        self.patience = patience
        self.min_delta = min_delta
        self.key = key
        self.best = math.inf
        self.step = 0
        self.without = 0

    def take(self, value: float, step: int) -> bool:
        """Take in the value of a step, and return whether it is the best so far."""
        if value < self.best - self.min_delta:
            self.best = value
            self.step = step
            self.without = 0
            return True
        self.without += 1
        return False

    @property
    def ends(self) -> bool:
        """Whether the training should end here."""
        return bool(self.patience) and self.without >= self.patience

    def state(self) -> dict[str, Any]:
        """What a checkpoint stores."""
        values = {"best": self.best, "step": self.step, "without": self.without}
        return {**values, "key": self.key}

    def load(self, stored: Any, path: Path) -> None:
        """Go on from a checkpoint. Values of another measure, or none, are a new start.

        Raises:
            HipaError: the checkpoint is damaged.

        """
        if stored is None:
            return
        if not isinstance(stored, dict):
            raise damaged(path, "its held-out measurements are no table")
        best = stored.get("best")
        step: Any = stored.get("step")
        without: Any = stored.get("without")
        is_count = _is_count(step) and _is_count(without)
        if not isinstance(best, float) or math.isnan(best) or not is_count:
            raise damaged(path, f"its held-out measurements are {brief(stored)}")
        if stored.get("key") != self.key:
            return
        self.best = best
        self.step = int(step)
        self.without = int(without)

    def start_again(self) -> None:
        """Count from here: a run that is extended gets its patience anew."""
        self.without = 0


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 40

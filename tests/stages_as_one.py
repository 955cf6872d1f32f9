"""Stages as TensorRT runs them: all as one, and outputs on the device."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext

import numpy as np

from hipa_deploy.generate.runner import Runner
from hipa_deploy.generate.stages import HostStages, Tensors, Timer


class StagesAsOne(HostStages):
    """Runs ONNX Runtime's runners, timed as one; notes what it was fed and asked."""

    def __init__(self, runners: dict[str, Runner]) -> None:
        super().__init__("tensorrt", runners)
        self.log: list[tuple[list[str], tuple[str, ...]]] = []

    def run(self, feed: Mapping[str, np.ndarray], outputs, timer: Timer = nullcontext) -> Tensors:
        self.log.append((sorted(feed), tuple(outputs)))
        with timer("pipeline"):
            return super().run(feed, outputs)

    def run_on_device(self, feed: Mapping[str, np.ndarray]) -> Tensors:
        return self.run(feed, ("images",))

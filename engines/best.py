"""Which of several builds of one stage is fastest: TensorRT's choice of tactics varies from build to build."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import numpy as np

from hipa_deploy.bundle import StageSpec
from hipa_deploy.engines.flavour import Flavour
from hipa_deploy.runners import Runner

WARMUP, RUNS = 5, 30


def time_engine(path: Path, spec: StageSpec, flavour: Flavour) -> float:
    """Median latency in ms of an engine on this GPU, at its usual shapes, on inputs of ones.

    Raises:
        HipaError: no driver, or an engine that does not run.

    """
    from hipa_deploy.engines.runtime import TensorRTRunner

    inputs = {tensor.name: np.ones(tensor.at(spec.sizes("opt")), tensor.dtype) for tensor in spec.inputs}
    with TensorRTRunner(path, spec, flavour) as runner:
        samples = [_timed(runner, inputs) for _ in range(WARMUP + RUNS)]
    return statistics.median(samples[WARMUP:]) * 1e3


def _timed(runner: Runner, inputs: dict[str, np.ndarray]) -> float:
    started = time.perf_counter()
    runner(**inputs)
    return time.perf_counter() - started

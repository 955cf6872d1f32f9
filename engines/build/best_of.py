"""Which of several builds of one stage is fastest.

TensorRT's choice of tactics varies from build to build.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hipa_deploy.bundle.manifest import StageSpec
from hipa_deploy.engines.tensorrt.library import TensorRTLibrary

if TYPE_CHECKING:
    from hipa_deploy.engines.tensorrt.tensorrt_runner import TensorRTRunner

WARMUP, RUNS = 5, 30


def time_engine(path: Path, spec: StageSpec, library: TensorRTLibrary) -> float:
    """Median time in ms that an engine takes on this GPU, copies not included.

    It runs at its usual shapes, on inputs of ones.

    Raises:
        HipaError: no driver, or an engine that does not run.

    """
    from hipa_deploy.engines.tensorrt.tensorrt_runner import TensorRTRunner

    inputs = {
        tensor.name: np.ones(tensor.at(spec.sizes("opt")), tensor.dtype) for tensor in spec.inputs
    }
    with TensorRTRunner([(spec, path)], library) as runner:
        samples = [_timed(runner, inputs) for _ in range(WARMUP + RUNS)]
    return statistics.median(samples[WARMUP:])


def _timed(runner: TensorRTRunner, inputs: dict[str, np.ndarray]) -> float:
    runner(**inputs)
    return runner.device_ms or 0.0

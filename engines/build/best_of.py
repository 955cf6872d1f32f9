"""Which of several builds of one stage is fastest.

TensorRT times its tactics while it builds, and the timings are noisy. Two builds of one graph may
therefore choose different tactics and differ in speed.
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

# The first calls allocate memory and let the clocks rise, so they are not counted.
WARMUP = 5
RUNS = 30


def time_engine(
    path: Path, spec: StageSpec, library: TensorRTLibrary, barriers: tuple[str, ...] = ()
) -> float:
    """Measure the median time of an engine on this GPU, in milliseconds, without copies.

    The engine runs on inputs of ones, at the 'opt' sizes of its dimensions. ``barriers`` are
    outputs that its spec does not have.

    Raises:
        HipaError: there is no driver, or the engine does not run.

    """
    # Imported here, because the runner needs the CUDA bindings, and a build without a GPU does not.
    from hipa_deploy.engines.tensorrt.tensorrt_runner import TensorRTRunner

    sizes = spec.sizes("opt")
    inputs = {tensor.name: np.ones(tensor.at(sizes), tensor.dtype) for tensor in spec.inputs}
    with TensorRTRunner([(spec, path)], library, barriers={spec.name: barriers}) as runner:
        samples_ms = [_run_once(runner, inputs) for _ in range(WARMUP + RUNS)]
    return statistics.median(samples_ms[WARMUP:])


def _run_once(runner: TensorRTRunner, inputs: dict[str, np.ndarray]) -> float:
    runner(**inputs)
    return runner.device_ms or 0.0

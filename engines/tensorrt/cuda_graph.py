"""A CUDA graph: work that is recorded from a stream once and launched as one."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from hipa_deploy.engines.tensorrt.cuda import call


class CapturedGraph:
    """What ``enqueue`` puts on ``stream``, recorded and instantiated; nothing has run yet.

    The work must have run once before with the same shapes and addresses: TensorRT defers set-up to the first run,
    and set-up cannot be captured.

    Raises:
        HipaError: something in ``enqueue`` cannot be captured. The stream is usable again, and nothing is left.

    """

    def __init__(self, cudart: ModuleType, stream: Any, enqueue: Callable[[], None]) -> None:
        self._cudart = cudart
        call(
            cudart,
            "cudaStreamBeginCapture",
            stream,
            cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal,
        )
        try:
            enqueue()
        except BaseException:
            self._abandon(stream)
            raise
        graph = call(cudart, "cudaStreamEndCapture", stream)
        try:
            self._executable = call(cudart, "cudaGraphInstantiate", graph, 0)
        finally:
            call(cudart, "cudaGraphDestroy", graph)

    def _abandon(self, stream: Any) -> None:
        """Leave capture mode; what was recorded is of no use."""
        error, *graph = self._cudart.cudaStreamEndCapture(stream)
        if int(error) == 0 and graph and graph[0] is not None:
            call(self._cudart, "cudaGraphDestroy", graph[0])

    def launch(self, stream: Any) -> None:
        """Put the whole graph on ``stream``."""
        call(self._cudart, "cudaGraphLaunch", self._executable, stream)

    def close(self) -> None:
        """Release it; CUDA waits for a launch that is under way."""
        call(self._cudart, "cudaGraphExecDestroy", self._executable)

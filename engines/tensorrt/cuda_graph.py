"""A CUDA graph: work that is recorded from a stream once and launched as one."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from hipa_deploy.engines.tensorrt.cuda import call


class CapturedGraph:
    """A CUDA graph of everything that ``enqueue`` puts on ``stream``. Recording it runs nothing.

    The work must have run once before with the same shapes and addresses: TensorRT defers set-up to
    the first run, and set-up cannot be captured.

    Raises:
        HipaError: something in ``enqueue`` cannot be captured. The stream is usable again, and
            nothing leaks.

    """

    def __init__(self, cudart: ModuleType, stream: Any, enqueue: Callable[[], None]) -> None:
        self._cudart = cudart
        # Thread local: a CUDA call of another thread must not spoil the capture.
        mode = cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        call(cudart, "cudaStreamBeginCapture", stream, mode)
        try:
            enqueue()
        except BaseException:
            self._abandon(stream)
            raise
        graph = call(cudart, "cudaStreamEndCapture", stream)

        # Only the executable is launched; the graph that it is made from is no longer needed.
        try:
            self._executable = call(cudart, "cudaGraphInstantiate", graph, 0)
        finally:
            call(cudart, "cudaGraphDestroy", graph)

    def _abandon(self, stream: Any) -> None:
        """Leave capture mode and discard what was recorded.

        The call is unchecked: an error here would hide the one that led here.
        """
        error, *graph = self._cudart.cudaStreamEndCapture(stream)
        if int(error) == 0 and graph and graph[0] is not None:
            call(self._cudart, "cudaGraphDestroy", graph[0])

    def launch(self, stream: Any) -> None:
        """Put the whole graph on ``stream``."""
        call(self._cudart, "cudaGraphLaunch", self._executable, stream)

    def close(self) -> None:
        """Release the graph; CUDA waits for a launch that is under way."""
        call(self._cudart, "cudaGraphExecDestroy", self._executable)

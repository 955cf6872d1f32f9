"""Named buffers: device memory with its page-locked twin on the host, or one memory that both share."""

from __future__ import annotations

import ctypes
import math
from contextlib import ExitStack
from dataclasses import dataclass
from types import ModuleType

import numpy as np

from hipa_deploy.engines.tensorrt.cuda import call


@dataclass(frozen=True)
class Buffer:
    """A tensor at its largest. ``device`` is its address for the GPU, ``host`` a flat view of page-locked memory.

    ``shared``: both are the same memory, and nothing has to be copied.
    """

    device: int
    host: np.ndarray
    shared: bool

    def view(self, shape: tuple[int, ...]) -> np.ndarray:
        """The beginning of the host memory as an array of ``shape``."""
        return self.host[: math.prod(shape)].reshape(shape)


def shares_memory(cudart: ModuleType) -> bool:
    """Whether the first GPU is integrated (Jetson): its memory is the host's.

    There a tensor at the pipeline's edge lies in mapped page-locked memory, which the GPU reads without caching
    (CUDA for Tegra, 'Memory Selection'): right for what is read once, so engines keep activations in memory of their
    own.
    """
    return bool(
        call(cudart, "cudaDeviceGetAttribute", cudart.cudaDeviceAttr.cudaDevAttrIntegrated, 0)
    )


def allocate(
    cudart: ModuleType, dtype: np.dtype, count: int, shared: bool, stack: ExitStack
) -> Buffer:
    """A buffer for ``count`` elements; ``stack`` frees it.

    Raises:
        HipaError: CUDA has no memory left.

    """
    size = count * dtype.itemsize
    if shared:
        pinned = call(cudart, "cudaHostAlloc", size, cudart.cudaHostAllocMapped)
        stack.callback(call, cudart, "cudaFreeHost", pinned)
        device = call(cudart, "cudaHostGetDevicePointer", pinned, 0)
    else:
        device = call(cudart, "cudaMalloc", size)
        stack.callback(call, cudart, "cudaFree", device)
        pinned = call(cudart, "cudaMallocHost", size)
        stack.callback(call, cudart, "cudaFreeHost", pinned)
    raw = (ctypes.c_uint8 * size).from_address(pinned)
    return Buffer(device, np.ctypeslib.as_array(raw).view(dtype), shared)

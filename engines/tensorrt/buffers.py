"""Named buffers: device memory with a page-locked copy on the host, or one memory for both.

And the block of device memory in which stages hold their activations.
"""

from __future__ import annotations

import ctypes
import math
from contextlib import ExitStack
from dataclasses import dataclass
from types import ModuleType

import numpy as np

from hipa_deploy.engines.tensorrt.cuda import call
from hipa_deploy.errors import HipaError

# cudaMalloc aligns to this, as TensorRT wants of activations. An engine that needs none gets as
# much all the same: a context without any memory does not run.
_LEAST_BLOCK = 256


@dataclass(frozen=True)
class Buffer:
    """The memory of one tensor at its largest shape.

    Args:
        device: the address that the GPU uses.
        host: a flat view of page-locked host memory, in the tensor's dtype.
        shared: ``device`` and ``host`` are the same memory, and nothing has to be copied.

    """

    device: int
    host: np.ndarray
    shared: bool

    def view(self, shape: tuple[int, ...]) -> np.ndarray:
        """The beginning of the host memory as an array of ``shape``."""
        return self.host[: math.prod(shape)].reshape(shape)


def shares_memory(cudart: ModuleType) -> bool:
    """Whether the first GPU is integrated (Jetson): its memory is the host's.

    On such a GPU a stage's inputs and outputs lie in mapped page-locked memory, which the GPU reads
    without caching (CUDA for Tegra, 'Memory Selection'). That is right for data that is read once;
    activations lie in device memory (``ActivationBlock``).
    """
    integrated = cudart.cudaDeviceAttr.cudaDevAttrIntegrated
    return bool(call(cudart, "cudaDeviceGetAttribute", integrated, 0))


def allocate(
    cudart: ModuleType, dtype: np.dtype, count: int, shared: bool, stack: ExitStack
) -> Buffer:
    """Allocate a buffer.

    Args:
        cudart: the CUDA runtime.
        dtype: of the tensor.
        count: how many elements the tensor has at its largest shape.
        shared: one memory for host and GPU, where the GPU is integrated.
        stack: what frees the buffer when it closes.

    Raises:
        HipaError: CUDA has no memory left. What was allocated before is on ``stack``.

    """
    size = count * dtype.itemsize
    # Each memory goes on the stack before the next call, which may fail.
    if shared:
        pinned = call(cudart, "cudaHostAlloc", size, cudart.cudaHostAllocMapped)
        stack.callback(call, cudart, "cudaFreeHost", pinned)
        device = call(cudart, "cudaHostGetDevicePointer", pinned, 0)
    else:
        device = call(cudart, "cudaMalloc", size)
        stack.callback(call, cudart, "cudaFree", device)
        pinned = call(cudart, "cudaMallocHost", size)
        stack.callback(call, cudart, "cudaFreeHost", pinned)

    # A view without a copy: the memory belongs to ``stack``, and the view ends with it.
    raw = (ctypes.c_uint8 * size).from_address(pinned)
    return Buffer(device, np.ctypeslib.as_array(raw).view(dtype), shared)


class ActivationBlock:
    """One block of device memory for the activations of stages that run one after the other.

    Attributes:
        address: of the block on the device; 0 before ``reserve``.
        size: its bytes.

    """

    def __init__(self, cudart: ModuleType) -> None:
        self.address = 0
        self.size = 0
        self._cudart = cudart

    def reserve(self, size: int) -> None:
        """Make the block at least ``size`` bytes large. Its content and address may change.

        Raises:
            HipaError: CUDA has no such block left. There is no block then.

        """
        size = max(size, _LEAST_BLOCK)
        if size <= self.size:
            return
        # Freed first: both at once might not fit.
        self.free()
        try:
            self.address = call(self._cudart, "cudaMalloc", size)
        except HipaError as error:
            raise HipaError(
                f"no block of {-(-size >> 20):,} MiB is left on the GPU for the activations: "
                f"{str(error).rstrip('.')}. Close other programs; "
                "hipa-generate --low-memory takes less."
            ) from None
        self.size = size

    def free(self) -> None:
        """Give the block back. Calling it twice is harmless."""
        if self.size:
            self.size = 0
            call(self._cudart, "cudaFree", self.address)

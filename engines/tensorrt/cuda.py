"""The CUDA runtime through cuda-python, each call checked."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

from hipa_deploy.engines.device.jetson import jetson_model
from hipa_deploy.engines.tensorrt.library import TensorRTLibrary, missing
from hipa_deploy.errors import HipaError

# cuda-python 12.6.2 and newer, then 12.6.0.
_MODULES = ("cuda.bindings.runtime", "cuda.cudart")

NO_DEVICE = 100  # cudaErrorNoDevice
OLD_DRIVER = 35  # cudaErrorInsufficientDriver; CUDA says it where there is no driver, too


class CudaError(HipaError):
    """CUDA reported an error.

    Args:
        message: as ``HipaError`` has it.
        code: CUDA's number of the error.

    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def load_cudart(extra: TensorRTLibrary) -> ModuleType:
    """Import cuda-python's binding of the CUDA runtime.

    Args:
        extra: the extra of this package that an error tells the user to install; on Jetson the
            message names Jetson's extra instead.

    Raises:
        MissingDependencyError: cuda-python is not installed.
        HipaError: cuda-python is installed and does not load.

    """
    for name in _MODULES:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        except (ImportError, OSError, RuntimeError) as error:
            raise HipaError(
                f"cuda-python does not load ({error}). Is the NVIDIA driver installed?"
            ) from None
    raise missing("cuda-python", extra)


def check_driver(cudart: ModuleType) -> None:
    """Raise CudaError where the GPU's driver does not answer cuda-python.

    nvidia-smi shows a GPU all the same if its driver is older than cuda-python's CUDA.
    """
    call(cudart, "cudaGetDeviceCount")


def call(cudart: ModuleType, name: str, *arguments: Any) -> Any:
    """Call the function ``name`` of the CUDA runtime.

    cuda-python returns the error code first and the results after it.

    Returns:
        The function's first result, or None for a function without results.

    Raises:
        CudaError: CUDA reports an error; the message has the function's name and CUDA's own text.

    """
    error, *results = getattr(cudart, name)(*arguments)
    if int(error) != 0:
        # CUDA keeps its last error until it is read: TensorRT's next launch would find it, in
        # another engine too.
        cudart.cudaGetLastError()
        message = f"{name} failed: {describe_error(cudart, error)}."
        if int(error) == OLD_DRIVER:
            message = f"{message} {_newer_driver()}"
        raise CudaError(message, int(error))
    return results[0] if results else None


def _newer_driver() -> str:
    """What to do about a driver that is older than cuda-python's CUDA."""
    # A Jetson's driver comes with JetPack. That of JetPack 7 knows CUDA 13.
    if jetson_model() is not None:
        return "JetPack 6 needs cuda-python 12. Run: pip install 'cuda-python>=12.6,<13'"
    return (
        "The driver is older than cuda-python, or there is none: CUDA 13 needs driver 580 or "
        "newer. Update it, or install the packages for CUDA 12 (docs/tutorials/rtx.md)."
    )


def describe_error(cudart: ModuleType, error: Any) -> str:
    """CUDA's text for an error code, and the code.

    Example: 'CUDA driver version is insufficient for CUDA runtime version (error 35)'.
    """
    _, text = cudart.cudaGetErrorString(error)
    words = text.decode() if isinstance(text, bytes) else str(text)
    return f"{words} (error {int(error)})"

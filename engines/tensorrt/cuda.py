"""The CUDA runtime through cuda-python, each call checked."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

from hipa_deploy.engines.tensorrt.library import TensorRTLibrary, missing
from hipa_deploy.errors import HipaError

# cuda-python 12.6.2 and newer, then 12.6.0.
_MODULES = ("cuda.bindings.runtime", "cuda.cudart")


def load_cudart(extra: TensorRTLibrary) -> ModuleType:
    """Import cuda-python's binding of the CUDA runtime.

    Raises:
        MissingDependencyError: cuda-python is not installed; the message names ``extra``, or Jetson's.
        HipaError: it is installed and does not load.

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


def call(cudart: ModuleType, name: str, *arguments: Any) -> Any:
    """Call a CUDA runtime function; its one result, or None.

    Raises:
        HipaError: CUDA reports an error; the message has the function's name and CUDA's words.

    """
    error, *results = getattr(cudart, name)(*arguments)
    if int(error) != 0:
        raise HipaError(f"{name} failed: {describe_error(cudart, error)}.")
    return results[0] if results else None


def describe_error(cudart: ModuleType, error: Any) -> str:
    """CUDA's words for an error: 'CUDA driver version is insufficient for CUDA runtime version (error 35)'."""
    _, text = cudart.cudaGetErrorString(error)
    words = text.decode() if isinstance(text, bytes) else str(text)
    return f"{words} (error {int(error)})"

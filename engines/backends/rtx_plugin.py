"""NVIDIA's stand-alone plugin for ONNX Runtime, which has TensorRT-RTX inside.

The package is ``onnxruntime-ep-nv-tensorrt-rtx-cu13`` or ``-cu12``, by the CUDA of the driver
(https://nvidia.github.io/TensorRT-RTX-EP-ABI/). Facts here are those of version 0.5.0.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import re
import sys
import threading
from types import ModuleType
from typing import Any

from hipa_deploy.engines.device.jetson import jetson_model
from hipa_deploy.engines.tensorrt.gpu import Gpu, find_gpu
from hipa_deploy.errors import HipaError, first_line

BACKEND = "onnxruntime-rtx"
PROVIDER = "NvTensorRTRTXExecutionProvider"
# The number of NVIDIA among the vendors of PCI devices; ONNX Runtime finds memory by it.
NVIDIA = 0x10DE

_MODULE = "onnxruntime_ep_nv_tensorrt_rtx"
_PACKAGE = "onnxruntime-ep-nv-tensorrt-rtx"
_CUDA_VERSIONS = ("cu13", "cu12")
# Registered with an older ONNX Runtime, the plugin says 'Minimum supported API version is 24'.
_LEAST_ONNXRUNTIME = (1, 24)
_LEAST_PYTHON = (3, 11)  # of ONNX Runtime 1.24: pip finds no such version for an older one

# IsComputeCapabilitySupported in the package's tensorrt_rtx_provider_options.h: these two, and
# whatever is newer than the third.
_OLDER_SMS = (86, 89)
_NEWER_SMS = 120


def runs_on(sm: int) -> bool:
    """Whether the plugin takes a GPU of this compute capability (times ten).

    Example:
        >>> runs_on(86), runs_on(87), runs_on(90), runs_on(120)
        (True, False, False, True)

    """
    return sm in _OLDER_SMS or sm >= _NEWER_SMS


def installed_version() -> str | None:
    """The version of the installed plugin; None without one. The plugin is not loaded."""
    for cuda in _CUDA_VERSIONS:
        try:
            return importlib.metadata.version(f"{_PACKAGE}-{cuda}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def why_not_here(onnxruntime_version: str | None, gpu: Gpu | None) -> str | None:
    """Why the plugin cannot run on this machine, with what to do; None if nothing speaks against.

    Args:
        onnxruntime_version: of the installed ONNX Runtime; None without one.
        gpu: the machine's GPU; None without one.

    """
    if jetson_model() is not None:
        return "The plugin is not for Jetson. Use --backend tensorrt."
    if onnxruntime_version is None or _number(onnxruntime_version) < _LEAST_ONNXRUNTIME:
        if sys.version_info < _LEAST_PYTHON:
            return (
                "The plugin needs ONNX Runtime 1.24 or newer, which needs Python 3.11 or newer. "
                f"This is Python {platform.python_version()}. Make an environment with a newer one."
            )
        return "The plugin needs ONNX Runtime 1.24 or newer. Run: pip install 'onnxruntime>=1.24'"
    if installed_version() is None:
        if sys.platform == "linux" and platform.machine() != "x86_64":
            return "There is no package of the plugin for this processor. Use --backend tensorrt."
        return f"Run: {_install_command(gpu)}"
    if gpu is None:
        return "No NVIDIA GPU with a driver answers on this machine."
    if not runs_on(gpu.sm):
        return (
            f"The plugin does not take {gpu.name} (SM{gpu.sm}), only SM86, SM89, and SM120 and "
            "newer. Use --backend onnxruntime-cuda or tensorrt."
        )
    return None


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def _install_command(gpu: Gpu | None) -> str:
    """The pip command for the CUDA that the driver has; the newer one where it is not known."""
    older = gpu is not None and gpu.cuda is not None and _number(gpu.cuda) < (13,)
    return f"pip install {_PACKAGE}-{'cu12' if older else 'cu13'}"


_ONE_REGISTRATION = threading.Lock()


def plugin_device(onnxruntime: ModuleType) -> Any:
    """The first GPU that the plugin offers, as an OrtEpDevice; the plugin is registered for it.

    Raises:
        HipaError: the plugin is not installed, does not load, or takes no GPU of this machine.

    """
    with _ONE_REGISTRATION:
        if PROVIDER not in _REGISTERED:
            _register(onnxruntime)
            _REGISTERED.add(PROVIDER)
    for device in onnxruntime.get_ep_devices():
        if device.ep_name == PROVIDER:
            return device
    reason = why_not_here(onnxruntime.__version__, find_gpu())
    raise HipaError(
        f"backend {BACKEND}: the plugin offers no device. "
        + (reason or "Check that the driver is new enough for the plugin's CUDA: nvidia-smi")
    )


# ONNX Runtime refuses to register a library twice, and it stays for the life of the process.
_REGISTERED: set[str] = set()


def _register(onnxruntime: ModuleType) -> None:
    """Make the plugin's provider known to ONNX Runtime."""
    version = onnxruntime.__version__
    gpu = find_gpu()
    if jetson_model() is not None or _number(version) < _LEAST_ONNXRUNTIME:
        raise HipaError(f"backend {BACKEND}: {why_not_here(version, gpu)}")
    try:
        plugin = _load_package()
    except ModuleNotFoundError:
        raise HipaError(
            f"backend {BACKEND}: {_PACKAGE} is not installed. {why_not_here(version, gpu)}"
        ) from None
    try:
        onnxruntime.register_execution_provider_library(PROVIDER, plugin.get_library_path())
    except Exception as error:  # ONNX Runtime's errors share no base class of their own
        # Without a driver its libraries are missing (libcuda.so.1), and the plugin needs them.
        reason = why_not_here(version, gpu) or f"Run: {_install_command(gpu)}"
        raise HipaError(
            f"backend {BACKEND}: the plugin does not load ({first_line(error)}). {reason}"
        ) from None


def _load_package() -> ModuleType:
    """Import the plugin's package, and undo what that does to the environment.

    The package puts its folder in front of LD_LIBRARY_PATH. This process's own loader has read the
    variable long before, but a child, such as the one that builds engines, would then find this
    TensorRT-RTX in place of its own.
    """
    path = os.environ.get("LD_LIBRARY_PATH")
    try:
        return importlib.import_module(_MODULE)
    finally:
        if path is None:
            os.environ.pop("LD_LIBRARY_PATH", None)
        else:
            os.environ["LD_LIBRARY_PATH"] = path


def check_assignment(session: Any, stage: str) -> None:
    """Check that every node of ``session`` runs in the plugin.

    The session must have been opened with 'session.record_ep_graph_assignment_info'.

    Raises:
        HipaError: ONNX Runtime gave nodes to another provider, or gave none at all.

    """
    elsewhere = []
    count = 0
    for part in session.get_provider_graph_assignment_info():
        nodes = part.get_nodes()
        count += len(nodes)
        if part.ep_name != PROVIDER:
            elsewhere += [f"{node.op_type} on {part.ep_name}" for node in nodes]
    if elsewhere or not count:
        first = ", ".join(elsewhere[:3]) or "none of its nodes is assigned to it"
        raise HipaError(
            f"{stage}: {len(elsewhere)} nodes do not run on {PROVIDER} ({first}). "
            "Use --backend onnxruntime-cuda or rtx."
        )

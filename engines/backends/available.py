"""Which backends this machine can run. Pure data; nothing here raises."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import re

from hipa_deploy.engines.backends import rtx_plugin
from hipa_deploy.engines.device.jetson import jetson_model, l4t_release
from hipa_deploy.engines.device.machine import cpu_name, field_mib, os_name, read_text, usable_cores
from hipa_deploy.engines.tensorrt.cuda import check_driver, load_cudart
from hipa_deploy.engines.tensorrt.gpu import Gpu, find_gpu
from hipa_deploy.engines.tensorrt.library import TENSORRT_LIBRARIES, TensorRTLibrary, load_tensorrt
from hipa_deploy.errors import HipaError, MissingDependencyError
from hipa_deploy.record import Record

INSTALL_ONNXRUNTIME = "pip install onnxruntime"
# Both packages install the same module: the one without GPU has to go first. The extras are the
# libraries of CUDA and cuDNN: a driver alone has neither.
INSTALL_ONNXRUNTIME_GPU = "pip uninstall -y onnxruntime; pip install 'onnxruntime-gpu[cuda,cudnn]'"

# The backends of ONNX Runtime, and what it calls the execution provider of each.
PROVIDERS = {
    "onnxruntime": "CPUExecutionProvider",
    "onnxruntime-cuda": "CUDAExecutionProvider",
    "onnxruntime-tensorrt": "TensorrtExecutionProvider",
    rtx_plugin.BACKEND: rtx_plugin.PROVIDER,
}

NO_BF16 = "This CPU has no bfloat16 arithmetic. Use --backend openvino."
_NO_GPU = "No NVIDIA GPU with a driver answers on this machine."

# Processor flags with which OpenVINO multiplies bfloat16.
_BF16_FLAGS = r"\b(avx512_bf16|amx_bf16|avx_ne_convert)\b"


class Backend(Record):
    """A backend: installed or not, usable here or not, and otherwise the remedy.

    ``version`` is None where the backend is not installed, ``remedy`` where nothing is to be done.
    """

    name: str
    version: str | None
    usable: bool
    remedy: str | None


class Device(Record):
    """This machine. ``memory_mib`` is all of the host's memory; Jetson shares it with its GPU."""

    cpu: str
    cores: int
    memory_mib: int | None
    os: str
    arch: str
    python: str
    gpu: Gpu | None
    jetson: str | None
    l4t: str | None
    backends: tuple[Backend, ...]


ANOTHER_MACHINE = Device(
    cpu="",
    cores=1,
    memory_mib=0,
    os="",
    arch="",
    python="",
    gpu=None,
    jetson=None,
    l4t=None,
    backends=(),
)
"""For plans of a device elsewhere, also where this machine is one of its kind.

What is free here now says nothing of the time when a bundle is built there.
"""


def describe_device() -> Device:
    """Look at this machine: processor, memory, GPU, Jetson release and backends. Never raises."""
    gpu = find_gpu()
    backends = [*_onnxruntime_backends(gpu), *_openvino_backends()]
    for library in TENSORRT_LIBRARIES:
        backends.append(_engine_backend(library, gpu))
    return Device(
        cpu=cpu_name(),
        cores=usable_cores(),
        memory_mib=field_mib("/proc/meminfo", "MemTotal"),
        os=os_name(),
        arch=platform.machine(),
        python=platform.python_version(),
        gpu=gpu,
        jetson=jetson_model(),
        l4t=l4t_release(),
        backends=tuple(backends),
    )


def _onnxruntime_backends(gpu: Gpu | None) -> list[Backend]:
    version = None
    available: list[str] = []
    try:
        onnxruntime = importlib.import_module("onnxruntime")
        available = onnxruntime.get_available_providers()
        version = onnxruntime.__version__
    # AttributeError: an empty folder of that name imports as a package without content.
    except (ImportError, OSError, AttributeError):
        available = []

    backends = []
    for name, provider in PROVIDERS.items():
        if name == rtx_plugin.BACKEND:
            backends.append(_rtx_plugin_backend(version, gpu))
        else:
            backends.append(_onnxruntime_backend(name, version, provider in available, gpu))
    return backends


def _rtx_plugin_backend(onnxruntime_version: str | None, gpu: Gpu | None) -> Backend:
    """NVIDIA's plugin, by its package's metadata: loading it takes 300 MB."""
    remedy = rtx_plugin.why_not_here(onnxruntime_version, gpu)
    return Backend(
        name=rtx_plugin.BACKEND,
        version=rtx_plugin.installed_version(),
        usable=remedy is None,
        remedy=remedy,
    )


def _onnxruntime_backend(
    name: str, version: str | None, installed: bool, gpu: Gpu | None
) -> Backend:
    if not installed:
        remedy = f"Run: {INSTALL_ONNXRUNTIME}"
        if name != "onnxruntime":
            remedy = _how_to_get_gpu_provider(gpu)
        return Backend(name=name, version=None, usable=False, remedy=remedy)
    usable = name == "onnxruntime" or gpu is not None
    return Backend(name=name, version=version, usable=usable, remedy=None if usable else _NO_GPU)


def _how_to_get_gpu_provider(gpu: Gpu | None) -> str:
    """What to do for ONNX Runtime on a GPU: its package takes the place of the one for the CPU."""
    if jetson_model() is not None:
        return "The package onnxruntime-gpu of PyPI is not for Jetson. Use --backend tensorrt."
    return _NO_GPU if gpu is None else f"Run: {INSTALL_ONNXRUNTIME_GPU}"


def _openvino_backends() -> list[Backend]:
    """OpenVINO by its package's metadata and the processor's flags.

    Loading OpenVINO itself would cost every report of a device its time and memory.
    """
    names = ("openvino", "openvino-bf16")
    try:
        version = importlib.metadata.version("openvino")
    except importlib.metadata.PackageNotFoundError:
        remedy = str(MissingDependencyError("openvino", "openvino"))
        return [Backend(name=name, version=None, usable=False, remedy=remedy) for name in names]

    bf16 = re.search(_BF16_FLAGS, read_text("/proc/cpuinfo") or "") is not None
    plain, rounded = names
    return [
        Backend(name=plain, version=version, usable=True, remedy=None),
        Backend(name=rounded, version=version, usable=bf16, remedy=None if bf16 else NO_BF16),
    ]


def faster_on_cpu() -> str | None:
    """A backend that is usable here and clearly faster than ONNX Runtime on the CPU; None: none is.

    Only bfloat16 is: at SD 1.5's size it takes half the time (docs/explanation/measured.md).
    """
    for backend in _openvino_backends():
        if backend.name == "openvino-bf16" and backend.usable:
            return backend.name
    return None


def _engine_backend(library: TensorRTLibrary, gpu: Gpu | None) -> Backend:
    """A TensorRT library, which runs engines only together with cuda-python."""
    try:
        version = load_tensorrt(library).__version__
        cudart = load_cudart(library)
        # nvidia-smi may have found the GPU, with a driver that is too old for cuda-python.
        if gpu is not None:
            check_driver(cudart)
    except HipaError as error:
        remedy = str(error)
        # TensorRT builds on the GPU too; TensorRT-RTX builds without one.
        if library == "tensorrt" and gpu is None and jetson_model() is None:
            remedy = _NO_GPU
        return Backend(name=library, version=None, usable=False, remedy=remedy)
    usable = gpu is not None
    return Backend(name=library, version=version, usable=usable, remedy=None if usable else _NO_GPU)

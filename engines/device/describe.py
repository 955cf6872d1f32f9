"""What this machine is and which backends it can run. Pure data; nothing here raises."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

from hipa_deploy.engines.tensorrt.cuda import call, load_cudart
from hipa_deploy.engines.tensorrt.library import FLAVOURS, Flavour, load_tensorrt
from hipa_deploy.errors import HipaError, MissingDependencyError
from hipa_deploy.record import Record

INSTALL_ONNXRUNTIME = "pip install onnxruntime"
INSTALL_ONNXRUNTIME_GPU = "pip uninstall -y onnxruntime; pip install onnxruntime-gpu"
PROVIDERS = {
    "onnxruntime": "CPUExecutionProvider",
    "onnxruntime-cuda": "CUDAExecutionProvider",
    "onnxruntime-tensorrt": "TensorrtExecutionProvider",
}

_SMI_QUERY = (
    "nvidia-smi",
    "--query-gpu=name,compute_cap,memory.total",
    "--format=csv,noheader,nounits",
)


class Gpu(Record):
    """An NVIDIA GPU whose driver answers. ``sm`` is the compute capability times ten: 86 for 8.6."""

    name: str
    sm: int
    memory_mib: int
    integrated: bool | None
    driver: str | None
    cuda: str | None


class Backend(Record):
    """A backend: installed or not, usable here or not, and what to do about it."""

    name: str
    version: str | None
    usable: bool
    remedy: str | None


class Device(Record):
    """This machine. ``memory_mib`` is all of the host's memory, shared with the GPU on Jetson."""

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


def describe_device() -> Device:
    """Look at this machine: processor, memory, GPU, Jetson release and backends. Never raises."""
    gpu = find_gpu()
    return Device(
        cpu=_cpu_name(),
        cores=usable_cores(),
        memory_mib=_field_mib("/proc/meminfo", "MemTotal"),
        os=_os_name(),
        arch=platform.machine(),
        python=platform.python_version(),
        gpu=gpu,
        jetson=jetson_model(),
        l4t=l4t_release(),
        backends=(
            *_onnxruntime_backends(gpu),
            *_openvino_backends(),
            *(_engine_backend(flavour, gpu) for flavour in FLAVOURS),
        ),
    )


def find_gpu() -> Gpu | None:
    """The first NVIDIA GPU, or None without one or without its driver. Asks cuda-python, then nvidia-smi."""
    try:
        return _gpu_from_cuda()
    except (
        HipaError,
        RuntimeError,
        AttributeError,
    ):  # cuda-python raises the last two where libraries are missing
        return _gpu_from_smi()


def _gpu_from_cuda() -> Gpu:
    cudart = load_cudart("tensorrt")
    call(cudart, "cudaGetDeviceCount")  # fails without a driver
    properties = call(cudart, "cudaGetDeviceProperties", 0)
    name = properties.name
    return Gpu(
        name=(name.decode() if isinstance(name, bytes) else str(name)).rstrip("\0"),
        sm=properties.major * 10 + properties.minor,
        memory_mib=properties.totalGlobalMem >> 20,
        integrated=bool(properties.integrated),
        driver=_driver_version(),
        cuda=_cuda_version(call(cudart, "cudaDriverGetVersion")),
    )


def _cuda_version(number: int) -> str:
    """CUDA's 13020 as '13.2'."""
    return f"{number // 1000}.{number % 1000 // 10}"


def _gpu_from_smi() -> Gpu | None:
    try:
        answer = subprocess.run(
            _SMI_QUERY, capture_output=True, text=True, timeout=10, check=True
        ).stdout
        name, capability, memory_mib = (
            part.strip() for part in answer.splitlines()[0].rsplit(",", 2)
        )
        major, minor = capability.split(".")
        return Gpu(
            name=name,
            sm=int(major) * 10 + int(minor),
            memory_mib=int(memory_mib),
            integrated=None,
            driver=_driver_version(),
            cuda=None,
        )
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def _driver_version() -> str | None:
    return _read("/sys/module/nvidia/version")


def jetson_model() -> str | None:
    """'NVIDIA Jetson Orin Nano Developer Kit', or None elsewhere."""
    model = _read("/proc/device-tree/model")
    return model if model and ("jetson" in model.lower() or "nvidia" in model.lower()) else None


def l4t_release(text: str | None = None) -> str | None:
    """The Jetson Linux release, '36.4.3', from /etc/nv_tegra_release (or ``text``, its content); None elsewhere."""
    text = text if text is not None else _read("/etc/nv_tegra_release")
    match = re.search(r"R(\d+)[^,]*,\s*REVISION:\s*([\d.]+)", text or "")
    return f"{match[1]}.{match[2]}" if match else None


def peak_rss_mib() -> int | None:
    """The most memory this process has held, in MiB; None where /proc is absent.

    Not ``getrusage``: its maximum includes the parent's memory at the fork.
    """
    return _field_mib("/proc/self/status", "VmHWM")


def available_memory_mib() -> int | None:
    """Host memory that new allocations can have without swapping, in MiB; None where /proc is absent.

    The kernel's own estimate, or what a container's limit leaves of it.
    """
    free, limit = _field_mib("/proc/meminfo", "MemAvailable"), _read("/sys/fs/cgroup/memory.max")
    used = _read("/sys/fs/cgroup/memory.current")
    if free is None or not (limit and limit.isdigit() and used):
        return free
    droppable = re.search(
        r"^inactive_file (\d+)$", _read("/sys/fs/cgroup/memory.stat") or "", re.MULTILINE
    )
    held = int(used) - (int(droppable[1]) if droppable else 0)
    return max(min(free, (int(limit) - held) >> 20), 0)


def free_swap_mib() -> int:
    """Free swap space in MiB; 0 where /proc is absent."""
    return _field_mib("/proc/meminfo", "SwapFree") or 0


def usable_cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(errors="replace").strip("\0\n ") or None
    except OSError:
        return None


def _field_mib(path: str, field: str) -> int | None:
    """The field of a /proc file that is written as 'Field:  1234 kB'."""
    match = re.search(rf"^{field}:\s*(\d+) kB", _read(path) or "", re.MULTILINE)
    return int(match[1]) >> 10 if match else None


def _cpu_name() -> str:
    match = re.search(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo") or "", re.MULTILINE)
    return match[1] if match else platform.processor() or "unknown"


def _os_name() -> str:
    with contextlib.suppress(OSError):
        return platform.freedesktop_os_release().get("PRETTY_NAME", platform.platform())
    return platform.platform()


def _onnxruntime_backends(gpu: Gpu | None) -> list[Backend]:
    try:
        onnxruntime = importlib.import_module("onnxruntime")
        version, available = onnxruntime.__version__, onnxruntime.get_available_providers()
    except (ImportError, OSError, AttributeError):
        version, available = None, []
    return [
        _onnxruntime_backend(name, version, provider in available, gpu)
        for name, provider in PROVIDERS.items()
    ]


def _onnxruntime_backend(
    name: str, version: str | None, installed: bool, gpu: Gpu | None
) -> Backend:
    if not installed:
        remedy = INSTALL_ONNXRUNTIME if name == "onnxruntime" else INSTALL_ONNXRUNTIME_GPU
        return Backend(name=name, version=None, usable=False, remedy=f"Run: {remedy}")
    usable = name == "onnxruntime" or gpu is not None
    return Backend(name=name, version=version, usable=usable, remedy=None if usable else _NO_GPU)


def _openvino_backends() -> list[Backend]:
    """By its metadata and the processor's flags: loading OpenVINO would cost every profile its time and memory."""
    try:
        version = importlib.metadata.version("openvino")
    except importlib.metadata.PackageNotFoundError:
        absent = str(MissingDependencyError("openvino", "openvino"))
        return [
            Backend(name=name, version=None, usable=False, remedy=absent)
            for name in ("openvino", "openvino-bf16")
        ]
    bf16 = re.search(_BF16_FLAGS, _read("/proc/cpuinfo") or "") is not None
    return [
        Backend(name="openvino", version=version, usable=True, remedy=None),
        Backend(
            name="openvino-bf16", version=version, usable=bf16, remedy=None if bf16 else NO_BF16
        ),
    ]


def _engine_backend(flavour: Flavour, gpu: Gpu | None) -> Backend:
    try:
        version = load_tensorrt(flavour).__version__
        load_cudart(flavour)
    except HipaError as error:
        return Backend(name=flavour, version=None, usable=False, remedy=str(error))
    return Backend(
        name=flavour, version=version, usable=gpu is not None, remedy=None if gpu else _NO_GPU
    )


NO_BF16 = "This CPU has no bfloat16 arithmetic. Use --backend openvino."
_BF16_FLAGS = (
    r"\b(avx512_bf16|amx_bf16|avx_ne_convert)\b"  # with which OpenVINO multiplies bfloat16
)
_NO_GPU = "No NVIDIA GPU with a driver answers on this machine."

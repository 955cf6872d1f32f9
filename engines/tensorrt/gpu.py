"""The first NVIDIA GPU, as CUDA or nvidia-smi describe it."""

from __future__ import annotations

import subprocess

from hipa_deploy.engines.device.machine import read_text
from hipa_deploy.engines.tensorrt.cuda import call, load_cudart
from hipa_deploy.errors import HipaError
from hipa_deploy.record import Record

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
    return read_text("/sys/module/nvidia/version")

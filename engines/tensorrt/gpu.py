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
_SMI_TIMEOUT_S = 10


class Gpu(Record):
    """An NVIDIA GPU whose driver answers.

    ``sm`` is the compute capability times ten: 86 for 8.6. ``integrated`` is None where only
    nvidia-smi answered, and so is ``cuda``, the newest CUDA version that the driver supports.
    """

    name: str
    sm: int
    memory_mib: int
    integrated: bool | None
    driver: str | None
    cuda: str | None


def find_gpu() -> Gpu | None:
    """The first NVIDIA GPU, or None without one or without its driver.

    It asks cuda-python first, then nvidia-smi. It never raises.
    """
    try:
        return _gpu_from_cuda()
    # cuda-python raises RuntimeError and AttributeError where libraries are missing.
    except (HipaError, RuntimeError, AttributeError):
        return _gpu_from_smi()


def _gpu_from_cuda() -> Gpu:
    cudart = load_cudart("tensorrt")
    call(cudart, "cudaGetDeviceCount")  # fails without a driver
    properties = call(cudart, "cudaGetDeviceProperties", 0)
    name = properties.name
    if isinstance(name, bytes):
        name = name.decode()
    return Gpu(
        name=str(name).rstrip("\0"),
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
    """The first GPU by nvidia-smi's table: 'NVIDIA GeForce RTX 4090, 8.9, 24564'."""
    try:
        answer = subprocess.run(
            _SMI_QUERY,
            capture_output=True,
            text=True,
            timeout=_SMI_TIMEOUT_S,
            check=True,
            encoding="utf-8",
        )
        # From the right: a name may have a comma in it.
        name, capability, memory_mib = answer.stdout.splitlines()[0].rsplit(",", 2)
        major, minor = capability.strip().split(".")
        return Gpu(
            name=name.strip(),
            sm=int(major) * 10 + int(minor),
            memory_mib=int(memory_mib),
            integrated=None,
            driver=_driver_version(),
            cuda=None,
        )
    # No nvidia-smi, one that fails, or an answer that is no table: there is no usable GPU.
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def _driver_version() -> str | None:
    return read_text("/sys/module/nvidia/version")

"""The first NVIDIA GPU, as CUDA or nvidia-smi describe it."""

from __future__ import annotations

import subprocess

from hipa_deploy.engines.device.machine import field_mib, read_text
from hipa_deploy.engines.device.nvidia_smi import (
    first_visible,
    first_visible_number,
    hides_all_gpus,
)
from hipa_deploy.engines.tensorrt.cuda import NO_DEVICE, CudaError, call, load_cudart
from hipa_deploy.errors import HipaError
from hipa_deploy.record import Record

_SMI_QUERY = (
    "nvidia-smi",
    "--query-gpu=name,compute_cap,memory.total",
    "--format=csv,noheader,nounits",
)
_SMI_TIMEOUT_S = 10
# Where the GPU has no memory of its own, as on a DGX Spark, nvidia-smi gives these for its size.
_NO_MEMORY_OF_ITS_OWN = ("[N/A]", "[Not Supported]")


class Gpu(Record):
    """An NVIDIA GPU whose driver answers.

    ``sm`` is the compute capability times ten: 86 for 8.6. Where only nvidia-smi answered,
    ``cuda``, the newest CUDA version that the driver supports, is None. So is ``integrated`` there,
    unless the GPU has no memory of its own: then ``memory_mib`` is the host's.
    """

    name: str
    sm: int
    memory_mib: int
    integrated: bool | None
    driver: str | None
    cuda: str | None


def find_gpu() -> Gpu | None:
    """The first NVIDIA GPU that CUDA may use, or None without one or without its driver.

    It asks cuda-python first, then nvidia-smi. It never raises.
    """
    # nvidia-smi shows these GPUs all the same.
    if hides_all_gpus():
        return None
    try:
        return _gpu_from_cuda()
    except CudaError as error:
        # CUDA knows best, as of a GPU in MIG mode that has no instance.
        return None if error.code == NO_DEVICE else _gpu_from_smi()
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


def find_gpu_address() -> str | None:
    """The PCI address of the GPU that CUDA calls the first, by which nvidia-smi knows it too.

    None where CUDA does not answer. It never raises.

    Example:
        >>> find_gpu_address()
        '00000000:3b:00.0'

    """
    try:
        properties = call(load_cudart("tensorrt"), "cudaGetDeviceProperties", 0)
        place = (properties.pciDomainID, properties.pciBusID, properties.pciDeviceID)
    # As in ``find_gpu``.
    except (HipaError, RuntimeError, AttributeError):
        return None
    return "{:08x}:{:02x}:{:02x}.0".format(*place)


def _cuda_version(number: int) -> str:
    """CUDA's 13020 as '13.2'."""
    return f"{number // 1000}.{number % 1000 // 10}"


def _gpu_from_smi() -> Gpu | None:
    """CUDA's first GPU by nvidia-smi's table: 'NVIDIA GeForce RTX 4090, 8.9, 24564'."""
    command = list(_SMI_QUERY)
    number = first_visible_number()
    chosen = first_visible()
    if chosen is not None:
        command.append(f"--id={chosen}")
        number = 0  # the table then has this GPU alone
    try:
        answer = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=_SMI_TIMEOUT_S,
            check=True,
            encoding="utf-8",
        )
        # CUDA may count different GPUs in another order. nvidia-smi's is taken: whoever gave a
        # number has most likely read it there.
        line = answer.stdout.splitlines()[number]
        # From the right: a name may have a comma in it.
        name, capability, memory_mib = line.rsplit(",", 2)
        major, minor = capability.strip().split(".")
        integrated = None
        if memory_mib.strip() in _NO_MEMORY_OF_ITS_OWN:
            integrated = True
            memory_mib = str(field_mib("/proc/meminfo", "MemTotal"))
        return Gpu(
            name=name.strip(),
            sm=int(major) * 10 + int(minor),
            memory_mib=int(memory_mib),
            integrated=integrated,
            driver=_driver_version(),
            cuda=None,
        )
    # No nvidia-smi, one that fails, or an answer that is no table: there is no usable GPU.
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def _driver_version() -> str | None:
    return read_text("/sys/module/nvidia/version")

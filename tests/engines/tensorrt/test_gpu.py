"""The first GPU as nvidia-smi describes it, where cuda-python cannot."""

from __future__ import annotations

import subprocess
from types import SimpleNamespace

import pytest

from hipa_deploy.engines.device.machine import field_mib
from hipa_deploy.engines.tensorrt import gpu as gpu_module
from hipa_deploy.engines.tensorrt.cuda import NO_DEVICE, CudaError
from hipa_deploy.engines.tensorrt.gpu import find_gpu, find_gpu_address
from hipa_deploy.errors import HipaError

TWO_GPUS = "NVIDIA GeForce RTX 3090, 8.6, 24576\nNVIDIA GeForce RTX 4090, 8.9, 24564\n"


@pytest.fixture(autouse=True)
def no_choice_of_gpus(monkeypatch):
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
        monkeypatch.delenv(name, raising=False)


def fake_smi(monkeypatch, code: int | None = None) -> list[list[str]]:
    """Two GPUs by nvidia-smi; CUDA gives an error, or is not installed.

    Returns the list of commands that nvidia-smi gets.
    """
    commands = []

    def run(command, **more):
        commands.append(command)
        rows = TWO_GPUS.splitlines(keepends=True)
        if "--id=1" in command or "--id=GPU-4090" in command:
            rows = rows[1:]
        return subprocess.CompletedProcess(command, 0, stdout="".join(rows))

    def no_cuda():
        if code is None:
            raise HipaError("no cuda-python")
        raise CudaError("cudaGetDeviceCount failed", code)

    monkeypatch.setattr(gpu_module, "_gpu_from_cuda", no_cuda)
    monkeypatch.setattr(subprocess, "run", run)
    return commands


@pytest.mark.parametrize("visible", ["", " ", "-1", "-1,0", "NoDevFiles", "none"])
def test_gpus_that_the_environment_hides_are_none(monkeypatch, visible):
    commands = fake_smi(monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert find_gpu() is None
    assert commands == []


def test_where_cuda_has_no_device_nvidia_smi_is_not_asked(monkeypatch):
    commands = fake_smi(monkeypatch, NO_DEVICE)
    assert find_gpu() is None
    assert commands == []
    # A driver that is too old for cuda-python still answers.
    fake_smi(monkeypatch, 35)
    assert find_gpu().sm == 86


@pytest.mark.parametrize(
    ("order", "visible", "sm"),
    [
        (None, None, 86),
        (None, "0,1", 86),
        (None, "1", 89),
        ("PCI_BUS_ID", "1,0", 89),
        (None, "GPU-4090", 89),
        (None, "MIG-1", 86),
    ],
)
def test_the_gpu_that_the_environment_chooses_is_described(monkeypatch, order, visible, sm):
    fake_smi(monkeypatch)
    if order:
        monkeypatch.setenv("CUDA_DEVICE_ORDER", order)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert find_gpu().sm == sm


def test_a_gpu_that_is_not_there_is_none(monkeypatch):
    fake_smi(monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
    assert find_gpu() is None


def test_nvidia_smi_serves_without_cuda_python(monkeypatch):
    def answer(command, **more):
        return subprocess.CompletedProcess(
            command, 0, stdout="NVIDIA GeForce RTX 4090, 8.9, 24564\n"
        )

    def no_cuda():
        raise HipaError("no cuda-python")

    monkeypatch.setattr(gpu_module, "_gpu_from_cuda", no_cuda)
    monkeypatch.setattr(subprocess, "run", answer)
    gpu = find_gpu()
    assert (gpu.name, gpu.sm, gpu.memory_mib) == ("NVIDIA GeForce RTX 4090", 89, 24564)


@pytest.mark.parametrize("stdout", ["", "No devices were found\n", "X, [N/A], 1\n"])
def test_a_useless_nvidia_smi_is_no_gpu(monkeypatch, stdout):
    monkeypatch.setattr(
        subprocess,
        "run",
        lambda command, **more: subprocess.CompletedProcess(command, 0, stdout=stdout),
    )
    assert gpu_module._gpu_from_smi() is None


@pytest.mark.parametrize("memory", ["[N/A]", "[Not Supported]"])
def test_a_gpu_without_memory_of_its_own_has_the_hosts(monkeypatch, memory):
    # Of a DGX Spark: https://github.com/XuehaiPan/nvitop/pull/208.
    answer = subprocess.CompletedProcess([], 0, stdout=f"NVIDIA GB10, 12.1, {memory}\n")
    monkeypatch.setattr(subprocess, "run", lambda command, **more: answer)
    gpu = gpu_module._gpu_from_smi()
    assert (gpu.name, gpu.sm, gpu.integrated) == ("NVIDIA GB10", 121, True)
    assert gpu.memory_mib == field_mib("/proc/meminfo", "MemTotal")


def test_the_address_of_cudas_first_gpu_is_written_as_nvidia_smi_takes_it(monkeypatch):
    properties = SimpleNamespace(pciDomainID=0, pciBusID=0x3B, pciDeviceID=0)
    cudart = SimpleNamespace(cudaGetDeviceProperties=lambda device: (0, properties))
    monkeypatch.setattr(gpu_module, "load_cudart", lambda library: cudart)
    assert find_gpu_address() == "00000000:3b:00.0"

    def no_cuda(library):
        raise HipaError("no cuda-python")

    monkeypatch.setattr(gpu_module, "load_cudart", no_cuda)
    assert find_gpu_address() is None

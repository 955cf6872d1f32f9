"""The first GPU as nvidia-smi describes it, where cuda-python cannot."""

from __future__ import annotations

import subprocess

import pytest

from hipa_deploy.engines.tensorrt import gpu as gpu_module
from hipa_deploy.engines.tensorrt.gpu import find_gpu
from hipa_deploy.errors import HipaError


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

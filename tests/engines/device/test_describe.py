from __future__ import annotations

import importlib
import subprocess

import pytest

from hipa_deploy.engines.device import describe as device
from hipa_deploy.engines.device.describe import Device, describe_device, find_gpu, l4t_release
from hipa_deploy.errors import HipaError
from hipa_deploy.generate.runner import BACKENDS


def test_it_describes_this_machine():
    found = describe_device()
    assert found.cores >= 1
    assert found.memory_mib > 100
    assert found.arch
    assert Device.model_validate_json(found.model_dump_json()) == found
    backends = {backend.name: backend for backend in found.backends}
    assert set(backends) == set(BACKENDS) - {"auto"}
    assert backends["onnxruntime"].usable
    assert all(backend.usable or backend.remedy for backend in found.backends)


@pytest.mark.parametrize(
    ("flags", "bf16"), [("fpu avx512_bf16 sse", True), ("fpu sse asimd bf16", False)]
)
def test_bfloat16_is_usable_where_openvino_multiplies_it(monkeypatch, flags, bf16):
    pytest.importorskip("openvino")
    monkeypatch.setattr(
        device, "_read", lambda path: f"flags : {flags}" if path == "/proc/cpuinfo" else None
    )
    backends = {backend.name: backend for backend in describe_device().backends}
    assert backends["openvino"].usable
    assert backends["openvino-bf16"].usable == bf16
    assert backends["openvino-bf16"].remedy == (None if bf16 else device.NO_BF16)


def test_it_does_not_raise_where_everything_is_missing(monkeypatch):
    def absent(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    def no_command(*args, **more):
        raise FileNotFoundError(args[0])

    monkeypatch.setattr(importlib, "import_module", absent)
    monkeypatch.setattr(subprocess, "run", no_command)
    monkeypatch.setattr(device, "_read", lambda path: None)
    found = describe_device()
    assert (found.gpu, found.jetson, found.l4t, found.memory_mib) == (None, None, None, None)
    remedies = {backend.name: backend.remedy for backend in found.backends}
    assert remedies["onnxruntime"] == "Run: pip install onnxruntime"
    for provider in ("onnxruntime-cuda", "onnxruntime-tensorrt"):
        assert (
            remedies[provider] == "Run: pip uninstall -y onnxruntime; pip install onnxruntime-gpu"
        )
    assert remedies["tensorrt"].endswith("pip install 'hipa-deploy[tensorrt]'")
    assert remedies["rtx"].endswith("pip install 'hipa-deploy[rtx]'")


def test_nvidia_smi_serves_without_cuda_python(monkeypatch):
    def answer(command, **more):
        return subprocess.CompletedProcess(
            command, 0, stdout="NVIDIA GeForce RTX 4090, 8.9, 24564\n"
        )

    def no_cuda():
        raise HipaError("no cuda-python")

    monkeypatch.setattr(device, "_gpu_from_cuda", no_cuda)
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
    assert device._gpu_from_smi() is None


@pytest.mark.parametrize(
    ("text", "release"),
    [
        ("# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64", "36.4.3"),
        ("# R35 (release), REVISION: 3.1, GCID: 32827747, BOARD: t186ref, EABI: aarch64", "35.3.1"),
        ("", None),
        ("nonsense", None),
    ],
)
def test_the_jetson_release(text, release):
    assert l4t_release(text) == release

"""Which backends a machine can run, and the remedy for those that it cannot."""

from __future__ import annotations

import importlib
import subprocess
from types import SimpleNamespace

import pytest

from hipa_deploy.engines.backends import available
from hipa_deploy.engines.backends.available import NO_BF16, Backend, Device, describe_device
from hipa_deploy.engines.tensorrt import cuda
from hipa_deploy.engines.tensorrt.gpu import Gpu
from hipa_deploy.generate.runner import BACKENDS
from tests.engines.engine_samples import RTX_4090
from tests.engines.machine_samples import imitate_files


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
    imitate_files(monkeypatch, lambda path: f"flags : {flags}" if path == "/proc/cpuinfo" else None)
    backends = {backend.name: backend for backend in describe_device().backends}
    assert backends["openvino"].usable
    assert backends["openvino-bf16"].usable == bf16
    assert backends["openvino-bf16"].remedy == (None if bf16 else NO_BF16)


def test_it_does_not_raise_where_everything_is_missing(monkeypatch):
    def absent(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    def no_command(*args, **more):
        raise FileNotFoundError(args[0])

    monkeypatch.setattr(importlib, "import_module", absent)
    monkeypatch.setattr(subprocess, "run", no_command)
    imitate_files(monkeypatch, lambda path: None)
    found = describe_device()
    assert (found.gpu, found.jetson, found.l4t, found.memory_mib) == (None, None, None, None)
    remedies = {backend.name: backend.remedy for backend in found.backends}
    assert remedies["onnxruntime"] == "Run: pip install onnxruntime"
    # What needs a GPU is not worth an installation where none answers.
    for name in ("onnxruntime-cuda", "onnxruntime-tensorrt", "tensorrt"):
        assert remedies[name] == "No NVIDIA GPU with a driver answers on this machine."
    assert remedies["rtx"].endswith("pip install 'hipa-deploy[rtx]'")


def test_how_to_get_onnxruntime_on_a_gpu(monkeypatch):
    def remedies(gpu: Gpu | None) -> set[str | None]:
        backends = available._onnxruntime_backends(gpu)
        return {each.remedy for each in backends if each.name.endswith(("-cuda", "-tensorrt"))}

    command = "Run: pip uninstall -y onnxruntime; pip install 'onnxruntime-gpu[cuda,cudnn]'"
    assert remedies(RTX_4090) == {command}
    monkeypatch.setattr(available, "jetson_model", lambda: "NVIDIA Jetson Orin Nano")
    (remedy,) = remedies(None)
    assert "not for Jetson. Use --backend tensorrt" in remedy


@pytest.mark.parametrize(
    ("jetson", "remedy"),
    [
        (None, "CUDA 13 needs driver 580 or newer. Update it"),
        ("NVIDIA Jetson Orin Nano", "Run: pip install 'cuda-python>=12.6,<13'"),
    ],
)
def test_a_driver_older_than_cuda_python_is_told_with_its_remedy(monkeypatch, jetson, remedy):
    """nvidia-smi answers with any driver: the GPU is known, and CUDA does not work."""
    cudart = SimpleNamespace(
        cudaGetDeviceCount=lambda: (35, None),
        cudaGetLastError=lambda: (35,),
        cudaGetErrorString=lambda error: (0, b"CUDA driver version is insufficient"),
    )
    library = SimpleNamespace(__version__="1.7.1")
    monkeypatch.setattr(available, "load_tensorrt", lambda name: library)
    monkeypatch.setattr(available, "load_cudart", lambda name: cudart)
    monkeypatch.setattr(cuda, "jetson_model", lambda: jetson)
    found = available._engine_backend("rtx", RTX_4090)
    assert not found.usable
    assert "version is insufficient (error 35). " in found.remedy
    assert remedy in found.remedy


def test_bfloat16_is_faster_where_it_is_usable(monkeypatch):
    def openvino(usable: bool) -> list[Backend]:
        rest = {"version": "1", "remedy": None}
        return [
            Backend(name="openvino", usable=True, **rest),
            Backend(name="openvino-bf16", usable=usable, **rest),
        ]

    monkeypatch.setattr(available, "_openvino_backends", lambda: openvino(True))
    assert available.faster_on_cpu() == "openvino-bf16"
    monkeypatch.setattr(available, "_openvino_backends", lambda: openvino(False))
    assert available.faster_on_cpu() is None

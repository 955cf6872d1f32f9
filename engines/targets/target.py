"""Where an engine is to run: this GPU, or GPUs named ahead of time (``targets/*.toml``)."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Literal

from pydantic import Field

from hipa_deploy.engines.backends.available import Device
from hipa_deploy.engines.device.jetson import l4t_release
from hipa_deploy.engines.targets.build_options import BuildOptions
from hipa_deploy.engines.tensorrt.gpu import Gpu
from hipa_deploy.engines.tensorrt.library import TensorRTLibrary, compilable
from hipa_deploy.errors import HipaError
from hipa_deploy.record import Record

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PORTABLE = (86, 89, 120)  # RTX 30, 40 and 50
_FOLDER = Path(__file__).parent


class TargetProfile(Record):
    """A target's data file. Units are in the names; ``memory_shared`` means shared with the CPU.

    Rates are peaks at the vendor's highest rated clock, dense, a multiplication and an addition counted as two:
    FP16 and TF32 in tensor cores, FP32 in CUDA cores. ``fp16_accumulate`` is the type in which ``fp16_tflops`` adds
    up products; 'either' where FP16 and FP32 are as fast. None: not known, or a family of cards that differ.
    ``gpu_name`` is a regular expression found in what the device calls its GPU, or on Jetson its module. ``build``
    holds build options that suit it, where TensorRT's own defaults do not.
    """

    title: str
    sm: int
    memory_gib: int | None = None
    memory_shared: bool
    bandwidth_gb_s: float | None = Field(default=None, gt=0)
    fp16_tflops: float | None = Field(default=None, gt=0)
    fp16_accumulate: Literal["fp16", "fp32", "either", "not stated"] | None = None
    tf32_tflops: float | None = Field(default=None, gt=0)
    fp32_tflops: float | None = Field(default=None, gt=0)
    gpu_name: str | None = None
    build: BuildOptions = BuildOptions()

    def is_device(self, device: Device) -> bool:
        """Whether ``device`` is this very model, by name and by memory (Jetson modules share names)."""
        if device.gpu is None or self.gpu_name is None or self.memory_gib is None:
            return False
        named = any(
            re.search(self.gpu_name, name) for name in (device.gpu.name, device.jetson) if name
        )
        # drivers and firmware keep some for themselves: Orin Nano shows 7,620 of 8,192 MiB
        return named and 0.85 <= device.gpu.memory_mib / (self.memory_gib * 1024) <= 1.01


class Target(Record):
    """What an engine is bound to. None: not bound to it."""

    name: str
    compute_capabilities: tuple[int, ...]
    device: str | None = None
    driver: str | None = None
    cuda: str | None = None
    l4t: str | None = None


def target_names() -> list[str]:
    """The named targets, sorted."""
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


def load_target_profile(name: str) -> TargetProfile:
    """Read ``targets/name.toml``.

    Raises:
        HipaError: no such target.

    """
    if name not in target_names():
        raise HipaError(
            f"target {name!r} is unknown. Expected auto or one of: {', '.join(target_names())}."
        )
    return TargetProfile.model_validate(tomllib.loads((_FOLDER / f"{name}.toml").read_text()))


def default_options(name: str, library: TensorRTLibrary, device: Device) -> BuildOptions:
    """Build options of the target ``name``; of 'auto', those of the target that ``device`` is, if it is one.

    For 'tensorrt' alone: TensorRT-RTX measures nothing while it builds.
    """
    if library == "rtx":
        return BuildOptions()
    if name != "auto":
        return load_target_profile(name).build
    profiles = map(load_target_profile, target_names())
    return next(
        (profile.build for profile in profiles if profile.is_device(device)), BuildOptions()
    )


def resolve_target(name: str, library: TensorRTLibrary, gpu: Gpu | None, trt: ModuleType) -> Target:
    """The target ``name`` stands for; 'auto' is this GPU, or for 'rtx' without a GPU every RTX 30, 40 and 50.

    Raises:
        HipaError: an unknown name, GPUs that TensorRT-RTX cannot compile for, or a 'tensorrt' target that is
            not this machine's GPU.

    """
    if library == "tensorrt":
        return _this_gpu(name, gpu)
    capabilities = _rtx_capabilities(name, gpu)
    if unsupported := set(capabilities) - set(compilable(trt)):
        got, known = _sm_names(unsupported), _sm_names(compilable(trt))
        raise HipaError(
            f"target {name}: TensorRT-RTX {trt.__version__} cannot compile for {got}. Expected {known}."
        )
    folder = name if name != "auto" else "portable" if gpu is None else f"sm{gpu.sm}"
    return Target(name=folder, compute_capabilities=capabilities)


def _rtx_capabilities(name: str, gpu: Gpu | None) -> tuple[int, ...]:
    if name != "auto":
        return (load_target_profile(name).sm,)
    return (gpu.sm,) if gpu else PORTABLE


def _this_gpu(name: str, gpu: Gpu | None) -> Target:
    sm = None if name == "auto" else load_target_profile(name).sm
    if gpu is None:
        raise HipaError(
            "TensorRT builds on the device itself, and no NVIDIA GPU with a driver answers. Build there."
        )
    if sm not in (None, gpu.sm):
        raise HipaError(
            f"target {name} is SM{sm}, this GPU ({gpu.name}) is SM{gpu.sm}. TensorRT builds on the device."
        )
    return Target(
        name=f"{_slug(gpu.name)}-sm{gpu.sm}",
        compute_capabilities=(gpu.sm,),
        **binding("tensorrt", gpu),
    )


def binding(library: TensorRTLibrary, gpu: Gpu) -> dict[str, str | None]:
    """What ties an engine to a machine beyond its compute capability; TensorRT-RTX engines are compiled on at load."""
    if library == "rtx":
        return dict.fromkeys(("device", "driver", "cuda", "l4t"))
    return {"device": gpu.name, "driver": gpu.driver, "cuda": gpu.cuda, "l4t": l4t_release()}


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _sm_names(capabilities: set[int] | tuple[int, ...]) -> str:
    return ", ".join(f"SM{capability}" for capability in sorted(capabilities))

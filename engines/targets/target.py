"""Where an engine is to run: this GPU, or GPUs named ahead of time (``targets/*.toml``)."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Literal

from pydantic import Field

from hipa_deploy.engines.backends.available import Device
from hipa_deploy.engines.device.jetson import jetson_model, l4t_release
from hipa_deploy.engines.targets.build_options import BuildOptions
from hipa_deploy.engines.tensorrt.gpu import Gpu
from hipa_deploy.engines.tensorrt.library import TensorRTLibrary, compilable
from hipa_deploy.errors import HipaError
from hipa_deploy.record import Record

# Python 3.10 has no tomllib.
if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PORTABLE = (86, 89, 120)  # RTX 30, 40 and 50

# Drivers and firmware keep some memory for themselves: Orin Nano shows 7,620 of 8,192 MiB.
_LEAST_VISIBLE = 0.85
_MOST_VISIBLE = 1.01

_FOLDER = Path(__file__).parent


class Suits(Record):
    """What the commands take with ``--for TARGET`` where the user names nothing else.

    Build options are not repeated here: ``TargetProfile.build`` has them.

    Attributes:
        backend: of ``hipa-build``.
        dtype: of ``hipa-export``.
        decoder: of ``hipa-export``; None leaves the model's own.
        batch: of ``hipa-export``; None leaves the option's default.
        swap_gib: swap space that the memory plan of another machine counts with. On the target
            itself the plan counts what is free there.

    """

    backend: TensorRTLibrary
    dtype: Literal["fp16", "fp32"] = "fp16"
    decoder: Literal["full", "tiny"] | None = None
    batch: int | None = Field(default=None, ge=1)
    swap_gib: int | None = Field(default=None, ge=0)


class TargetProfile(Record):
    """A target's data file. Units are in the names; ``memory_shared`` means shared with the CPU.

    Rates are peaks at the vendor's highest rated clock, dense, with a multiplication and an
    addition counted as two operations: FP16 and TF32 in tensor cores, FP32 in CUDA cores.
    ``fp16_accumulate`` is the type in which ``fp16_tflops`` adds up products; 'either' where both
    are equally fast. ``sm_count`` is the number of streaming multiprocessors. None: not known, or
    different among the cards of a family.

    ``gpu_name`` is a regular expression that is found in the device's name of its GPU, or on Jetson
    in the name of its module. ``build`` holds build options that suit the target where TensorRT's
    own defaults do not. ``suits`` is what ``--for`` takes besides.
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
    sm_count: int | None = Field(default=None, ge=1)
    gpu_name: str | None = None
    build: BuildOptions = BuildOptions()
    suits: Suits

    def is_device(self, device: Device) -> bool:
        """Whether ``device`` is this very model, by name and by memory.

        Memory decides because Jetson modules share names: there is an AGX Orin of 32 GB and one of
        64 GB.
        """
        if device.gpu is None or self.memory_gib is None:
            return False
        if not self._is_named(device.gpu, device.jetson):
            return False
        visible = device.gpu.memory_mib / (self.memory_gib * 1024)
        return _LEAST_VISIBLE <= visible <= _MOST_VISIBLE

    def is_built_on(self, gpu: Gpu, jetson: str | None) -> bool:
        """Whether a machine may build for this target: by compute capability, and by name.

        Memory does not decide: a module with less memory than the target's is planned for with
        what it has.

        Args:
            gpu: the machine's GPU.
            jetson: the name of its Jetson module; None where it has none.

        """
        if gpu.sm != self.sm:
            return False
        if self.gpu_name is None or self._is_named(gpu, jetson):
            return True
        # A container may hide a module's name, and another maker's board has a name of its own.
        if not gpu.integrated and jetson is None:
            return False
        others = map(load_target_profile, target_names())
        return not any(other._is_named(gpu, jetson) for other in others)

    def _is_named(self, gpu: Gpu, jetson: str | None) -> bool:
        if self.gpu_name is None:
            return False
        # CUDA calls every Orin's GPU just 'Orin': there the name of the module decides.
        names = (gpu.name, jetson or "")
        return any(re.search(self.gpu_name, name) for name in names)


class Target(Record):
    """What an engine is bound to. None: the engine is not bound to it.

    ``compute_capabilities`` are times ten, 86 for 8.6. ``l4t`` is the Jetson Linux release.
    """

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
    """Read ``targets/NAME.toml``.

    Raises:
        HipaError: there is no such target.

    """
    # Only a listed name may become part of a path.
    if name not in target_names():
        raise HipaError(
            f"target {name!r} is unknown. Expected auto or one of: {', '.join(target_names())}."
        )
    return TargetProfile.model_validate(
        tomllib.loads((_FOLDER / f"{name}.toml").read_text(encoding="utf-8"))
    )


def default_options(name: str, library: TensorRTLibrary, device: Device) -> BuildOptions:
    """The build options that suit the target ``name``.

    For 'auto' they are those of the named target that ``device`` is, if it is one of them.
    TensorRT-RTX needs none: it measures nothing while it builds.
    """
    # The options of a target limit what measuring takes of a small device's memory.
    if library == "rtx":
        return BuildOptions()
    if name != "auto":
        return load_target_profile(name).build
    for known in target_names():
        profile = load_target_profile(known)
        if profile.is_device(device):
            return profile.build
    return BuildOptions()


def resolve_target(name: str, library: TensorRTLibrary, gpu: Gpu | None, trt: ModuleType) -> Target:
    """The target that ``name`` stands for on this machine.

    'auto' is this GPU; for TensorRT-RTX without a GPU it is every RTX 30, 40 and 50.

    Args:
        name: 'auto' or a named target.
        library: the TensorRT library that builds.
        gpu: this machine's GPU.
        trt: the module of that library.

    Raises:
        HipaError: an unknown name, GPUs that TensorRT-RTX cannot compile for, or for TensorRT a
            target that is not this machine's GPU.

    """
    if library == "tensorrt":
        return _this_gpu(name, gpu)

    # Checked before the build, which takes minutes.
    capabilities = _rtx_capabilities(name, gpu)
    unsupported = set(capabilities) - set(compilable(trt))
    if unsupported:
        raise HipaError(
            f"target {name}: TensorRT-RTX {trt.__version__} cannot compile "
            f"for {_sm_names(unsupported)}. Expected {_sm_names(compilable(trt))}."
        )
    return Target(name=_rtx_folder(name, gpu), compute_capabilities=capabilities)


def _rtx_capabilities(name: str, gpu: Gpu | None) -> tuple[int, ...]:
    if name != "auto":
        return (load_target_profile(name).sm,)
    return (gpu.sm,) if gpu else PORTABLE


def _rtx_folder(name: str, gpu: Gpu | None) -> str:
    """The target's part of the name of its engines' folder."""
    if name != "auto":
        return name
    return "portable" if gpu is None else f"sm{gpu.sm}"


def _this_gpu(name: str, gpu: Gpu | None) -> Target:
    """The target of TensorRT, which measures on the GPU itself and builds for no other."""
    if gpu is None:
        raise HipaError(
            "TensorRT builds on the device itself, and no NVIDIA GPU with a driver answers. "
            "Build there."
        )
    if name != "auto":
        _check_built_on(name, gpu)
    return Target(
        name=f"{_slug(gpu.name)}-sm{gpu.sm}",
        compute_capabilities=(gpu.sm,),
        **binding("tensorrt", gpu),
    )


def _check_built_on(name: str, gpu: Gpu) -> None:
    """Raise HipaError where TensorRT cannot build for the target ``name`` on this machine."""
    profile = load_target_profile(name)
    if profile.sm != gpu.sm:
        raise HipaError(
            f"target {name} is SM{profile.sm}, this GPU ({gpu.name}) is SM{gpu.sm}. "
            "TensorRT builds on the device."
        )
    jetson = jetson_model()
    if not profile.is_built_on(gpu, jetson):
        raise HipaError(
            f"target {name} is {profile.title}, this machine is {jetson or gpu.name}. TensorRT "
            "builds on the device. Build there, or omit --target to build for this machine."
        )


def binding(library: TensorRTLibrary, gpu: Gpu) -> dict[str, str | None]:
    """What ties an engine to a machine beyond its compute capability, by the key's fields.

    Nothing does for TensorRT-RTX: it compiles the rest of an engine when the engine is loaded.
    """
    if library == "rtx":
        return dict.fromkeys(("device", "driver", "cuda", "l4t"))
    return {"device": gpu.name, "driver": gpu.driver, "cuda": gpu.cuda, "l4t": l4t_release()}


def _slug(name: str) -> str:
    """A GPU's name for a folder: 'NVIDIA A100-SXM4-80GB' is 'nvidia-a100-sxm4-80gb'."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _sm_names(capabilities: Iterable[int]) -> str:
    return ", ".join(f"SM{capability}" for capability in sorted(capabilities))

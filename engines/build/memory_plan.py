"""The memory plan: what a build and a run take in memory and on disk, and whether it fits.

Everything here is a prediction. For the host memory of a build it is a line through measured peaks
(see ``HOST_BASE_MIB``). For the GPU memory of a build, and for the memory of a run, it is the sum
of what must be held at once, which no device has confirmed yet. All sizes are in MiB.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from typing import Literal

from rich.table import Table

from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.bundle.manifest import Stage
from hipa_deploy.engines.backends.available import Device
from hipa_deploy.engines.device.machine import available_memory_mib, free_swap_mib
from hipa_deploy.engines.targets.build_options import BuildOptions
from hipa_deploy.engines.targets.target import TargetProfile, load_target_profile
from hipa_deploy.engines.tensorrt.library import TensorRTLibrary
from hipa_deploy.errors import HipaError
from hipa_deploy.record import Record

# Peak resident memory of a stage's build on the host: a base and a multiple of its ONNX files.
# Measured with TensorRT-RTX 1.7 and no GPU (benchmarks/build_memory.py), the line is 3 to 8 % above
# the peak for stages of SD 1.5 and SD 2.1 in FP16 (100 to 1,600 MiB of weights). For the stages of
# a 23 MB model it is between 24 % below and 28 % above the peak.
HOST_BASE_MIB = 330
HOST_PER_WEIGHT = 3.3
# Our allowances, not measured. The first is for the process of a run, its libraries and its CUDA
# context; the second is for the operating system beside it on a Jetson.
RUNTIME_MIB = 700
SYSTEM_MIB = 1024
# The share of its memory that a device shows: firmware and drivers keep the other part. An Orin
# Nano shows 7,620 of 8,192 MiB.
USABLE = 0.93

Verdict = Literal["fits", "fits with swap", "does not fit", "unknown"]


class StageMemory(Record):
    """What one stage takes, in MiB.

    Attributes:
        stage: the name of the stage.
        weights: the size of its ONNX files.
        activations: the most that its activations take at once; None in bundles that were exported
            without this number.
        build_host: host memory that its build takes.
        build_gpu: GPU memory that its build takes; None for TensorRT-RTX, which builds on the host.

    """

    stage: str
    weights: int
    activations: int | None
    build_host: int
    build_gpu: int | None


class Place(Record):
    """A device with its memory, in MiB; None where a size is not known.

    Attributes:
        name: 'this machine', or the title of a target.
        shared: GPU and host share one memory, which is then counted as the host's.
        host: host memory that is available.
        swap: free swap space.
        gpu: GPU memory.

    """

    name: str
    shared: bool
    host: int | None
    swap: int = 0
    gpu: int | None = None


class Need(Record):
    """One requirement of a build or a run, in MiB.

    Attributes:
        what: the work and the kind of memory, such as 'building: GPU memory'.
        where: the device or the folder.
        need: how much is needed.
        have: how much is available; None where it is not known.
        swap: free swap space.
        pageable: the part of ``need`` that swap can hold. GPU memory cannot be swapped.

    """

    what: str
    where: str
    need: int
    have: int | None
    swap: int = 0
    pageable: int = 0

    @property
    def verdict(self) -> Verdict:
        """Whether it fits."""
        if self.have is None:
            return "unknown"
        over = self.need - self.have
        if over <= 0:
            return "fits"
        return "fits with swap" if over <= min(self.swap, self.pageable) else "does not fit"

    def __str__(self) -> str:
        have = "unknown" if self.have is None else f"{self.have:,} MiB"
        swap = f" and {self.swap:,} MiB of swap" if self.swap else ""
        return (
            f"{self.what} on {self.where} takes about {self.need:,} MiB (available: {have}{swap})"
        )


class MemoryPlan(Record):
    """What a build takes.

    Attributes:
        stages: the stages that are to be built.
        needs: everything that must fit: the build, the engines on disk, and the run of the whole
            bundle if its device is known.

    """

    stages: tuple[StageMemory, ...]
    needs: tuple[Need, ...]

    @property
    def misfits(self) -> tuple[Need, ...]:
        """The needs that do not fit."""
        return tuple(need for need in self.needs if need.verdict == "does not fit")

    def refuse_misfits(self) -> None:
        """Refuse a build that does not fit.

        Raises:
            HipaError: a need does not fit; the message has the numbers and a remedy.

        """
        if self.misfits:
            raise HipaError(f"{'; '.join(map(str, self.misfits))}. {_remedy(self.misfits)}")


def plan_memory(
    bundle: Bundle,
    stages: Iterable[str],
    library: TensorRTLibrary,
    target: str,
    options: BuildOptions,
    device: Device,
) -> MemoryPlan:
    """Predict what building ``stages``, and running the whole bundle, will take.

    Args:
        bundle: the exported bundle; the sizes of its files are read.
        stages: the names of the stages that are to be built.
        library: the TensorRT library that builds.
        target: a name in ``engines/targets``, or 'auto' for this machine.
        options: the workspace is part of the GPU memory of a build.
        device: this machine.

    Raises:
        HipaError: an unknown target.

    """
    to_build = tuple(
        _stage_memory(bundle, bundle.stages[stage], library, options) for stage in stages
    )
    profile = None if target == "auto" else load_target_profile(target)

    # Only the stages without an engine are built, and only their engines are written.
    needs = _build_needs(to_build, _build_place(library, profile, device))
    needs.append(_disk_need(bundle, to_build))

    # A run holds every stage of the bundle, also those whose engine is up to date.
    run_place = _run_place(profile, device)
    every_stage = [
        _stage_memory(bundle, stage, library, options) for stage in bundle.stages.values()
    ]
    if run_place is not None:
        needs.append(_run_need(every_stage, run_place))
    return MemoryPlan(stages=to_build, needs=tuple(needs))


def _stage_memory(
    bundle: Bundle, stage: Stage, library: TensorRTLibrary, options: BuildOptions
) -> StageMemory:
    # A large stage keeps its weights in files beside the graph: model.onnx and model.onnx.data.
    onnx = bundle.stage_path(stage.spec.name)
    weights = _mib(sum(path.stat().st_size for path in onnx.parent.glob(f"{onnx.name}*")))
    activations = None
    if stage.cost is not None and stage.cost.activation_bytes is not None:
        activations = _mib(stage.cost.activation_bytes)

    # TensorRT-RTX compiles on the processor alone; TensorRT times its tactics on the GPU.
    build_gpu = None
    if library == "tensorrt":
        build_gpu = weights + (activations or 0) + (options.workspace_mib or 0)
    return StageMemory(
        stage=stage.spec.name,
        weights=weights,
        activations=activations,
        build_host=round(HOST_BASE_MIB + HOST_PER_WEIGHT * weights),
        build_gpu=build_gpu,
    )


def _build_place(library: TensorRTLibrary, profile: TargetProfile | None, device: Device) -> Place:
    """Where the build runs: TensorRT-RTX on this machine's processor, TensorRT on the target."""
    if library == "tensorrt" and profile is not None and not _is_here(profile, device):
        return _elsewhere(profile)
    return _here(device)


def _run_place(profile: TargetProfile | None, device: Device) -> Place | None:
    """Where the engines run; None if no target is named and this machine has no GPU."""
    if profile is not None and not _is_here(profile, device):
        return _elsewhere(profile)
    return _here(device) if device.gpu else None


def _is_here(profile: TargetProfile, device: Device) -> bool:
    return device.gpu is not None and device.gpu.sm == profile.sm


def _here(device: Device) -> Place:
    gpu = device.gpu
    shared = gpu is not None and (gpu.integrated or device.jetson is not None)
    return Place(
        name="this machine",
        shared=shared,
        host=available_memory_mib(),
        swap=free_swap_mib(),
        gpu=None if gpu is None or shared else gpu.memory_mib,
    )


def _elsewhere(profile: TargetProfile) -> Place:
    """A target that is not this machine, as its data file describes it."""
    memory = None if profile.memory_gib is None else round(profile.memory_gib * 1024 * USABLE)
    if not profile.memory_shared:
        return Place(name=profile.title, shared=False, host=None, gpu=memory)
    if memory:
        memory -= SYSTEM_MIB
    return Place(name=profile.title, shared=True, host=memory)


def _build_needs(stages: tuple[StageMemory, ...], place: Place) -> list[Need]:
    """What the build of the largest stage takes.

    Stages are built one after another, each in a process of its own, so only the largest counts.
    """
    if not stages:
        return []
    largest = max(stages, key=lambda stage: stage.build_host + (stage.build_gpu or 0))
    if largest.build_gpu is None:
        return [_host_need("building", place, largest.build_host, 0)]

    # On a Jetson host and GPU take from one memory, so their parts add up to one need.
    on_gpu = largest.build_gpu + RUNTIME_MIB
    if place.shared:
        return [_host_need("building", place, largest.build_host, on_gpu)]
    return [
        _host_need("building", place, largest.build_host, 0),
        _gpu_need("building", place, on_gpu),
    ]


def _host_need(what: str, place: Place, pageable: int, pinned: int) -> Need:
    kind = "shared memory" if place.shared else "memory"
    return Need(
        what=f"{what}: {kind}",
        where=place.name,
        need=pageable + pinned,
        have=place.host,
        swap=place.swap,
        pageable=pageable,
    )


def _gpu_need(what: str, place: Place, need: int) -> Need:
    return Need(what=f"{what}: GPU memory", where=place.name, need=need, have=place.gpu)


def _run_need(stages: list[StageMemory], place: Place) -> Need:
    """What a run takes: the engines and activations of every stage are held at once."""
    need = RUNTIME_MIB + sum(stage.weights + (stage.activations or 0) for stage in stages)
    if place.shared:
        return _host_need("running", place, 0, need)
    return _gpu_need("running", place, need)


def _disk_need(bundle: Bundle, stages: tuple[StageMemory, ...]) -> Need:
    """What the engines take on disk.

    An engine is about as large as its ONNX files. It is written once, under a temporary name.
    """
    need = sum(round(1.1 * stage.weights) + 8 for stage in stages)
    return Need(
        what="engines: disk",
        where=str(bundle.root),
        need=need,
        have=_mib(shutil.disk_usage(bundle.root).free),
    )


def _mib(size: int) -> int:
    """Bytes in MiB, rounded up."""
    return -(-size // (1 << 20))


def _remedy(misfits: tuple[Need, ...]) -> str:
    # One remedy for all: the disk first, because without space on it nothing else helps.
    kinds = {need.what for need in misfits}
    if any("disk" in kind for kind in kinds):
        return "Free some disk space."
    if any("building" in kind for kind in kinds):
        return (
            "Close other programs, add swap, lower --workspace, or pass --force: "
            "the memory plan is a prediction."
        )
    return (
        "Use --decoder tiny, a smaller size or batch, or pass --force: "
        "the memory plan is a prediction."
    )


def render_memory_plan(plan: MemoryPlan) -> list[Table]:
    """Show the plan as two tables: the stages, and what must fit."""
    stages = Table(title="Predicted, in MiB; not measured on any GPU")
    stages.add_column("stage", justify="left")
    for heading in ("weights", "activations", "build, host", "build, GPU"):
        stages.add_column(heading, justify="right")
    for stage in plan.stages:
        sizes = (stage.weights, stage.activations, stage.build_host, stage.build_gpu)
        stages.add_row(stage.stage, *map(_size_cell, sizes))

    needs = Table("", "where", "takes", "available", "swap", "")
    colours = {"does not fit": "red", "unknown": "yellow"}
    for need in plan.needs:
        have = "unknown" if need.have is None else f"{need.have:,}"
        swap = f"{need.swap:,}" if need.swap else "-"
        colour = colours.get(need.verdict, "green")
        verdict = f"[{colour}]{need.verdict}[/{colour}]"
        needs.add_row(need.what, need.where, f"{need.need:,}", have, swap, verdict)
    return [stages, needs]


def _size_cell(mib: int | None) -> str:
    return "-" if mib is None else f"{mib:,}"

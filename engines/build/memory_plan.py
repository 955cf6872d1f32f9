"""What a build and a run will take in memory and on disk, predicted and held against what is there.

The host's part of a build is a line through peaks that were measured (see HOST_BASE_MIB). The GPU's
part and the run's are sums of what must lie there; they are predictions that no device has
confirmed yet.
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
# Measured without a GPU, TensorRT-RTX 1.7, it is 3 to 8 % too much for stages of SD 1.5 and SD
# 2.1 in FP16 (100 to 1,600 MiB of weights), and between 24 % too little and 28 % too much for
# those of a 23 MB model (benchmarks/build_memory.py).
HOST_BASE_MIB = 330
HOST_PER_WEIGHT = 3.3
# Our allowances, not measured: CUDA context, libraries and process of a run; and the system beside
# it on a Jetson.
RUNTIME_MIB = 700
SYSTEM_MIB = 1024
# Firmware and drivers keep some of a Jetson's memory: Orin Nano shows 7,620 of 8,192 MiB.
USABLE = 0.93

Verdict = Literal["fits", "fits with swap", "does not fit", "unknown"]


class StagePlan(Record):
    """One stage, in MiB. ``activations`` is None for bundles exported without it."""

    stage: str
    weights: int
    activations: int | None
    build_host: int
    build_gpu: int | None


class Place(Record):
    """Where memory is taken, in MiB; None where it is not known.

    ``shared`` means that GPU and host take it from one another.
    """

    name: str
    shared: bool
    host: int | None
    swap: int = 0
    gpu: int | None = None


class Need(Record):
    """One thing that must fit, in MiB. ``pageable`` is the part of ``need`` that swap can take."""

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
        have = "an unknown amount is" if self.have is None else f"{self.have:,} MiB is"
        swap = f" and {self.swap:,} MiB of swap" if self.swap else ""
        return f"{self.what} on {self.where} takes about {self.need:,} MiB, {have} there{swap}"


class Plan(Record):
    """The stages to build and everything that must fit."""

    stages: tuple[StagePlan, ...]
    needs: tuple[Need, ...]

    @property
    def misfits(self) -> tuple[Need, ...]:
        """The needs that cannot be met."""
        return tuple(need for need in self.needs if need.verdict == "does not fit")

    def refuse_misfits(self) -> None:
        """Raise HipaError when something cannot fit, with the numbers."""
        if self.misfits:
            raise HipaError(f"{'; '.join(map(str, self.misfits))}. {_remedy(self.misfits)}")


def plan_build(
    bundle: Bundle,
    stages: Iterable[str],
    library: TensorRTLibrary,
    target: str,
    options: BuildOptions,
    device: Device,
) -> Plan:
    """What building ``stages``, and running the whole bundle, will take.

    Raises:
        HipaError: an unknown target.

    """
    chosen = tuple(_plan_stage(bundle, bundle.stages[stage], library, options) for stage in stages)
    everything = [_plan_stage(bundle, stage, library, options) for stage in bundle.manifest.stages]
    profile = None if target == "auto" else load_target_profile(target)
    needs = [
        *_build_needs(chosen, _build_place(library, profile, device)),
        _disk_need(bundle, chosen),
    ]
    if (place := _run_place(profile, device)) is not None:
        needs.append(_run_need(everything, place))
    return Plan(stages=chosen, needs=tuple(needs))


def _plan_stage(
    bundle: Bundle, stage: Stage, library: TensorRTLibrary, options: BuildOptions
) -> StagePlan:
    onnx = bundle.stage_path(stage.spec.name)
    weights = _mib(sum(path.stat().st_size for path in onnx.parent.glob(f"{onnx.name}*")))
    held = stage.cost.activation_bytes if stage.cost else None
    activations = None if held is None else _mib(held)
    on_gpu = (
        None if library == "rtx" else weights + (activations or 0) + (options.workspace_mib or 0)
    )
    return StagePlan(
        stage=stage.spec.name,
        weights=weights,
        activations=activations,
        build_host=round(HOST_BASE_MIB + HOST_PER_WEIGHT * weights),
        build_gpu=on_gpu,
    )


def _build_place(library: TensorRTLibrary, profile: TargetProfile | None, device: Device) -> Place:
    """TensorRT-RTX compiles on this machine's processor, TensorRT on the device itself."""
    if library == "tensorrt" and profile is not None and not _is_here(profile, device):
        return _elsewhere(profile)
    return _here(device)


def _run_place(profile: TargetProfile | None, device: Device) -> Place | None:
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
    memory = None if profile.memory_gib is None else round(profile.memory_gib * 1024 * USABLE)
    if profile.memory_shared:
        return Place(name=profile.title, shared=True, host=memory and memory - SYSTEM_MIB)
    return Place(name=profile.title, shared=False, host=None, gpu=memory)


def _build_needs(stages: tuple[StagePlan, ...], place: Place) -> list[Need]:
    """One stage is built at a time, in a process of its own: the largest counts."""
    if not stages:
        return []
    largest = max(stages, key=lambda stage: stage.build_host + (stage.build_gpu or 0))
    host, gpu = largest.build_host, largest.build_gpu
    if gpu is None or not place.shared:
        needs = [_host_need("building", place, host, 0)]
        return needs if gpu is None else [*needs, _gpu_need("building", place, gpu + RUNTIME_MIB)]
    return [_host_need("building", place, host, gpu + RUNTIME_MIB)]


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


def _run_need(stages: list[StagePlan], place: Place) -> Need:
    """Every stage's engine and activations are held at once."""
    need = RUNTIME_MIB + sum(stage.weights + (stage.activations or 0) for stage in stages)
    return (
        _host_need("running", place, 0, need) if place.shared else _gpu_need("running", place, need)
    )


def _disk_need(bundle: Bundle, stages: tuple[StagePlan, ...]) -> Need:
    """An engine is about as large as its ONNX file, and is written once under a temporary name."""
    need = sum(round(1.1 * stage.weights) + 8 for stage in stages)
    return Need(
        what="engines: disk",
        where=str(bundle.root),
        need=need,
        have=_mib(shutil.disk_usage(bundle.root).free),
    )


def _mib(size: int) -> int:
    return -(-size // (1 << 20))


def _remedy(misfits: tuple[Need, ...]) -> str:
    kinds = {need.what for need in misfits}
    if any("disk" in kind for kind in kinds):
        return "Free some disk space."
    if any("building" in kind for kind in kinds):
        return (
            "Close other programs, add swap, lower --workspace, or give --force: "
            "the plan is a prediction."
        )
    return "Use --decoder tiny, a smaller size or batch, or give --force: the plan is a prediction."


def render_plan(plan: Plan) -> list[Table]:
    """Two tables: stages, and what must fit."""
    stages = Table(title="Predicted, in MiB; not measured on any GPU")
    for heading in ("stage", "weights", "activations", "build, host", "build, GPU"):
        stages.add_column(heading, justify="left" if heading == "stage" else "right")
    for stage in plan.stages:
        numbers = (stage.weights, stage.activations, stage.build_host, stage.build_gpu)
        stages.add_row(
            stage.stage, *("-" if number is None else f"{number:,}" for number in numbers)
        )
    needs = Table("", "where", "takes", "there", "swap", "")
    for need in plan.needs:
        have = "unknown" if need.have is None else f"{need.have:,}"
        colour = {"does not fit": "red", "unknown": "yellow"}.get(need.verdict, "green")
        swap = f"{need.swap:,}" if need.swap else "-"
        needs.add_row(
            need.what,
            need.where,
            f"{need.need:,}",
            have,
            swap,
            f"[{colour}]{need.verdict}[/{colour}]",
        )
    return [stages, needs]

"""The memory plan: what a build and a run take in memory and on disk, and whether it fits.

Everything here is a prediction. For the host memory of a build it is a line through measured peaks
(see ``HOST_BASE_MIB``). For the GPU memory of a build, and for the memory of a run, it is the sum
of what must be held at once, which no device has confirmed yet. All sizes are in MiB.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

from rich.table import Table

from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.bundle.manifest import TEACHER_STAGE, Stage
from hipa_deploy.engines.backends.available import Device
from hipa_deploy.engines.targets.build_options import BuildOptions
from hipa_deploy.engines.targets.memory_needs import Need, Place, Verdict, elsewhere, this_machine
from hipa_deploy.engines.targets.run_memory import (
    TEXT_STAGES,
    StageSize,
    engine_activations_mib,
    low_memory_groups,
    one_group_at_a_time,
    with_own_activations,
    with_shared_activations,
)
from hipa_deploy.engines.targets.target import TargetProfile, load_target_profile
from hipa_deploy.engines.tensorrt.library import TensorRTLibrary
from hipa_deploy.errors import HipaError
from hipa_deploy.record import Record

# Peak resident memory of a stage's build on the host: a base and a multiple of its ONNX files.
# Measured with TensorRT-RTX 1.7 and no GPU (benchmarks/build_memory.py), the line is 2 to 8 % above
# the peak for stages of SD 1.5, SD 2.1 and SDXL's family in FP16 (100 to 4,900 MiB of weights). For
# the stages of a 23 MB model it is between 24 % below and 28 % above the peak.
HOST_BASE_MIB = 330
HOST_PER_WEIGHT = 3.3
# Our allowance, not measured: for the process of a run, its libraries and its CUDA context.
RUNTIME_MIB = 700
# The smallest workspace that the plan proposes; kernels that need more are passed over.
SMALL_WORKSPACE_MIB = 256
# The tiny decoder in FP16, by its graph (benchmarks/stage_memory.py): its file, and the bytes that
# its activations take for each pixel of the images.
TINY_WEIGHTS_MIB = 3
TINY_BYTES_PER_PIXEL = 384
DECODER_STAGE = "vae_decoder"

# From the best to the worst.
_VERDICTS: tuple[Verdict, ...] = (
    "fits",
    "unknown",
    "fits with swap",
    "fits with --low-memory",
    "does not fit",
)


class StageMemory(Record):
    """What one stage takes, in MiB.

    Attributes:
        stage: the name of the stage.
        weights: the size of its ONNX files.
        activations: the most that its engine's activations take at once, predicted from its graph;
            None in bundles that were exported without this number.
        build_host: host memory that its build takes.
        build_gpu: GPU memory that its build takes; None for TensorRT-RTX, which builds on the host.

    """

    stage: str
    weights: int
    activations: int | None
    build_host: int
    build_gpu: int | None


class RunMemory(Record):
    """What the weights and activations of all stages take in a run, in MiB.

    Attributes:
        own_activations: with activations of its own for each stage. The engines of a pipeline are
            not run like that: it shows what sharing saves.
        shared_activations: with one block for the activations of all.
        text_encoder_apart: with ``--low-memory``, the other stages loaded together.
        one_at_a_time: with ``--low-memory`` where these do not fit together.

    """

    own_activations: int
    shared_activations: int
    text_encoder_apart: int
    one_at_a_time: int


class Way(Record):
    """A change that makes a need smaller.

    Attributes:
        change: the option, or the other export.
        need: what the need is then.

    """

    change: str
    need: Need

    def __str__(self) -> str:
        return f"{self.change} ({self.need.need:,} MiB, {self.need.verdict})"


class MemoryPlan(Record):
    """What a build takes.

    Attributes:
        stages: the stages that are to be built.
        needs: everything that must fit: the build, the engines on disk, and the run of the whole
            bundle if its device is known; of a bundle that refines, also with the base UNet.
        run: what the whole bundle takes in a run, held in several ways.
        ways: what would make the needs smaller that do not fit.

    """

    stages: tuple[StageMemory, ...]
    needs: tuple[Need, ...]
    run: RunMemory
    ways: tuple[Way, ...] = ()

    @property
    def misfits(self) -> tuple[Need, ...]:
        """The needs that do not fit."""
        return tuple(need for need in self.needs if need.verdict == "does not fit")

    def refuse_misfits(self) -> None:
        """Refuse a build that does not fit.

        Raises:
            HipaError: a need does not fit; the message has the numbers and what would fit.

        """
        if self.misfits:
            raise HipaError(f"{'; '.join(map(str, self.misfits))}. {self._remedy()}")

    def _remedy(self) -> str:
        # The disk first, because without space on it nothing else helps.
        if any("disk" in need.what for need in self.misfits):
            return "Free some disk space."
        ways = [str(way) for way in self.ways if way.need.verdict != "does not fit"]
        less = f"What would fit: {'; '.join(ways)}. " if ways else ""
        return f"{less}Close other programs, or pass --force: the memory plan is a prediction."


@dataclass(frozen=True)
class _Case:
    """What is to be built and run, and where: all that the needs follow from.

    Attributes:
        sizes: of every stage of the bundle, the base UNet of one that refines too.
        to_build: the names of the stages that are to be built.
        library: the TensorRT library that builds.
        options: the workspace is part of the GPU memory of a build.
        build_place: where the build runs.
        run_place: where the engines run; None where that is not known.

    """

    sizes: tuple[StageSize, ...]
    to_build: tuple[str, ...]
    library: TensorRTLibrary
    options: BuildOptions
    build_place: Place
    run_place: Place | None

    def stages(self) -> tuple[StageMemory, ...]:
        """What the stages that are to be built take."""
        return tuple(self._stage(size) for size in self.sizes if size.stage in self.to_build)

    def _stage(self, size: StageSize) -> StageMemory:
        # TensorRT-RTX compiles on the processor alone; TensorRT times its tactics on the GPU.
        build_gpu = None
        if self.library == "tensorrt":
            workspace = self.options.workspace_mib or 0
            build_gpu = size.weights + (size.activations or 0) + workspace
        return StageMemory(
            stage=size.stage,
            weights=size.weights,
            activations=size.activations,
            build_host=round(HOST_BASE_MIB + HOST_PER_WEIGHT * size.weights),
            build_gpu=build_gpu,
        )

    def needs(self) -> list[Need]:
        """What the build of the stages takes, and the run of all stages."""
        found = self._building()
        for need in (self._running(), self._refining()):
            if need is not None:
                found.append(need)
        return found

    @property
    def path(self) -> tuple[StageSize, ...]:
        """The stages of the one step."""
        return tuple(size for size in self.sizes if size.stage != TEACHER_STAGE)

    def _building(self) -> list[Need]:
        """Stages are built one after another, each in a process of its own: the largest counts."""
        stages = self.stages()
        if not stages:
            return []
        place = self.build_place
        # On a Jetson host and GPU take from one memory, so their parts add up to one need.
        if place.shared:
            return [max(map(self._building_in_shared_memory, stages), key=_severity)]

        # Elsewhere the two memories may be filled most by different stages.
        host = max(stage.build_host for stage in stages)
        found = [_host_need("building", place, host, 0)]
        on_gpu = [stage.build_gpu for stage in stages if stage.build_gpu is not None]
        if on_gpu:
            found.append(_gpu_need("building", place, max(on_gpu) + RUNTIME_MIB))
        return found

    def _building_in_shared_memory(self, stage: StageMemory) -> Need:
        on_gpu = 0 if stage.build_gpu is None else stage.build_gpu + RUNTIME_MIB
        return _host_need("building", self.build_place, stage.build_host, on_gpu)

    def _running(self) -> Need | None:
        place = self.run_place
        if place is None:
            return None
        need = RUNTIME_MIB + with_shared_activations(self.path)
        found = _gpu_need("running", place, need)
        if place.shared:
            found = _host_need("running", place, 0, need)
        low = RUNTIME_MIB + self._largest_group(place)
        return found.model_copy(update={"low_memory": low if low < need else None})

    def _largest_group(self, place: Place) -> int:
        """What the stages of the one step take in low-memory mode."""
        # As it decides itself: the stages but the text encoder together, if they fit.
        room = None if place.for_engines is None else place.for_engines - RUNTIME_MIB
        return one_group_at_a_time(self.path, low_memory_groups(self.path, room))

    def _refining(self) -> Need | None:
        """The base UNet is a runner of its own beside the other stages, with its own block.

        In low-memory mode nothing is beside it.
        """
        place = self.run_place
        teacher = [size for size in self.sizes if size.stage == TEACHER_STAGE]
        if place is None or not teacher:
            return None
        alone = with_own_activations(teacher)
        need = RUNTIME_MIB + with_shared_activations(self.path) + alone
        found = _gpu_need("refining", place, need)
        if place.shared:
            found = _host_need("refining", place, 0, need)
        low = RUNTIME_MIB + max(alone, self._largest_group(place))
        return found.model_copy(update={"low_memory": low if low < need else None})

    def run(self) -> RunMemory:
        """The stages of the one step, held in several ways."""
        together = low_memory_groups(self.path, None)
        alone = tuple((size.stage,) for size in self.path)
        return RunMemory(
            own_activations=with_own_activations(self.path),
            shared_activations=with_shared_activations(self.path),
            text_encoder_apart=one_group_at_a_time(self.path, together),
            one_at_a_time=one_group_at_a_time(self.path, alone),
        )


def plan_memory(
    bundle: Bundle,
    stages: Iterable[str],
    library: TensorRTLibrary,
    target: str,
    options: BuildOptions,
    device: Device,
    swap_mib: int | None = None,
) -> MemoryPlan:
    """Predict what building ``stages``, and running the whole bundle, will take.

    Args:
        bundle: the exported bundle; the sizes of its files are read.
        stages: the names of the stages that are to be built.
        library: the TensorRT library that builds.
        target: a name in ``engines/targets``, or 'auto' for this machine.
        options: the workspace is part of the GPU memory of a build.
        device: this machine.
        swap_mib: swap space to count with, in place of what is free here.

    Raises:
        HipaError: an unknown target.

    """
    profile = None if target == "auto" else load_target_profile(target)
    sizes = tuple(_stage_size(bundle, stage) for stage in bundle.all_stages.values())
    plan = plan_stages(
        sizes,
        tuple(stages),
        library,
        profile,
        options,
        device,
        tiny=_tiny_decoder(bundle),
        swap_mib=swap_mib,
    )
    # After the build: the run comes last.
    needs = list(plan.needs)
    place = [index for index, need in enumerate(needs) if need.what.startswith("running")]
    needs.insert(place[0] if place else len(needs), _disk_need(bundle, plan.stages))
    return plan.model_copy(update={"needs": tuple(needs)})


def plan_stages(
    sizes: tuple[StageSize, ...],
    to_build: tuple[str, ...],
    library: TensorRTLibrary,
    profile: TargetProfile | None,
    options: BuildOptions,
    device: Device,
    *,
    tiny: StageSize | None = None,
    swap_mib: int | None = None,
) -> MemoryPlan:
    """As ``plan_memory``, from the sizes of stages alone and without the disk.

    Args:
        sizes: of every stage, in the order in which they run. A run holds them all, also those
            whose engine is up to date.
        to_build: the names of those that are to be built.
        library: the TensorRT library that builds.
        profile: the target; None for this machine.
        options: the workspace is part of the GPU memory of a build.
        device: this machine.
        tiny: what a tiny decoder would take; None where there is one, or no decoder.
        swap_mib: swap space to count with, in place of what is free here.

    """
    build_place = _build_place(library, profile, device)
    run_place = _run_place(profile, device)
    if swap_mib is not None:
        build_place = build_place.model_copy(update={"swap": swap_mib})
    case = _Case(sizes, to_build, library, options, build_place, run_place)
    return MemoryPlan(
        stages=case.stages(),
        needs=tuple(case.needs()),
        run=case.run(),
        ways=tuple(_ways(case, tiny)),
    )


def _ways(case: _Case, tiny: StageSize | None) -> list[Way]:
    """What would help each need that does not fit, and last all of that together."""
    changes: list[tuple[str, Callable[[_Case], _Case]]] = []
    if (case.options.workspace_mib or 0) > SMALL_WORKSPACE_MIB:
        changes.append((f"--workspace {SMALL_WORKSPACE_MIB}", _small_workspace))
    if tiny is not None:
        changes.append(("hipa-export --decoder tiny", partial(_with_tiny, tiny)))
    if any(size.stage in TEXT_STAGES for size in case.sizes):
        changes.append(("hipa-export --prompts", _without_text))
    if case.path != case.sizes:
        changes.append(("hipa-export without --with-teacher", _without_teacher))
    everything = case
    for _, change in changes:
        everything = change(everything)

    ways: list[Way] = []
    for need in case.needs():
        if need.verdict != "does not fit":
            continue
        smaller = []
        for words, change in changes:
            found = _same_need(change(case), need)
            if _severity(found) < _severity(need):
                smaller.append(Way(change=words, need=found))
        if need.low_memory is not None:
            smaller.append(Way(change="--low-memory", need=_with_low_memory(need)))
        if len(smaller) > 1:
            found = _with_low_memory(_same_need(everything, need))
            smaller.append(Way(change="all of these", need=found))
        over = need.need - (need.have or 0)
        if need.swap < over <= need.pageable:
            gib = math.ceil(over / 1024)
            # Another stage may have too little that swap can hold.
            swapped = _same_need(_with_swap(gib * 1024, case), need)
            smaller.append(Way(change=f"{gib} GiB of swap", need=swapped))
        ways += smaller
    return ways


def _same_need(case: _Case, need: Need) -> Need:
    """What ``need`` is in another case; 0 MiB where nothing is left that has it."""
    for found in case.needs():
        if found.what == need.what:
            return found
    return need.model_copy(update={"need": 0, "pageable": 0, "low_memory": None})


def _with_low_memory(need: Need) -> Need:
    least = need.need if need.low_memory is None else need.low_memory
    return need.model_copy(update={"need": least, "low_memory": None})


def _small_workspace(case: _Case) -> _Case:
    options = case.options.model_copy(update={"workspace_mib": SMALL_WORKSPACE_MIB})
    return replace(case, options=options)


def _with_swap(swap_mib: int, case: _Case) -> _Case:
    return replace(case, build_place=case.build_place.model_copy(update={"swap": swap_mib}))


def _with_tiny(tiny: StageSize, case: _Case) -> _Case:
    sizes = tuple(tiny if size.stage == DECODER_STAGE else size for size in case.sizes)
    return replace(case, sizes=sizes)


def _without_text(case: _Case) -> _Case:
    return replace(case, sizes=tuple(size for size in case.sizes if size.stage not in TEXT_STAGES))


def _without_teacher(case: _Case) -> _Case:
    # A base UNet of no size, so that the need is still there to compare with.
    nothing = StageSize(stage=TEACHER_STAGE, weights=0, activations=0)
    return replace(case, sizes=(*case.path, nothing))


def _stage_size(bundle: Bundle, stage: Stage) -> StageSize:
    # A large stage keeps its weights in files beside the graph: model.onnx and model.onnx.data.
    onnx = bundle.stage_path(stage.spec.name)
    weights = _mib(sum(path.stat().st_size for path in onnx.parent.glob(f"{onnx.name}*")))
    activations = None
    if stage.cost is not None and stage.cost.engine_activation_bytes is not None:
        activations = engine_activations_mib(stage.cost.engine_activation_bytes)
    return StageSize(stage=stage.spec.name, weights=weights, activations=activations)


def _tiny_decoder(bundle: Bundle) -> StageSize | None:
    """What a tiny decoder would take in place of the bundle's; None where there is nothing to do.

    Its activations have a fixed number of channels at the size of the image.
    """
    decoder = bundle.manifest.decoder
    if DECODER_STAGE not in bundle.stages or (decoder is not None and decoder.kind == "tiny"):
        return None
    spec = bundle.stages[DECODER_STAGE].spec
    pixels = math.prod(spec.outputs[0].at(spec.sizes("max"))) // 3  # of all images of a batch
    wider = 2 if bundle.manifest.precision == "fp32" else 1
    return StageSize(
        stage=DECODER_STAGE,
        weights=TINY_WEIGHTS_MIB * wider,
        activations=engine_activations_mib(TINY_BYTES_PER_PIXEL * wider * pixels),
    )


def _build_place(library: TensorRTLibrary, profile: TargetProfile | None, device: Device) -> Place:
    """Where the build runs: TensorRT-RTX on this machine's processor, TensorRT on the target."""
    if library == "tensorrt" and profile is not None and not is_here(profile, device):
        return elsewhere(profile)
    return this_machine(device)


def _run_place(profile: TargetProfile | None, device: Device) -> Place | None:
    """Where the engines run; None if no target is named and this machine has no GPU."""
    if profile is not None and not is_here(profile, device):
        return elsewhere(profile)
    return this_machine(device) if device.gpu else None


def is_here(profile: TargetProfile, device: Device) -> bool:
    """Whether this machine is the target, or for a family of cards one of them."""
    return device.gpu is not None and profile.is_built_on(device.gpu, device.jetson)


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


def _severity(need: Need) -> tuple[int, int]:
    """Orders needs: the worst verdict counts most, then the size."""
    # Swap holds the host's part alone, so a smaller need may fit worse than a larger one.
    return _VERDICTS.index(need.verdict), need.need


def _disk_need(bundle: Bundle, stages: tuple[StageMemory, ...]) -> Need:
    """What the engines take on disk.

    An engine is about as large as its ONNX files. It is written once, under a temporary name. With
    ``--best-of``, or where an engine is mended, a second one of its stage lies there for a while.
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


def render_memory_plan(plan: MemoryPlan) -> list[Table]:
    """Show the plan as tables: the stages, the ways to hold them, what must fit, what would."""
    stages = Table(title="Predicted, in MiB; not measured on any GPU")
    stages.add_column("stage", justify="left")
    for heading in ("weights", "activations", "build, host", "build, GPU"):
        stages.add_column(heading, justify="right")
    for stage in plan.stages:
        sizes = (stage.weights, stage.activations, stage.build_host, stage.build_gpu)
        stages.add_row(stage.stage, *map(_size_cell, sizes))

    run = Table("weights and activations of all stages in a run", "MiB")
    run.columns[1].justify = "right"
    run.add_row("each stage with its own activations", _size_cell(plan.run.own_activations))
    run.add_row("activations shared: as engines run", _size_cell(plan.run.shared_activations))
    run.add_row("--low-memory, if it fits", _size_cell(plan.run.text_encoder_apart))
    run.add_row("--low-memory, each stage alone", _size_cell(plan.run.one_at_a_time))

    tables = [stages, run, _needs_table(plan)]
    if plan.ways:
        ways = Table("what would take less", "of", "takes", "")
        ways.columns[2].justify = "right"
        for way in plan.ways:
            need = way.need
            ways.add_row(way.change, need.what, f"{need.need:,}", _verdict_cell(need))
        tables.append(ways)
    return tables


def _needs_table(plan: MemoryPlan) -> Table:
    needs = Table("", "where", "takes", "available", "swap", "")
    for need in plan.needs:
        have = "unknown" if need.have is None else f"{need.have:,}"
        swap = f"{need.swap:,}" if need.swap else "-"
        needs.add_row(need.what, need.where, f"{need.need:,}", have, swap, _verdict_cell(need))
    return needs


def _verdict_cell(need: Need) -> str:
    colours = {"does not fit": "red", "unknown": "yellow"}
    colour = colours.get(need.verdict, "green")
    return f"[{colour}]{need.verdict}[/{colour}]"


def _size_cell(mib: int | None) -> str:
    return "-" if mib is None else f"{mib:,}"

"""One engine build in a process of its own: ``python -m hipa_deploy.engines.build.worker``.

The worker reads a ``Job`` as JSON from stdin and writes an ``Event`` as JSON a line to stdout. What
TensorRT and polygraphy print goes to stderr.

There are two reasons for a separate process. polygraphy chooses TensorRT or TensorRT-RTX once, when
it is imported. And the memory of a build is released only when its process ends.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

from hipa_deploy.bundle.manifest import Precision, StageSpec
from hipa_deploy.disk.files import describe_write_error, write_file
from hipa_deploy.engines.build.build_progress import PhaseTree
from hipa_deploy.engines.build.precision_check import check_inspected, check_network, inspect
from hipa_deploy.engines.device.machine import peak_rss_mib
from hipa_deploy.engines.faults.attention import count_fused
from hipa_deploy.engines.faults.island import write_widened
from hipa_deploy.engines.store.sidecar import PrecisionCheck
from hipa_deploy.engines.targets.build_options import BuildOptions
from hipa_deploy.engines.tensorrt.gpu import find_gpu
from hipa_deploy.engines.tensorrt.library import (
    TensorRTLibrary,
    load_tensorrt,
    set_compute_capabilities,
)
from hipa_deploy.errors import HipaError
from hipa_deploy.interrupts import die_with_parent
from hipa_deploy.record import Record

# Undocumented, and the documented remedy all the same: TensorRT-Edge-LLM sets it for each build
# (applyMyelinCompileWorkarounds in cpp/builder/llmBuilder.cpp).
MYELIN = "__LUNOWUD"

Send = Callable[["Event"], None]


class Job(Record):
    """What to build, and how.

    Attributes:
        library: the TensorRT library that builds.
        onnx: the graph of the stage.
        spec: the inputs and outputs of the stage.
        out: where the engine is written.
        precision: the precision that the graph must have.
        compute_capabilities: the GPUs to build for, 89 for 8.9; used by TensorRT-RTX alone.
        options: options of the builder.
        timing_cache: a file that is read, extended and written again; None for no cache.
        refittable: the weights that can be exchanged later. TensorRT may fuse and fold all others.
        mark: tensors that become outputs of the engine, besides those of ``spec``.
        fp32: tensors whose nodes compute in float32, whatever the graph says.
        has_islands: whether parts of the graph are in float32 on purpose, by ``fp32`` or by the
            export.
        myelin: options for TensorRT's compiler Myelin.

    """

    library: TensorRTLibrary
    onnx: Path
    spec: StageSpec
    out: Path
    precision: Precision
    compute_capabilities: tuple[int, ...]
    options: BuildOptions
    timing_cache: Path | None
    refittable: tuple[str, ...] = ()
    mark: tuple[str, ...] = ()
    fp32: tuple[str, ...] = ()
    has_islands: bool = False
    myelin: tuple[str, ...] = ()


class Outcome(Record):
    """The result of a build.

    Attributes:
        seconds: the time of the build.
        peak_mib: the most host memory that the worker held; None where it is not known.
        precision_check: the types that the engine, or else the network, computes in.
        skipped_tactics: how many tactics TensorRT skipped for lack of memory, which is harmless.
        fused_attentions: how many attentions the engine computes in one kernel each; None where the
            engine cannot be looked at.
        activation_bytes: what the engine's activations take; None where it cannot be loaded.
        timing_cache_problem: why the timings could not be kept; None if they were.

    """

    seconds: float
    peak_mib: int | None
    precision_check: PrecisionCheck
    skipped_tactics: int = 0
    fused_attentions: int | None = None
    activation_bytes: int | None = None
    timing_cache_problem: str | None = None


class Event(Record):
    """A line from the worker: progress, or the end of the build.

    Attributes:
        fraction: the share of the build that is done, 0 to 1.
        phase: TensorRT's name for what it is doing.
        layers: how many layers the parsed network has; sent once.
        outcome: the result, in the last event of a build that succeeded.
        error: the message, in the last event of a build that failed.

    """

    fraction: float = 0.0
    phase: str = ""
    layers: int | None = None
    outcome: Outcome | None = None
    error: str | None = None


def environment(library: TensorRTLibrary, myelin: tuple[str, ...] = ()) -> dict[str, str]:
    """The environment variables that make polygraphy use ``library``, and Myelin the options."""
    use_rtx = "1" if library == "rtx" else "0"
    variables = {**os.environ, "POLYGRAPHY_USE_TENSORRT_RTX": use_rtx}
    if myelin:
        # Whoever set the variable before wants that too.
        before = os.environ.get(MYELIN, "").split()
        new = [option for option in myelin if option not in before]
        variables[MYELIN] = " ".join([*before, *new])
    return variables


def main() -> int:
    """Read a job from stdin, build it, and report on stdout."""
    # Before TensorRT is imported, so that nothing it prints can mix with the events.
    events = _claim_stdout()

    def send(event: Event) -> None:
        events.write(event.model_dump_json(exclude_defaults=True) + "\n")

    try:
        # One line: what follows is the end of the input, when the parent ends.
        job = Job.model_validate_json(sys.stdin.buffer.readline())
        die_with_parent()
        outcome = build(job, send)
        send(Event(fraction=1.0, outcome=outcome))
    except HipaError as error:
        send(Event(error=str(error)))
        return 1
    return 0


def _claim_stdout() -> TextIO:
    """Keep stdout for events, and point descriptor 1 at stderr: native libraries print too."""
    events = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)
    return events


def build(job: Job, send: Send) -> Outcome:
    """Parse the graph, check its precision, compile it, and write the engine to ``job.out``.

    Args:
        job: what to build.
        send: is called with an event for every percent of progress.

    Raises:
        HipaError: the graph has the wrong precision, TensorRT refuses an option, or the engine
            cannot be written.
        polygraphy.exception.PolygraphyException: TensorRT cannot parse or compile the graph.

    """
    # load_tensorrt comes first, because its errors say what to install.
    trt = load_tensorrt(job.library)
    from polygraphy.backend import trt as poly

    # The graph is checked before it is compiled: the check is quick, and compiling is not.
    started = time.perf_counter()
    with _graph_file(job) as onnx:
        builder, network, parser = poly.network_from_onnx_path(str(onnx), strongly_typed=True)
        check = check_network(trt, network, job.precision, has_islands=job.has_islands)
        send(Event(layers=network.num_layers))
        _mark_outputs(network, job.mark)

        # The weights are read from the file until the engine is there.
        monitor = _monitor(trt, send)
        config = _configure(trt, poly, (builder, network), job, monitor)
        _mark_refittable(trt, network, config, job.refittable)
        engine = poly.engine_bytes_from_network((builder, network, parser), config=config)
    _write_engine(job.out, engine)
    timing_cache_problem = _save_timing_cache(config, job.timing_cache)
    seconds = time.perf_counter() - started

    # What the engine says counts more than what the network said, but loading it needs a driver.
    fused = None
    activation_bytes = None
    if find_gpu() is not None:
        text, activation_bytes = inspect(trt, poly.get_trt_logger(), engine)
        check = check_inspected(text, job.precision, has_islands=job.has_islands) or check
        fused = _fused_attentions(text, job.library)
    return Outcome(
        seconds=round(seconds, 3),
        peak_mib=peak_rss_mib(),
        precision_check=check,
        fused_attentions=fused,
        activation_bytes=activation_bytes,
        timing_cache_problem=timing_cache_problem,
    )


def _write_engine(path: Path, engine: Any) -> None:
    """Write the serialised engine.

    Raises:
        HipaError: the disk is full, or the file cannot be written for another reason.

    """
    try:
        path.write_bytes(engine)
    except OSError as error:
        # What is free is then what the engine may take.
        path.unlink(missing_ok=True)
        problem = describe_write_error(error, path, engine.nbytes)
        raise HipaError(
            f"the engine cannot be written into {path.parent}: {problem.strerror}. "
            "Free some space there, and run the command again."
        ) from None


def _fused_attentions(text: str, library: TensorRTLibrary) -> int | None:
    """How many attentions are in one kernel each, by an inspector's JSON; None if not known.

    TensorRT-RTX chooses its kernels when the engine is loaded, so that none in sight says nothing.
    """
    found = count_fused(text)
    return None if library == "rtx" and not found else found


@contextmanager
def _graph_file(job: Job) -> Iterator[Path]:
    """The graph to parse: the stage's own, or one with float32 islands, which goes afterwards."""
    if not job.fp32:
        yield job.onnx
        return
    # Beside the engine: a graph may be too large for a small device's /tmp, which lies in memory.
    with tempfile.TemporaryDirectory(".tmp", ".graph-", job.out.parent) as folder:
        yield write_widened(job.onnx, job.fp32, Path(folder))


def _mark_outputs(network: Any, names: tuple[str, ...]) -> None:
    """Make tensors of the network outputs of the engine.

    Raises:
        HipaError: the network has no tensor of one of the names.

    """
    missing = set(names)
    for index in range(network.num_layers if names else 0):
        layer = network.get_layer(index)
        for number in range(layer.num_outputs):
            tensor = layer.get_output(number)
            if tensor.name in missing:
                network.mark_output(tensor)
                missing.remove(tensor.name)
    if missing:
        raise HipaError(
            f"the network has no tensor {min(missing)!r} ({len(missing)} such names in all). "
            "Export the bundle again."
        )


def _configure(
    trt: ModuleType, poly: ModuleType, network: tuple[Any, Any], job: Job, monitor: Any
) -> Any:
    """Make the ``IBuilderConfig``.

    It has no flag for the precision: TensorRT 11 has none, and the types in the graph decide.
    """
    config = poly.create_config(
        *network,
        profiles=_profiles(poly, job.spec),
        memory_pool_limits=_memory_limits(trt, job.options),
        builder_optimization_level=job.options.optimization_level,
        max_aux_streams=job.options.max_aux_streams,
        profiling_verbosity=trt.ProfilingVerbosity.DETAILED,
        progress_monitor=monitor,
    )
    if job.library == "rtx":
        # Without this flag an engine cannot be captured in a CUDA graph (release notes of RTX 1.2).
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
        set_compute_capabilities(trt, config, job.compute_capabilities)
    if job.timing_cache is not None:
        _load_timing_cache(config, job.timing_cache)
    return config


def _mark_refittable(trt: ModuleType, network: Any, config: Any, weights: tuple[str, ...]) -> None:
    """Mark the weights that can be exchanged in the finished engine.

    Raises:
        HipaError: the network has no weight of one of the names.

    """
    if not weights:
        return
    config.set_flag(trt.BuilderFlag.REFIT_INDIVIDUAL)
    unknown = [name for name in weights if not network.mark_weights_refittable(name)]
    if unknown:
        raise HipaError(
            f"the network has no weight {unknown[0]!r} ({len(unknown)} such names in all). "
            "Export the bundle again."
        )


def _memory_limits(trt: ModuleType, options: BuildOptions) -> dict[Any, int]:
    """Bytes by memory pool, for the pools that have a limit."""
    pools = trt.MemoryPoolType
    limits = {}
    if options.workspace_mib is not None:
        limits[pools.WORKSPACE] = options.workspace_mib << 20
    if options.tactic_dram_mib is not None:
        limits[pools.TACTIC_DRAM] = options.tactic_dram_mib << 20
    return limits


def _profiles(poly: ModuleType, spec: StageSpec) -> list[Any] | None:
    """One optimisation profile for the inputs with named dimensions; None if there are none."""
    if not spec.axes:
        return None
    profile = poly.Profile()
    for tensor in spec.inputs:
        # A named dimension is a string, a static one a number. A static input needs no profile.
        if any(isinstance(size, str) for size in tensor.shape):
            profile.add(
                tensor.name,
                min=tensor.at(spec.sizes("min")),
                opt=tensor.at(spec.sizes("opt")),
                max=tensor.at(spec.sizes("max")),
            )
    return [profile]


def _load_timing_cache(config: Any, path: Path) -> None:
    """Load the timing cache at ``path`` into ``config``, or an empty one if there is no file.

    polygraphy can do this too, but it ignores a cache of another device or version.

    Raises:
        HipaError: the file is not a timing cache of this device and TensorRT version.

    """
    data = path.read_bytes() if path.is_file() else b""
    empty = config.create_timing_cache(b"")
    cache = config.create_timing_cache(data)

    # TensorRT replaces a cache that it cannot use by an empty one, without an error. Such a cache
    # would be written over the user's file at the end of the build, so it is refused here.
    was_replaced = cache is None or bytes(cache.serialize()) == bytes(empty.serialize()) != data
    is_refused = bool(data) and was_replaced
    if is_refused or not config.set_timing_cache(cache, ignore_mismatch=False):
        raise HipaError(
            f"{path} is not a timing cache of this device and TensorRT version. "
            "Remove it, or name another file with --timing-cache."
        )


def _save_timing_cache(config: Any, path: Path | None) -> str | None:
    """Write the timing cache, if there is one; why it could not be written, or None.

    The engine is there by now, after what may have been an hour, and needs no cache.
    """
    if path is None:
        return None
    try:
        write_file(path, bytes(config.get_timing_cache().serialize()))
    except OSError as error:
        return f"{path}: {error.strerror or error}"
    return None


def _monitor(trt: ModuleType, send: Send) -> Any:
    """Make an ``IProgressMonitor`` that sends an event for every percent."""
    phases = PhaseTree()
    sent = -1
    # The class of either library, whichever was loaded.
    base: Any = trt.IProgressMonitor

    class Monitor(base):
        def __init__(self) -> None:
            # pybind11 requires that a subclass calls the __init__ of its base by name.
            base.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            phases.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            phases.step(phase_name, step)
            return report(phase_name)

        def phase_finish(self, phase_name: str) -> None:
            phases.finish(phase_name)

    def report(phase: str) -> bool:
        """Send an event if the percentage has changed. False tells TensorRT to stop the build."""
        nonlocal sent
        percent = int(phases.fraction * 100)
        if percent == sent:
            return True
        sent = percent
        try:
            send(Event(fraction=phases.fraction, phase=phase))
        except OSError:  # the parent process has ended, so nobody needs the engine
            return False
        return True

    return Monitor()


if __name__ == "__main__":
    sys.exit(main())

"""One engine build in a process of its own: ``python -m hipa_deploy.engines.build.worker``.

It takes a Job on stdin.

A process of its own because polygraphy settles on TensorRT or TensorRT-RTX once in a process's
life, and because what a build holds is given back only when its process ends. Events go to stdout,
a JSON object a line; all that TensorRT and polygraphy say goes to stderr.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

from hipa_deploy.bundle.manifest import Precision, StageSpec
from hipa_deploy.engines.build.build_progress import PhaseTree
from hipa_deploy.engines.build.precision_check import check_network, read_back
from hipa_deploy.engines.device.machine import peak_rss_mib
from hipa_deploy.engines.store.sidecar import PrecisionCheck
from hipa_deploy.engines.targets.build_options import BuildOptions
from hipa_deploy.engines.tensorrt.gpu import find_gpu
from hipa_deploy.engines.tensorrt.library import (
    TensorRTLibrary,
    load_tensorrt,
    set_compute_capabilities,
)
from hipa_deploy.errors import HipaError
from hipa_deploy.files import write_file
from hipa_deploy.record import Record

Send = Callable[["Event"], None]


class Job(Record):
    """What to build. The engine is written to ``out``; ``timing_cache`` is read and extended.

    ``refittable`` names the weights that can be exchanged later; the rest may be fused and folded.
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


class Outcome(Record):
    """What a build took, and how many tactics it passed over for want of memory (harmless)."""

    seconds: float
    peak_mib: int | None
    precision_check: PrecisionCheck
    skipped_tactics: int = 0


class Event(Record):
    """A line from the worker: progress (0 to 1, and the phase), or the end in success or failure.

    ``layers`` is how many the parsed network has, said once.
    """

    fraction: float = 0.0
    phase: str = ""
    layers: int | None = None
    outcome: Outcome | None = None
    error: str | None = None


def environment(library: TensorRTLibrary) -> dict[str, str]:
    """The environment that makes polygraphy use ``library``."""
    return {**os.environ, "POLYGRAPHY_USE_TENSORRT_RTX": "1" if library == "rtx" else "0"}


def main() -> int:
    """Read a Job, build it, report."""
    events = _claim_stdout()

    def send(event: Event) -> None:
        events.write(event.model_dump_json(exclude_defaults=True) + "\n")

    try:
        send(Event(fraction=1.0, outcome=build(Job.model_validate_json(sys.stdin.read()), send)))
    except HipaError as error:
        send(Event(error=str(error)))
        return 1
    return 0


def _claim_stdout() -> TextIO:
    """Keep stdout for events and point descriptor 1 at stderr: native libraries print too."""
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return events


def build(job: Job, send: Send) -> Outcome:
    """Parse, check the precision, compile, write ``job.out``.

    Raises:
        HipaError: wrong precision, or options that TensorRT refuses.
        polygraphy.exception.PolygraphyException: TensorRT cannot parse or compile the graph.

    """
    trt = load_tensorrt(job.library)
    from polygraphy.backend import trt as poly

    started = time.perf_counter()
    builder, network, parser = poly.network_from_onnx_path(str(job.onnx), strongly_typed=True)
    check = check_network(trt, network, job.precision)
    send(Event(layers=network.num_layers))
    monitor = _monitor(trt, send)
    config = _configure(trt, poly, (builder, network), job, monitor)
    _mark_refittable(trt, network, config, job.refittable)
    engine = poly.engine_bytes_from_network((builder, network, parser), config=config)
    job.out.write_bytes(engine)
    _save_timing_cache(config, job.timing_cache)
    seconds = time.perf_counter() - started
    if find_gpu() is not None:
        check = read_back(trt, poly.get_trt_logger(), engine, job.precision) or check
    return Outcome(seconds=round(seconds, 3), peak_mib=peak_rss_mib(), precision_check=check)


def _configure(
    trt: ModuleType, poly: ModuleType, network: tuple[Any, Any], job: Job, monitor: Any
) -> Any:
    """An ``IBuilderConfig``. No precision flag: TensorRT 11 has none, and the graph says it."""
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
        config.set_flag(
            trt.BuilderFlag.REQUIRE_USER_ALLOCATION
        )  # without it no CUDA graph: release notes of RTX 1.2
        set_compute_capabilities(trt, config, job.compute_capabilities)
    if job.timing_cache is not None:
        _load_timing_cache(config, job.timing_cache)
    return config


def _mark_refittable(trt: ModuleType, network: Any, config: Any, weights: tuple[str, ...]) -> None:
    """Let these weights be exchanged in the engine.

    Raises:
        HipaError: the network has no weight of that name.

    """
    if not weights:
        return
    config.set_flag(trt.BuilderFlag.REFIT_INDIVIDUAL)
    if unknown := [name for name in weights if not network.mark_weights_refittable(name)]:
        raise HipaError(
            f"TensorRT knows no weight {unknown[0]!r} ({len(unknown)} in all). "
            "Export the bundle again."
        )


def _memory_limits(trt: ModuleType, options: BuildOptions) -> dict[Any, int]:
    """Bytes by memory pool, for those that are capped."""
    pool = trt.MemoryPoolType
    limits = {pool.WORKSPACE: options.workspace_mib, pool.TACTIC_DRAM: options.tactic_dram_mib}
    return {kind: mib << 20 for kind, mib in limits.items() if mib is not None}


def _profiles(poly: ModuleType, spec: StageSpec) -> list[Any] | None:
    """One optimisation profile for inputs with named dimensions; none if every shape is static."""
    if not spec.axes:
        return None
    profile = poly.Profile()
    for tensor in spec.inputs:
        if any(isinstance(size, str) for size in tensor.shape):
            smallest, usual, largest = (
                tensor.at(spec.sizes(which)) for which in ("min", "opt", "max")
            )
            profile.add(tensor.name, smallest, usual, largest)
    return [profile]


def _load_timing_cache(config: Any, path: Path) -> None:
    """Give ``config`` the cache at ``path``, or an empty one if there is none.

    Not through polygraphy, which ignores a mismatch of device or version. TensorRT answers one it
    cannot use with an empty cache, which must not be written over the user's file.
    """
    data, empty = path.read_bytes() if path.is_file() else b"", config.create_timing_cache(b"")
    cache = config.create_timing_cache(data)
    refused = data and (
        cache is None or bytes(cache.serialize()) == bytes(empty.serialize()) != data
    )
    if refused or not config.set_timing_cache(cache, ignore_mismatch=False):
        raise HipaError(
            f"{path} is not a timing cache of this device and TensorRT version. "
            "Choose another file."
        )


def _save_timing_cache(config: Any, path: Path | None) -> None:
    if path is not None:
        write_file(path, bytes(config.get_timing_cache().serialize()))


def _monitor(trt: ModuleType, send: Send) -> Any:
    """An ``IProgressMonitor`` that sends an event for every percent."""
    phases = PhaseTree()
    sent = -1
    base: Any = trt.IProgressMonitor

    class Monitor(base):
        def __init__(self) -> None:
            base.__init__(self)  # pybind11 wants it called by name

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            phases.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            phases.step(phase_name, step)
            return report(phase_name)

        def phase_finish(self, phase_name: str) -> None:
            phases.finish(phase_name)

    def report(phase: str) -> bool:
        nonlocal sent
        if (percent := int(phases.fraction * 100)) == sent:
            return True
        sent = percent
        try:
            send(Event(fraction=phases.fraction, phase=phase))
        except OSError:  # whoever asked for the build is gone: stop it
            return False
        return True

    return Monitor()


if __name__ == "__main__":
    sys.exit(main())

"""From a bundle's ONNX to engines, one stage at a time, each in a process of its own."""

from __future__ import annotations

import fcntl
import importlib.util
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

import hipa_deploy
from hipa_deploy.bundle.adaptor_swap import refittable_weights
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.engines.backends.available import describe_device
from hipa_deploy.engines.build.best_of import time_engine
from hipa_deploy.engines.build.memory_plan import Plan, plan_build
from hipa_deploy.engines.build.worker import Event, Job, Outcome
from hipa_deploy.engines.build.worker_process import Report, run_worker
from hipa_deploy.engines.store.engine_key import EngineKey, key_for
from hipa_deploy.engines.store.sidecar import (
    FOLDER,
    Sidecar,
    check_engine_file,
    engine_path,
    read_sidecar,
)
from hipa_deploy.engines.targets.build_options import BuildOptions
from hipa_deploy.engines.targets.target import Target, default_options, resolve_target
from hipa_deploy.engines.tensorrt.gpu import find_gpu
from hipa_deploy.engines.tensorrt.library import (
    TensorRTLibrary,
    as_tensorrt_library,
    load_tensorrt,
    missing,
)
from hipa_deploy.engines.tensorrt.refit import refuse_faulty
from hipa_deploy.errors import HipaError
from hipa_deploy.files import user_cache, write_file
from hipa_deploy.hashing import file_sha256

MAX_CANDIDATES = 20


@dataclass(frozen=True)
class BuiltEngine:
    """An engine on disk. ``up_to_date``: it was there with an equal key, and nothing was built."""

    stage: str
    path: Path
    sidecar: Sidecar
    up_to_date: bool


def build_bundle(
    bundle: Bundle,
    *,
    backend: str,
    target: str = "auto",
    options: BuildOptions = BuildOptions(),
    best_of: int = 1,
    force: bool = False,
    console: Console | None = None,
) -> list[BuiltEngine]:
    """Build an engine for every stage into ``bundle.root/engines/<backend>-<target>``.

    ``backend`` is 'rtx' (ahead of time for the GPUs that ``target`` names; no GPU needed) or
    'tensorrt' (for this machine's GPU). Options that are not given are the target's own.
    ``best_of`` builds each stage so many times and keeps the engine that this GPU runs fastest.
    What the memory plan says cannot fit is refused, unless ``force``. Progress goes to ``console``,
    by default the terminal's standard error.

    Raises:
        MissingDependencyError: the TensorRT library of this backend, or polygraphy, is not
        installed.
        HipaError: a corrupt bundle, an unknown or impossible target, too little memory or disk, a
        build already
            running, a graph of another precision than the manifest says, or TensorRT's own refusal.
            Stages built before it remain.

    """
    library, trt = check_tools(backend)
    _check_options(library, trt.__version__, options, best_of)
    bundle.verify()
    goal = resolve_target(target, library, find_gpu(), trt)
    options = _resolve_options(options, library, target, goal, trt.__version__)
    folder = bundle.root / FOLDER / f"{library}-{goal.name}"
    keys = {
        stage: key_for(bundle, stage, library, trt.__version__, goal, options)
        for stage in bundle.stages
    }
    found = {
        stage: up_to_date(sidecar_path(folder, stage, key), key, best_of)
        for stage, key in keys.items()
    }
    if not force:
        absent = [stage for stage, sidecar in found.items() if sidecar is None]
        plan_build(bundle, absent, library, target, options, describe_device()).refuse_misfits()
    with locked(folder), _progress_bar(console) as bar:
        return [
            _build_stage(bundle, stage, keys[stage], folder, options, best_of, bar)
            for stage in keys
        ]


def dry_run(
    bundle: Bundle, *, backend: str, target: str = "auto", options: BuildOptions = BuildOptions()
) -> Plan:
    """What building every stage will take, without building.

    TensorRT need not be installed, and the target need not be this machine.

    Raises:
        HipaError: an unknown backend or target.

    """
    library, device = as_tensorrt_library(backend), describe_device()
    options = options.or_else(default_options(target, library, device))
    return plan_build(bundle, bundle.stages, library, target, options, device)


def _check_options(
    library: TensorRTLibrary, version: str, options: BuildOptions, best_of: int
) -> None:
    if library == "rtx" and options.timing_cache is not None:
        raise HipaError(
            "TensorRT-RTX has no timing cache (it times nothing while building). "
            "Leave the option out."
        )
    if not 1 <= best_of <= MAX_CANDIDATES:
        raise HipaError(f"--best-of is {best_of}. Expected 1 to {MAX_CANDIDATES}.")
    if best_of > 1 and find_gpu() is None:
        raise HipaError(
            "--best-of runs each engine to time it, and no NVIDIA GPU answers here. "
            "Leave the option out."
        )
    if options.refit:
        refuse_faulty(library, version)
    if (
        options.refit and find_gpu() is None
    ):  # TensorRT-RTX 1.7 fails in Myelin: CHECK(status == CUDA_SUCCESS)
        raise HipaError(
            "--refit: a refittable engine is compiled with a driver, "
            "and no NVIDIA GPU answers here."
        )


def _resolve_options(
    options: BuildOptions, library: TensorRTLibrary, target: str, goal: Target, version: str
) -> BuildOptions:
    """The options, with the target's own for those not given, and this device's timing cache."""
    resolved = options.or_else(default_options(target, library, describe_device()))
    if library == "rtx" or resolved.timing_cache is not None:
        return resolved
    return resolved.model_copy(
        update={"timing_cache": user_cache() / "timing" / f"{goal.name}-trt{version}.cache"}
    )


def check_tools(backend: str) -> tuple[TensorRTLibrary, ModuleType]:
    """The TensorRT library and its module.

    Raises:
        MissingDependencyError: the TensorRT library of this backend, or polygraphy, is not
        installed.
        HipaError: an unknown backend.

    """
    library = as_tensorrt_library(backend)
    trt = load_tensorrt(library)
    if importlib.util.find_spec("polygraphy") is None:
        raise missing("polygraphy", library)
    return library, trt


def _build_stage(
    bundle: Bundle,
    stage: str,
    key: EngineKey,
    folder: Path,
    options: BuildOptions,
    best_of: int,
    bar: Progress,
) -> BuiltEngine:
    path, spec = sidecar_path(folder, stage, key), bundle.stages[stage].spec
    task = bar.add_task(stage, total=1.0, phase="")
    if (found := up_to_date(path, key, best_of)) is not None:
        bar.update(task, completed=1.0, phase="up to date")
        return BuiltEngine(stage, engine_path(path), found, up_to_date=True)
    with ExitStack() as stack:
        candidates = {}
        try:
            for number in range(best_of):
                scratch = folder / f".{path.stem}-{os.getpid()}-{number}.tmp"
                stack.callback(scratch.unlink, missing_ok=True)
                job = _job(bundle, stage, key, scratch, options)
                candidates[scratch] = run_worker(job, _reporter(bar, task, number, best_of))
            latencies = (
                {}
                if best_of == 1
                else {out: time_engine(out, spec, key.flavour) for out in candidates}
            )
            best = (
                min(latencies, key=latencies.__getitem__) if latencies else next(iter(candidates))
            )
            sidecar = _keep(best, path, stage, key, candidates[best], tuple(latencies.values()))
        except HipaError as error:
            raise HipaError(f"{stage}: {error}") from None
    bar.update(task, completed=1.0, phase=_built(candidates[best]))
    return BuiltEngine(stage, engine_path(path), sidecar, up_to_date=False)


def _built(outcome: Outcome) -> str:
    skipped = outcome.skipped_tactics
    return (
        f"built; {skipped} tactics did not fit in memory and were passed over: harmless"
        if skipped
        else "built"
    )


def _job(bundle: Bundle, stage: str, key: EngineKey, out: Path, options: BuildOptions) -> Job:
    return Job(
        library=key.flavour,
        onnx=bundle.stage_path(stage).resolve(),
        spec=bundle.stages[stage].spec,
        out=out.resolve(),
        precision=key.precision,
        compute_capabilities=key.compute_capabilities,
        options=options,
        timing_cache=options.timing_cache and options.timing_cache.resolve(),
        refittable=tuple(refittable_weights(bundle, stage)) if options.refit else (),
    )


def sidecar_path(folder: Path, stage: str, key: EngineKey) -> Path:
    """Where the sidecar of an engine of ``key`` lies; the engine lies beside it."""
    return folder / f"{stage}-{key.short}.json"


def up_to_date(path: Path, key: EngineKey, best_of: int = 1) -> Sidecar | None:
    """The sidecar at ``path``, if its key is ``key``, its engine whole and the best of as many."""
    try:
        sidecar = read_sidecar(path)
        check_engine_file(engine_path(path), sidecar, "")
    except (HipaError, OSError):
        return None
    return sidecar if sidecar.key == key and max(len(sidecar.candidates_ms), 1) >= best_of else None


def _keep(
    scratch: Path,
    path: Path,
    stage: str,
    key: EngineKey,
    outcome: Outcome,
    candidates_ms: tuple[float, ...],
) -> Sidecar:
    """Give the engine its name, then write its sidecar: an engine without one is never used."""
    sidecar = Sidecar(
        producer=f"hipa-deploy {hipa_deploy.__version__}",
        stage=stage,
        key=key,
        precision_check=outcome.precision_check,
        engine_sha256=file_sha256(scratch),
        engine_bytes=scratch.stat().st_size,
        build_seconds=outcome.seconds,
        build_peak_mib=outcome.peak_mib,
        candidates_ms=candidates_ms,
    )
    scratch.replace(engine_path(path))
    write_file(path, sidecar.model_dump_json(indent=2).encode() + b"\n")
    return sidecar


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold ``folder/.lock``; the system releases it when the process ends, however it ends.

    Raises:
        HipaError: another build holds it, or the folder cannot be written.

    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / ".lock").open("a+")
    except OSError as error:
        raise HipaError(
            f"{folder} cannot be written ({error.strerror}). "
            "Copy the bundle to a folder of your own."
        ) from None
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            raise HipaError(
                f"{folder}: another build (process {handle.read().strip()}) is writing here."
            ) from None
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        for leftover in folder.glob(".*.tmp"):  # of a build that was killed outright
            leftover.unlink()
        yield


def _progress_bar(console: Console | None) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[phase]}"),
        console=console or Console(stderr=True),
    )


def _reporter(bar: Progress, task: TaskID, number: int, best_of: int) -> Report:
    """Show a worker's events on its stage's bar.

    Candidate ``number`` of ``best_of`` has its share of the bar.
    """

    def report(event: Event) -> None:
        phase = f"{number + 1} of {best_of}: {event.phase}" if best_of > 1 else event.phase
        bar.update(task, completed=(number + event.fraction) / best_of, phase=phase)
        if event.layers is not None:
            bar.update(
                task,
                description=f"{bar.tasks[task].description.split(',')[0]}, {event.layers} layers",
            )

    return report

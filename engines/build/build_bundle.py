"""From a bundle's ONNX to engines, one stage at a time, each in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
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

from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.disk.files import check_writable, user_cache
from hipa_deploy.disk.locks import locked as lock_file
from hipa_deploy.disk.reading import check_file
from hipa_deploy.engines.backends.available import describe_device
from hipa_deploy.engines.build.build_stage import BuiltEngine, StageBuild, up_to_date
from hipa_deploy.engines.build.memory_plan import MemoryPlan, is_here, plan_memory
from hipa_deploy.engines.build.worker import Event
from hipa_deploy.engines.build.worker_process import Report
from hipa_deploy.engines.faults.known_faults import find_fault
from hipa_deploy.engines.store.engine_key import EngineKey, key_for
from hipa_deploy.engines.store.sidecar import LOCK, engine_folder
from hipa_deploy.engines.targets.build_options import BuildOptions
from hipa_deploy.engines.targets.target import (
    Target,
    default_options,
    load_target_profile,
    resolve_target,
)
from hipa_deploy.engines.tensorrt.gpu import find_gpu
from hipa_deploy.engines.tensorrt.library import (
    TensorRTLibrary,
    as_tensorrt_library,
    load_tensorrt,
    missing,
)
from hipa_deploy.engines.tensorrt.refit import refuse_faulty
from hipa_deploy.errors import HipaError

# Each candidate costs a whole build, so a larger number is taken for a slip.
MAX_CANDIDATES = 20
MAX_TIMING_CACHE = 1 << 30  # bytes; one of Stable Diffusion has a few million


def build_bundle(
    bundle: Bundle,
    *,
    backend: str,
    target: str = "auto",
    options: BuildOptions = BuildOptions(),
    best_of: int = 1,
    force: bool = False,
    repair: bool = True,
    without_remedies: tuple[str, ...] = (),
    swap_gib: int | None = None,
    console: Console | None = None,
) -> list[BuiltEngine]:
    """Build an engine for every stage into ``bundle.root/engines/<backend>-<target>``.

    The base UNet of a bundle that refines is one of them.

    Where this machine has the GPU, each engine runs on the bundle's reference tensors before it
    counts as built. One that fails its gate is mended (``engines.build.ladder``), or kept apart
    under a name that no command loads.

    Args:
        bundle: the exported bundle.
        backend: 'rtx' (ahead of time for the GPUs that ``target`` names; no GPU needed) or
            'tensorrt' (for this machine's GPU).
        target: a name in ``engines/targets``, or 'auto'.
        options: options of the builder. Those that are None take the values of the target.
        best_of: 1 to ``MAX_CANDIDATES``. Each stage is built so many times, and the engine that
            this GPU runs fastest is kept.
        force: build even if the memory plan says that it cannot fit.
        repair: apply the remedies of known faults from the start, and mend an engine that fails
            its gate, which builds it several times more; False does neither, and rejects an engine
            that fails.
        without_remedies: ids of known faults (``engines/faults/known_faults.toml``) whose remedy is
            left out, unless the engine fails its gate without it.
        swap_gib: swap space that the memory plan counts with; None is what is free here.
        console: where the progress bars are drawn; standard error by default.

    Returns:
        An engine for each stage, in the order of the bundle.

    Raises:
        MissingDependencyError: the TensorRT library of this backend, or polygraphy, is not
            installed.
        HipaError: a corrupt bundle, an unknown or impossible target, too little memory or disk,
            another build that is still running, a graph of another precision than the manifest
            says, an error from TensorRT, or an engine that fails its gate. Engines of the stages
            before it remain.

    Example:
        >>> built = build_bundle(Bundle.open(Path("my-bundle")), backend="rtx", target="rtx40")
        >>> [engine.path.parent.name for engine in built]
        ['rtx-rtx40', 'rtx-rtx40', 'rtx-rtx40']

    """
    # Cheap checks come first: a wrong option must not cost the time to hash a large bundle.
    check_request(backend, target, options, best_of, without_remedies)
    _check_best_of(best_of)
    library, trt = check_tools(backend)
    if options.refit:
        _check_refit(library, trt.__version__)
    bundle.verify()
    goal = resolve_target(target, library, find_gpu(), trt)
    options = _resolve_options(options, library, target, goal, trt.__version__)

    # A stage is built only if no whole engine with an equal key exists.
    folder = engine_folder(bundle, library, goal.name)
    keys: dict[str, EngineKey] = {}
    to_build: list[str] = []
    for stage in bundle.all_stages:
        key = key_for(bundle, stage, library, trt.__version__, goal, options)
        keys[stage] = key
        if up_to_date(folder, stage, key, best_of) is None:
            to_build.append(stage)

    # Without this check the system might end the build halfway for lack of memory.
    if not force:
        swap_mib = None if swap_gib is None else swap_gib * 1024
        device = describe_device()
        plan = plan_memory(bundle, to_build, library, target, options, device, swap_mib)
        plan.refuse_misfits()

    builds = []
    for stage, key in keys.items():
        build = StageBuild(
            bundle=bundle,
            stage=stage,
            key=key,
            folder=folder,
            options=options,
            best_of=best_of,
            repair=repair,
            without_remedies=without_remedies,
        )
        builds.append(build)

    # A container's image may hold bundle and engines, and be read-only.
    if not to_build and not os.access(folder, os.W_OK):
        found = [engine for engine in (build.found() for build in builds) if engine is not None]
        if len(found) == len(builds):
            return found

    # Under the lock each stage is looked up again: another build may have finished it meanwhile.
    with locked(folder), _progress_bar(console) as bar:
        return [_run(build, bar) for build in builds]


def dry_run(
    bundle: Bundle,
    *,
    backend: str,
    target: str = "auto",
    options: BuildOptions = BuildOptions(),
    swap_gib: int | None = None,
) -> MemoryPlan:
    """Predict what building every stage will take, without building.

    TensorRT need not be installed, and the target need not be this machine.

    Args:
        bundle: the exported bundle.
        backend: 'rtx' or 'tensorrt'.
        target: a name in ``engines/targets``, or 'auto'.
        options: of the builder; those that are None take the values of the target.
        swap_gib: swap space to count with; None is what is free here, and none on another device.

    Raises:
        HipaError: an unknown backend or target.

    """
    check_request(backend, target, options)
    library = as_tensorrt_library(backend)
    device = describe_device()
    options = options.or_else(default_options(target, library, device))
    swap_mib = None if swap_gib is None else swap_gib * 1024
    return plan_memory(bundle, bundle.all_stages, library, target, options, device, swap_mib)


def built_elsewhere(backend: str, target: str) -> str | None:
    """The title of a target whose engines this machine cannot build; None where it can.

    TensorRT measures on the GPU that will run the engines, so it builds for no other.

    Raises:
        HipaError: an unknown backend or target.

    """
    if as_tensorrt_library(backend) != "tensorrt" or target == "auto":
        return None
    profile = load_target_profile(target)
    return None if is_here(profile, describe_device()) else profile.title


def check_request(
    backend: str,
    target: str,
    options: BuildOptions,
    best_of: int = 1,
    without_remedies: tuple[str, ...] = (),
) -> None:
    """Check a request without TensorRT, before anything is read or imported.

    Args:
        backend: as for ``build_bundle``, and so are the others.
        target: see ``backend``.
        options: see ``backend``.
        best_of: see ``backend``.
        without_remedies: see ``backend``.

    Raises:
        HipaError: an unknown backend, target or fault, a number out of range, or a timing cache
            that can be no file.

    """
    library = as_tensorrt_library(backend)
    if target != "auto":
        load_target_profile(target)
    for name in without_remedies:
        find_fault(name)
    if not 1 <= best_of <= MAX_CANDIDATES:
        raise HipaError(f"--best-of is {best_of}. Expected 1 to {MAX_CANDIDATES}.")
    cache_file = options.timing_cache
    if cache_file is None:
        return
    if library == "rtx":
        raise HipaError(
            f"TensorRT-RTX has no timing cache, as it times nothing, got {cache_file}. "
            "Omit --timing-cache."
        )
    check_writable(cache_file)
    if cache_file.exists():
        check_file(cache_file, MAX_TIMING_CACHE, "Name another file with --timing-cache.")


def _check_best_of(best_of: int) -> None:
    """Raise HipaError where engines are to be timed and there is no GPU."""
    if best_of > 1 and find_gpu() is None:
        raise HipaError(
            "--best-of runs each engine to time it, and no NVIDIA GPU was found. Omit --best-of."
        )


def _check_refit(library: TensorRTLibrary, version: str) -> None:
    """Raise HipaError where this TensorRT, or a machine without a GPU, cannot build for refits."""
    refuse_faulty(library, version)
    # Without a driver TensorRT-RTX 1.7 fails in Myelin: CHECK(status == CUDA_SUCCESS).
    if find_gpu() is None:
        raise HipaError(
            "--refit: compiling a refittable engine needs a driver, "
            "and no NVIDIA GPU was found. Build on a machine with a GPU, or omit --refit."
        )


def _resolve_options(
    options: BuildOptions, library: TensorRTLibrary, target: str, goal: Target, version: str
) -> BuildOptions:
    """Fill in the options that are None: the target's values, and this device's timing cache."""
    resolved = options.or_else(default_options(target, library, describe_device()))
    if library == "rtx" or resolved.timing_cache is not None:
        return resolved

    # Timings hold for one device and one version only, so each pair has a cache of its own.
    cache_path = user_cache() / "timing" / f"{goal.name}-trt{version}.cache"
    try:
        check_writable(cache_path)
    except HipaError as error:
        warnings.warn(
            f"the timings of kernels are not kept, so the next build takes as long: {error} "
            "Set HIPA_CACHE to it, or name a file with --timing-cache.",
            RuntimeWarning,
            stacklevel=3,
        )
        return resolved
    return resolved.model_copy(update={"timing_cache": cache_path})


def check_tools(backend: str) -> tuple[TensorRTLibrary, ModuleType]:
    """Import the TensorRT library of ``backend``.

    Returns:
        The library's name, 'tensorrt' or 'rtx', and its Python module.

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


def _run(build: StageBuild, bar: Progress) -> BuiltEngine:
    """Run a build with a bar of its own."""
    task = bar.add_task(build.stage, total=1.0, phase="")
    build.reporter = lambda number: _reporter(bar, task, number, build.best_of)
    build.say = lambda words: bar.update(task, phase=words)
    built = build.run()
    bar.update(task, completed=1.0)
    if built.up_to_date:
        bar.update(task, phase="up to date")
    return built


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock ``folder/.lock``, so that only one build writes there.

    The system releases the lock when the process ends, even if it is killed.

    Raises:
        HipaError: another build holds the lock, or the folder cannot be written.

    """
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock_file(folder / LOCK, f"engines {folder}"))
        except OSError as error:
            raise HipaError(
                f"{folder} cannot be written ({error.strerror}). "
                "Copy the bundle to a folder of your own."
            ) from None

        # Scratch files can only be those of a build that was killed: a running one has the lock.
        for leftover in folder.glob(".*.tmp"):
            if leftover.is_dir():
                shutil.rmtree(leftover)
            else:
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
    """Make a function that shows the events of a worker on the bar of its stage.

    Candidate ``number``, counted from 0, fills its ``1 / best_of`` of the bar.
    """

    def report(event: Event) -> None:
        phase = event.phase
        if best_of > 1:
            phase = f"{number + 1} of {best_of}: {phase}"
        bar.update(task, completed=(number + event.fraction) / best_of, phase=phase)

        # With several candidates the layers are reported again: the name alone is kept, and the
        # number is put behind it anew.
        if event.layers is not None:
            stage = bar.tasks[task].description.split(",")[0]
            bar.update(task, description=f"{stage}, {event.layers} layers")

    return report

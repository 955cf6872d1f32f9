"""Choose the engine of each stage that fits this GPU, and load it."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.engines.store.engine_key import Difference, differences, key_here
from hipa_deploy.engines.store.sidecar import (
    FOLDER,
    Sidecar,
    check_engine_file,
    engine_path,
    find_sidecars,
    read_sidecar,
)
from hipa_deploy.engines.targets.build_options import BuildOptions
from hipa_deploy.engines.tensorrt.gpu import Gpu, find_gpu
from hipa_deploy.engines.tensorrt.library import (
    TENSORRT_LIBRARIES,
    TensorRTLibrary,
    as_tensorrt_library,
    load_tensorrt,
)
from hipa_deploy.errors import HipaError
from hipa_deploy.generate.runner import Runner

if TYPE_CHECKING:
    from hipa_deploy.engines.tensorrt.tensorrt_runner import TensorRTRunner


def backend_with_engines(bundle: Bundle) -> str | None:
    """The first backend with an engine for every stage that fits this device; None without one.

    The backend's package and driver have to be installed. It never raises, and is cheap for a
    bundle without an ``engines`` folder: neither TensorRT nor CUDA is loaded.
    """
    if not (bundle.root / FOLDER).is_dir():
        return None
    for library in TENSORRT_LIBRARIES:
        if engines_here(bundle, library):
            return library
    return None


def engines_here(bundle: Bundle, library: TensorRTLibrary) -> dict[str, Path]:
    """The engine of each stage that this device would load, by stage.

    It is empty where a stage has none that fits, or where the library or the driver is missing. It
    never raises.
    """
    try:
        sidecars = {stage: find_sidecars(bundle, stage, library) for stage in bundle.stages}
        # Files are cheap to look for, CUDA and TensorRT are not cheap to load.
        if not all(sidecars.values()):
            return {}
        gpu = find_gpu()
        if gpu is None:
            return {}
        version = load_tensorrt(library).__version__
        found = {}
        for stage in bundle.stages:
            engine = _first_fitting(bundle, stage, sidecars[stage], version, gpu)
            if engine is None:
                return {}
            found[stage] = engine
    # A sidecar that cannot be read, or a library that is not installed: another backend is used.
    except (HipaError, OSError):
        return {}
    return found


def _first_fitting(
    bundle: Bundle, stage: str, sidecars: dict[Path, Sidecar], version: str, gpu: Gpu
) -> Path | None:
    for path, sidecar in sidecars.items():
        # The key alone is compared: hashing every engine would make 'auto' slow.
        same_key = sidecar.key == key_here(sidecar.key, bundle, stage, version, gpu)
        if same_key and engine_path(path).is_file():
            return engine_path(path)
    return None


def rebuild_command(
    root: Path, library: TensorRTLibrary, options: BuildOptions = BuildOptions()
) -> str:
    """'Run: hipa-build …': how to build the engines of the bundle at ``root`` for this machine."""
    command = ["hipa-build", str(root), "--backend", library, *options.flags()]
    return f"Run: {shlex.join(command)}"


def open_engine(bundle: Bundle, stage: str, backend: str) -> Runner:
    """Load the engine of ``stage`` that fits this device and was chosen last.

    Raises:
        MissingDependencyError: the backend's TensorRT library, or cuda-python, is not installed.
        HipaError: no GPU, no engine, an engine of another key (the message names the fields), or a
            damaged engine.

    """
    return open_engines(bundle, [stage], backend)


def open_engines(bundle: Bundle, stages: Iterable[str], backend: str) -> TensorRTRunner:
    """Load a fitting engine of each of ``stages``, which run in this order on one stream.

    Raises:
        MissingDependencyError: as ``open_engine``.
        HipaError: as ``open_engine``, for the first stage that cannot be loaded.

    """
    library = as_tensorrt_library(backend)
    engines = []
    barriers = {}
    for stage, sidecar_path in fitting_engines(bundle, stages, library).items():
        barriers[stage] = read_sidecar(sidecar_path).key.barriers
        engines.append((bundle.all_stages[stage].spec, engine_path(sidecar_path)))

    # Imported here: 'auto' asks this module about engines on machines that have none.
    from hipa_deploy.engines.tensorrt.tensorrt_runner import TensorRTRunner

    return TensorRTRunner(engines, library, barriers=barriers)


def fitting_engines(
    bundle: Bundle, stages: Iterable[str], library: TensorRTLibrary
) -> dict[str, Path]:
    """The sidecar of each stage's engine that fits this device, its engine checked.

    Every engine is found and checked before a caller loads the first, which takes seconds.

    Raises:
        MissingDependencyError: as ``open_engine``.
        HipaError: as ``open_engine``, for the first stage without one.

    """
    version = load_tensorrt(library).__version__
    gpu = find_gpu()
    if gpu is None:
        raise HipaError(
            f"{library} needs an NVIDIA GPU and its driver, and none answers. "
            "Use --backend onnxruntime."
        )
    found = {}
    for stage in stages:
        path = select_engine(bundle, stage, library, version, gpu)
        check_engine_file(
            engine_path(path), read_sidecar(path), rebuild_command(bundle.root, library)
        )
        found[stage] = path
    return found


def select_engine(
    bundle: Bundle, stage: str, library: TensorRTLibrary, version: str, gpu: Gpu
) -> Path:
    """The sidecar of the engine whose key fits ``gpu`` and this ``version``, and was chosen last.

    Raises:
        HipaError: the stage has no engine, or none that fits: the message names what differs in the
            one that differs least.

    """
    sidecars = find_sidecars(bundle, stage, library)
    if not sidecars:
        raise HipaError(
            f"{bundle.root}: no {library} engine for stage {stage}. "
            f"{rebuild_command(bundle.root, library)}"
        )

    differing: dict[Path, list[Difference]] = {}
    for path, sidecar in sidecars.items():
        here = key_here(sidecar.key, bundle, stage, version, gpu)
        differing[path] = differences(sidecar.key, here)

    # ``min`` keeps the first of those that differ least: the one that was chosen last.
    best = min(differing, key=lambda path: len(differing[path]))
    if differing[best]:
        remedy = rebuild_command(bundle.root, library, sidecars[best].key.options)
        raise HipaError(
            f"{engine_path(best)} does not fit: {'; '.join(map(str, differing[best]))}. {remedy}"
        )
    return best

"""Engine files, their sidecars, and the key that says what an engine was made from and where it may run.

``BUNDLE/engines/<library>-<target>/<stage>-<key>.engine`` with a ``.json`` of the same name beside it. The key is
compared before an engine is deserialised: TensorRT's own message for a mismatch names neither field nor remedy.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.engines.store.engine_key import differences, key_here
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
    """The library whose engines for every stage fit this device, its package and driver present; else None.

    Cheap without an ``engines`` folder, and never raises.
    """
    if not (bundle.root / FOLDER).is_dir():
        return None
    return next((library for library in TENSORRT_LIBRARIES if _runs_all(bundle, library)), None)


def _runs_all(bundle: Bundle, library: TensorRTLibrary) -> bool:
    try:
        found = {stage: find_sidecars(bundle, stage, library) for stage in bundle.stages}
        gpu = find_gpu() if all(found.values()) else None
        if gpu is None:
            return False
        version = load_tensorrt(library).__version__
        return all(
            any(_fits(bundle, stage, sidecars, version, gpu)) for stage, sidecars in found.items()
        )
    except (HipaError, OSError):
        return False


def _fits(
    bundle: Bundle, stage: str, sidecars: dict[Path, Sidecar], version: str, gpu: Gpu
) -> Iterator[Path]:
    for path, sidecar in sidecars.items():
        if (
            sidecar.key == key_here(sidecar.key, bundle, stage, version, gpu)
            and engine_path(path).is_file()
        ):
            yield path


def rebuild_command(
    root: Path, library: TensorRTLibrary, options: BuildOptions = BuildOptions()
) -> str:
    """The command that builds the engines of the bundle at ``root`` for this machine, with the options given."""
    command = ["hipa-build", str(root), "--backend", library, *options.flags()]
    return f"Run: {shlex.join(command)}"


def open_engine(bundle: Bundle, stage: str, backend: str) -> Runner:
    """Load the newest engine of ``stage`` that fits this device.

    Raises:
        MissingDependencyError: the backend's TensorRT library, or cuda-python, is not installed.
        HipaError: no GPU, no engine, an engine of another key (names the fields), or a damaged engine.

    """
    return open_engines(bundle, [stage], backend)


def open_engines(bundle: Bundle, stages: Iterable[str], backend: str) -> TensorRTRunner:
    """The same for several stages, which run in this order on one stream.

    Raises:
        MissingDependencyError: as above.
        HipaError: as above, for the first stage that cannot be loaded.

    """
    library = as_tensorrt_library(backend)
    version = load_tensorrt(library).__version__
    gpu = find_gpu()
    if gpu is None:
        raise HipaError(
            f"{backend} needs an NVIDIA GPU and its driver, and none answers. Use --backend onnxruntime."
        )
    found = []
    for stage in stages:
        path = select_engine(bundle, stage, library, version, gpu)
        check_engine_file(
            engine_path(path), read_sidecar(path), rebuild_command(bundle.root, library)
        )
        found.append((bundle.stages[stage].spec, engine_path(path)))
    from hipa_deploy.engines.tensorrt.tensorrt_runner import TensorRTRunner

    return TensorRTRunner(found, library)


def select_engine(
    bundle: Bundle, stage: str, library: TensorRTLibrary, version: str, gpu: Gpu
) -> Path:
    """The sidecar of the newest engine whose key fits ``gpu``.

    Raises:
        HipaError: no engine, or none fits: the message names what differs in the one that differs least.

    """
    sidecars = find_sidecars(bundle, stage, library)
    if not sidecars:
        raise HipaError(
            f"{bundle.root}: no {library} engine for stage {stage}. {rebuild_command(bundle.root, library)}"
        )
    unfit = {
        path: differences(sidecar.key, key_here(sidecar.key, bundle, stage, version, gpu))
        for path, sidecar in sidecars.items()
    }
    best = min(unfit, key=lambda path: len(unfit[path]))
    if unfit[best]:
        remedy = rebuild_command(bundle.root, library, sidecars[best].key.options)
        raise HipaError(
            f"{engine_path(best)} does not fit: {'; '.join(map(str, unfit[best]))}. {remedy}"
        )
    return best

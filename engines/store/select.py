"""Engine files, their sidecars, and the key that says what an engine was made from and where it may run.

``BUNDLE/engines/<flavour>-<target>/<stage>-<key>.engine`` with a ``.json`` of the same name beside it. The key is
compared before an engine is deserialised: TensorRT's own message for a mismatch names neither field nor remedy.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import Field, ValidationError

from hipa_deploy.bundle.manifest import Axis, Bundle, Precision
from hipa_deploy.engines.device.describe import Gpu, find_gpu
from hipa_deploy.engines.store.build_options import BuildOptions
from hipa_deploy.engines.targets.target import Target, binding
from hipa_deploy.engines.tensorrt.library import FLAVOURS, Flavour, as_flavour, load_tensorrt
from hipa_deploy.errors import HipaError
from hipa_deploy.generate.runner import Runner
from hipa_deploy.hashing import file_sha256
from hipa_deploy.record import Record

if TYPE_CHECKING:
    from hipa_deploy.engines.tensorrt.tensorrt_runner import TensorRTRunner

FOLDER = "engines"


class EngineKey(Record):
    """Everything an engine depends on: an equal key needs no rebuild. None: not bound to it."""

    onnx_sha256: str
    external_sha256: tuple[str, ...]
    precision: Precision
    axes: dict[str, Axis] = Field(default_factory=dict)
    options: BuildOptions
    flavour: Flavour
    tensorrt: str
    compute_capabilities: tuple[int, ...]
    device: str | None
    driver: str | None
    cuda: str | None
    l4t: str | None

    @property
    def short(self) -> str:
        """Twelve hexadecimal digits that stand for the key in file names."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:12]


class PrecisionCheck(Record):
    """How many layers compute in each type, and how that was found out.

    'network types' counts the parsed network's convolutions and matrix products before the build; strong typing
    obliges TensorRT to keep them. 'inspector' counts what the deserialised engine reports, which takes a driver.
    """

    by: Literal["network types", "inspector"]
    float16: int
    float32: int


class Sidecar(Record):
    """The JSON beside an engine. ``candidates_ms``: each build's median latency, with ``--best-of``; the least wins."""

    schema_version: Literal[1] = 1
    producer: str
    stage: str
    key: EngineKey
    precision_check: PrecisionCheck
    engine_sha256: str
    engine_bytes: int
    build_seconds: float
    build_peak_mib: int | None
    candidates_ms: tuple[float, ...] = ()


class Difference(NamedTuple):
    """A field of the key in which an engine does not fit."""

    field: str
    built: Any
    here: Any

    def __str__(self) -> str:
        return f"{self.field} was {brief(self.built)}, is {brief(self.here)}"


def brief(value: Any) -> str:
    """A key's value for people: hashes cut short, options without those not set, '-' for None."""
    if value is None:
        return "-"
    if isinstance(value, BuildOptions):
        return value.model_dump_json(exclude_defaults=True)
    if isinstance(value, tuple):
        return "[" + ", ".join(brief(part) for part in value) + "]"
    return value[:12] + "…" if isinstance(value, str) and len(value) == 64 else str(value)


def differences(built: EngineKey, here: EngineKey) -> list[Difference]:
    """The fields in which two keys differ, in the key's order."""
    pairs = [
        Difference(name, getattr(built, name), getattr(here, name))
        for name in EngineKey.model_fields
    ]
    return [pair for pair in pairs if pair.built != pair.here]


def key_for(
    bundle: Bundle,
    stage: str,
    flavour: Flavour,
    version: str,
    target: Target,
    options: BuildOptions,
) -> EngineKey:
    """The key of ``stage`` built for ``target``. Hashes come from the manifest: ``bundle.verify`` vouches for them."""
    files, onnx = bundle.manifest.files, bundle.stages[stage].path
    external = [files[name] for name in sorted(files) if name.startswith(onnx) and name != onnx]
    return EngineKey(
        onnx_sha256=files[onnx],
        external_sha256=tuple(external),
        precision=bundle.stages[stage].precision,
        axes=bundle.stages[stage].spec.axes,
        options=options.model_copy(update={"timing_cache": None}),
        flavour=flavour,
        tensorrt=version,
        **target.model_dump(exclude={"name"}),
    )


def key_here(built: EngineKey, bundle: Bundle, stage: str, version: str, gpu: Gpu) -> EngineKey:
    """The key that an engine with key ``built`` needs on ``gpu``: its own options, and capabilities with this GPU's."""
    fits = gpu.sm in built.compute_capabilities
    target = Target(
        name="here",
        compute_capabilities=built.compute_capabilities if fits else (gpu.sm,),
        **binding(built.flavour, gpu),
    )
    return key_for(bundle, stage, built.flavour, version, target, built.options)


def read_sidecar(path: Path) -> Sidecar:
    """Read an engine's JSON.

    Raises:
        HipaError: it is not one, or of another schema.

    """
    try:
        return Sidecar.model_validate_json(path.read_text())
    except (ValidationError, ValueError):
        raise HipaError(
            f"{path} is not an engine's sidecar of this version. Remove it and run hipa-build again."
        ) from None


def find_sidecars(bundle: Bundle, stage: str, flavour: Flavour) -> dict[Path, Sidecar]:
    """Sidecars of a stage's engines by path, newest first.

    Raises:
        HipaError: a sidecar that cannot be read.

    """
    paths = (bundle.root / FOLDER).glob(f"{flavour}-*/{stage}-*.json")
    return {
        path: read_sidecar(path)
        for path in sorted(paths, key=lambda path: path.stat().st_mtime_ns, reverse=True)
    }


def runnable_flavour(bundle: Bundle) -> str | None:
    """The flavour whose engines for every stage fit this device, its package and driver present; else None.

    Cheap without an ``engines`` folder, and never raises.
    """
    if not (bundle.root / FOLDER).is_dir():
        return None
    return next((flavour for flavour in FLAVOURS if _runs_all(bundle, flavour)), None)


def _runs_all(bundle: Bundle, flavour: Flavour) -> bool:
    try:
        found = {stage: find_sidecars(bundle, stage, flavour) for stage in bundle.stages}
        gpu = find_gpu() if all(found.values()) else None
        if gpu is None:
            return False
        version = load_tensorrt(flavour).__version__
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


def engine_path(sidecar_path: Path) -> Path:
    """The engine file that a sidecar describes."""
    return sidecar_path.with_suffix(".engine")


def rebuild_command(root: Path, flavour: Flavour, options: BuildOptions = BuildOptions()) -> str:
    """The command that builds the engines of the bundle at ``root`` for this machine, with the options given."""
    command = ["hipa-build", str(root), "--backend", flavour, *options.flags()]
    return f"Run: {shlex.join(command)}"


def open_engine(bundle: Bundle, stage: str, backend: str) -> Runner:
    """Load the newest engine of ``stage`` that fits this device.

    Raises:
        MissingDependencyError: TensorRT of that flavour, or cuda-python, is not installed.
        HipaError: no GPU, no engine, an engine of another key (names the fields), or a damaged engine.

    """
    return open_engines(bundle, [stage], backend)


def open_engines(bundle: Bundle, stages: Iterable[str], backend: str) -> TensorRTRunner:
    """The same for several stages, which run in this order on one stream.

    Raises:
        MissingDependencyError: as above.
        HipaError: as above, for the first stage that cannot be loaded.

    """
    flavour = as_flavour(backend)
    version = load_tensorrt(flavour).__version__
    gpu = find_gpu()
    if gpu is None:
        raise HipaError(
            f"{backend} needs an NVIDIA GPU and its driver, and none answers. Use --backend onnxruntime."
        )
    found = []
    for stage in stages:
        path = select_engine(bundle, stage, flavour, version, gpu)
        check_engine_file(
            engine_path(path), read_sidecar(path), rebuild_command(bundle.root, flavour)
        )
        found.append((bundle.stages[stage].spec, engine_path(path)))
    from hipa_deploy.engines.tensorrt.tensorrt_runner import TensorRTRunner

    return TensorRTRunner(found, flavour)


def select_engine(bundle: Bundle, stage: str, flavour: Flavour, version: str, gpu: Gpu) -> Path:
    """The sidecar of the newest engine whose key fits ``gpu``.

    Raises:
        HipaError: no engine, or none fits: the message names what differs in the one that differs least.

    """
    sidecars = find_sidecars(bundle, stage, flavour)
    if not sidecars:
        raise HipaError(
            f"{bundle.root}: no {flavour} engine for stage {stage}. {rebuild_command(bundle.root, flavour)}"
        )
    unfit = {
        path: differences(sidecar.key, key_here(sidecar.key, bundle, stage, version, gpu))
        for path, sidecar in sidecars.items()
    }
    best = min(unfit, key=lambda path: len(unfit[path]))
    if unfit[best]:
        remedy = rebuild_command(bundle.root, flavour, sidecars[best].key.options)
        raise HipaError(
            f"{engine_path(best)} does not fit: {'; '.join(map(str, unfit[best]))}. {remedy}"
        )
    return best


def check_engine_file(path: Path, sidecar: Sidecar, remedy: str) -> None:
    """Raise HipaError unless ``path`` has the size and SHA-256 that its sidecar says."""
    if not path.is_file():
        raise HipaError(f"{path} is missing beside its sidecar. {remedy}")
    if path.stat().st_size != sidecar.engine_bytes or file_sha256(path) != sidecar.engine_sha256:
        raise HipaError(f"{path} is corrupt: its size or SHA-256 is not the sidecar's. {remedy}")

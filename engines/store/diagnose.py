"""Why an engine fits here or does not: each field of its key, as built and as it would be here."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.engines.faults.repairs import Repairs
from hipa_deploy.engines.store.engine_key import EngineKey, brief, key_for
from hipa_deploy.engines.store.select import rebuild_command
from hipa_deploy.engines.store.sidecar import (
    Attempt,
    Sidecar,
    check_engine_file,
    engine_path,
    read_rejection,
    read_sidecar,
    rejected_path,
)
from hipa_deploy.engines.targets.target import Target, binding
from hipa_deploy.engines.tensorrt.gpu import Gpu, find_gpu
from hipa_deploy.engines.tensorrt.library import TensorRTLibrary, load_tensorrt
from hipa_deploy.errors import HipaError
from hipa_deploy.record import Record

# An engine that failed its gate, and its report.
_REJECTED = (".rejected", ".rejection")
UNKNOWN = "not known here"

# The fields of the key that the bundle alone decides.
_OF_BUNDLE = ("onnx_sha256", "external_sha256", "precision", "axes")


class Field(Record):
    """A field of the key: its value in the engine, and the value that a build here would have."""

    name: str
    built: str
    here: str
    verdict: Literal["same", "differs", "unknown"]


class Diagnosis(Record):
    """What ``hipa-doctor ENGINE`` prints. ``rebuild`` is the command for a fitting engine."""

    path: str
    stage: str
    built_by: str
    precision: str
    check: str
    attention: str
    repairs: str
    remedies: tuple[str, ...]
    attempts: tuple[str, ...]
    fields: tuple[Field, ...]
    rebuild: str
    problems: tuple[str, ...]


def is_engine(path: Path) -> bool:
    """Whether a path names an engine or its sidecar, whether or not the file exists."""
    return path.suffix in (".engine", ".json", *_REJECTED) and not path.is_dir()


def diagnose(path: Path) -> Diagnosis:
    """Explain the engine at ``path``, or the engine of the sidecar at ``path``.

    An engine that failed its gate is explained by its report. Nothing is deserialised, and no GPU
    is needed.

    Raises:
        HipaError: there is no sidecar that can be read.

    """
    sidecar_file = path.with_suffix(".json")
    if path.suffix in _REJECTED:
        return _diagnose_rejected(path, sidecar_file)
    if not sidecar_file.is_file():
        problem = "has no sidecar" if path.is_file() else "does not exist"
        raise HipaError(
            f"{path} {problem}. Expected {sidecar_file.name} beside the engine. "
            "Run hipa-build again."
        )

    return _diagnose(sidecar_file, _sidecar_at(sidecar_file), ())


def _sidecar_at(path: Path) -> Sidecar:
    """The sidecar at a path that a user gave.

    Raises:
        HipaError: it cannot be read. The advice to remove it is given beside an engine alone: any
            other JSON file may be a bundle's manifest, or a report.

    """
    try:
        return read_sidecar(path)
    except HipaError:
        if engine_path(path).is_file():
            raise
        raise HipaError(
            f"{path} is not an engine's sidecar, and no {engine_path(path).name} lies beside it. "
            "Expected a bundle's folder, an .engine file, or an image."
        ) from None


def _diagnose_rejected(path: Path, sidecar_file: Path) -> Diagnosis:
    report = read_rejection(path.with_suffix(".rejection"))
    problems = [f"it failed its gate ({report.sidecar.check}), so that no command loads it."]
    if report.bisection is not None:
        problems.append(str(report.bisection))
    problems += report.advice
    found = _diagnose(sidecar_file, report.sidecar, tuple(problems))
    return found.model_copy(update={"path": str(rejected_path(sidecar_file))})


def engine_stage(path: Path) -> tuple[Bundle, str, EngineKey]:
    """The bundle, the stage and the key of the engine at ``path``, or of a rejected one.

    Raises:
        HipaError: there is no sidecar or report that can be read, or no bundle around it.

    """
    if path.suffix in _REJECTED:
        sidecar = read_rejection(path.with_suffix(".rejection")).sidecar
    else:
        sidecar = _sidecar_at(path.with_suffix(".json"))
    bundle = Bundle.open(_bundle_root(path.with_suffix(".json")))
    return bundle, sidecar.stage, sidecar.key


def _diagnose(sidecar_file: Path, sidecar: Sidecar, known: tuple[str, ...]) -> Diagnosis:
    """Explain an engine by its sidecar. ``known``: what is wrong with it as its report has it."""
    key = sidecar.key
    bundle = _bundle_of(sidecar_file)
    fields = tuple(_compare(key, _values_here(sidecar, bundle, find_gpu())))
    check = sidecar.precision_check
    layers = check.float16 + check.float32
    return Diagnosis(
        path=str(engine_path(sidecar_file)),
        stage=sidecar.stage,
        built_by=f"{sidecar.producer}, {key.flavour} {key.tensorrt}, "
        f"in {sidecar.build_seconds:.1f} s",
        precision=f"{check.float16} of {layers} layers in float16, by the {check.by}",
        check=str(sidecar.check) if sidecar.check else "not run: built by an older version",
        attention=str(sidecar.attention or "none in this stage, or not counted"),
        repairs=str(key.repairs or Repairs()),
        remedies=tuple(str(remedy) for remedy in sidecar.remedies),
        attempts=tuple(_attempt(attempt) for attempt in sidecar.attempts),
        fields=fields,
        rebuild=rebuild_command(_bundle_root(sidecar_file), key.flavour, key.options),
        # A rejected engine has no file of an engine's name.
        problems=known or tuple(_problems(sidecar_file, sidecar, bundle, fields)),
    )


def _attempt(attempt: Attempt) -> str:
    """A build that was tried, in a line: 'outputs add_3: passed: 52.1 dB …; 4.10 ms; …'."""
    outcome = str(attempt.check) if attempt.check else f"not built: {attempt.error}"
    parts = [f"{attempt.repairs}: {outcome}"]
    if attempt.latency_ms is not None:
        parts.append(f"{attempt.latency_ms:.2f} ms")
    if attempt.build_seconds is not None:
        parts.append(f"built in {attempt.build_seconds:.0f} s")
    return "; ".join(parts)


def _bundle_root(sidecar_file: Path) -> Path:
    """The bundle's folder: a sidecar is at BUNDLE/engines/NAME/FILE."""
    folders = sidecar_file.parents
    if len(folders) < 3:  # a relative path, named from a folder inside the bundle
        folders = sidecar_file.absolute().parents
    return folders[min(2, len(folders) - 1)]


def _bundle_of(sidecar_file: Path) -> Bundle | None:
    """The bundle whose ``engines`` folder holds the sidecar; None for an engine moved elsewhere."""
    try:
        return Bundle.open(_bundle_root(sidecar_file))
    except HipaError:
        return None


def _values_here(sidecar: Sidecar, bundle: Bundle | None, gpu: Gpu | None) -> dict[str, Any]:
    """The key's values that a build with the same options would have here and now.

    A value that cannot be found out here is absent: without the bundle its hashes, without the
    TensorRT library its version, without a GPU everything about the GPU.
    """
    built = sidecar.key
    # By the field names of the file format: the TensorRT library is "flavour" there.
    values: dict[str, Any] = {
        "options": built.options,
        "flavour": built.flavour,
        "repairs": built.repairs,
    }

    if bundle is not None and sidecar.stage in bundle.all_stages:
        target = Target(name="here", compute_capabilities=built.compute_capabilities)
        now = key_for(bundle, sidecar.stage, built.flavour, built.tensorrt, target, built.options)
        for name in _OF_BUNDLE:
            values[name] = getattr(now, name)

    version = _version(built.flavour)
    if version is not None:
        values["tensorrt"] = version

    if gpu is not None:
        fits = gpu.sm in built.compute_capabilities
        values["compute_capabilities"] = built.compute_capabilities if fits else (gpu.sm,)
        values.update(binding(built.flavour, gpu))
    return values


def _version(library: TensorRTLibrary) -> str | None:
    try:
        return str(load_tensorrt(library).__version__)
    except HipaError:
        return None


def _compare(built: EngineKey, here: dict[str, Any]) -> list[Field]:
    """Every field of the key, in the key's order."""
    return [_field(name, getattr(built, name), here) for name in EngineKey.model_fields]


def _field(name: str, built: Any, here: dict[str, Any]) -> Field:
    verdict: Literal["same", "differs", "unknown"]
    if name in here:
        verdict = "same" if here[name] == built else "differs"
        return Field(name=name, built=brief(built), here=brief(here[name]), verdict=verdict)
    # None: the engine is not bound to it, so it fits whatever the value is here.
    verdict = "same" if built is None else "unknown"
    return Field(name=name, built=brief(built), here=UNKNOWN, verdict=verdict)


def _problems(
    path: Path, sidecar: Sidecar, bundle: Bundle | None, fields: tuple[Field, ...]
) -> list[str]:
    """What keeps the engine from being used, a sentence each."""
    problems = []
    try:
        # No remedy: the diagnosis has the command once, for all problems.
        check_engine_file(engine_path(path), sidecar, "")
    except HipaError as error:
        problems.append(str(error).strip())

    if bundle is None:
        problems.append(
            f"{_bundle_root(path)} is not a bundle: an engine is used from BUNDLE/engines/NAME."
        )

    differing = [field.name for field in fields if field.verdict == "differs"]
    if differing:
        verb = "differs" if len(differing) == 1 else "differ"
        problems.append(f"it does not fit here: {', '.join(differing)} {verb}.")
    return problems

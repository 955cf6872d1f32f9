"""Why an engine does or does not fit here: every field of its key, as it was built and as it would be built now."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.engines.store.engine_key import EngineKey, brief, key_for
from hipa_deploy.engines.store.select import rebuild_command
from hipa_deploy.engines.store.sidecar import Sidecar, check_engine_file, engine_path, read_sidecar
from hipa_deploy.engines.targets.target import Target, binding
from hipa_deploy.engines.tensorrt.gpu import Gpu, find_gpu
from hipa_deploy.engines.tensorrt.library import TensorRTLibrary, load_tensorrt
from hipa_deploy.errors import HipaError
from hipa_deploy.record import Record

UNKNOWN = "cannot be told here"
_OF_BUNDLE = ("onnx_sha256", "external_sha256", "precision", "axes")


class Field(Record):
    """A field of the key. ``here`` is what a build would have now."""

    name: str
    built: str
    here: str
    verdict: Literal["same", "differs", "unknown"]


class Diagnosis(Record):
    """What ``hipa-doctor ENGINE`` says. ``rebuild`` is the command that makes an engine that fits."""

    path: str
    stage: str
    built_by: str
    precision: str
    fields: tuple[Field, ...]
    rebuild: str
    problems: tuple[str, ...]


def is_engine(path: Path) -> bool:
    """Whether a path names an engine or its sidecar, there or not."""
    return path.suffix in (".engine", ".json") and not path.is_dir()


def diagnose(path: Path) -> Diagnosis:
    """Explain the engine, or the engine of the sidecar, at ``path``; nothing is deserialised and no GPU is needed.

    Raises:
        HipaError: no sidecar that can be read.

    """
    sidecar_file = path.with_suffix(".json")
    if not sidecar_file.is_file():
        missing = "has no sidecar" if path.is_file() else "does not exist"
        raise HipaError(
            f"{path} {missing}. Expected {sidecar_file.name} beside the engine. Run hipa-build again."
        )
    sidecar = read_sidecar(sidecar_file)
    bundle = _bundle_of(sidecar_file)
    fields = tuple(_compare(sidecar.key, _here(sidecar, bundle, find_gpu())))
    check = sidecar.precision_check
    return Diagnosis(
        path=str(engine_path(sidecar_file)),
        stage=sidecar.stage,
        built_by=f"{sidecar.producer}, {sidecar.key.flavour} {sidecar.key.tensorrt}, in {sidecar.build_seconds:.1f} s",
        precision=f"{check.float16} of {check.float16 + check.float32} layers in float16, by the {check.by}",
        fields=fields,
        rebuild=rebuild_command(sidecar_file.parents[2], sidecar.key.flavour, sidecar.key.options),
        problems=tuple(_problems(sidecar_file, sidecar, bundle, fields)),
    )


def _bundle_of(sidecar_file: Path) -> Bundle | None:
    """The bundle whose ``engines`` folder the sidecar lies in; None for an engine that was taken elsewhere."""
    try:
        return Bundle.open(sidecar_file.parents[2])
    except (HipaError, IndexError):
        return None


def _here(sidecar: Sidecar, bundle: Bundle | None, gpu: Gpu | None) -> dict[str, Any]:
    """The key's fields as a build with the same options would have them now; those that cannot be told are absent."""
    built = sidecar.key
    fields: dict[str, Any] = {"options": built.options, "flavour": built.flavour}
    if bundle is not None and sidecar.stage in bundle.stages:
        target = Target(name="here", compute_capabilities=built.compute_capabilities)
        now = key_for(bundle, sidecar.stage, built.flavour, built.tensorrt, target, built.options)
        fields.update({name: getattr(now, name) for name in _OF_BUNDLE})
    if (version := _version(built.flavour)) is not None:
        fields["tensorrt"] = version
    if gpu is not None:
        fits = gpu.sm in built.compute_capabilities
        fields["compute_capabilities"] = built.compute_capabilities if fits else (gpu.sm,)
        fields.update(binding(built.flavour, gpu))
    return fields


def _version(library: TensorRTLibrary) -> str | None:
    try:
        return str(load_tensorrt(library).__version__)
    except HipaError:
        return None


def _compare(built: EngineKey, here: dict[str, Any]) -> list[Field]:
    return [_field(name, getattr(built, name), here) for name in EngineKey.model_fields]


def _field(name: str, built: Any, here: dict[str, Any]) -> Field:
    if name not in here:
        not_bound = built is None
        return Field(
            name=name, built=brief(built), here=UNKNOWN, verdict="same" if not_bound else "unknown"
        )
    verdict: Literal["same", "differs"] = "same" if here[name] == built else "differs"
    return Field(name=name, built=brief(built), here=brief(here[name]), verdict=verdict)


def _problems(
    path: Path, sidecar: Sidecar, bundle: Bundle | None, fields: tuple[Field, ...]
) -> list[str]:
    problems = []
    try:
        check_engine_file(engine_path(path), sidecar, "")
    except HipaError as error:
        problems.append(str(error).strip())
    if bundle is None:
        problems.append(
            f"{path.parents[2]} is not a bundle: an engine is used from BUNDLE/engines/NAME."
        )
    differing = [field.name for field in fields if field.verdict == "differs"]
    if differing:
        problems.append(
            f"it does not fit here: {', '.join(differing)} differ{'s' if len(differing) == 1 else ''}."
        )
    return problems

"""The key of an engine: what it was made from, and where it may run."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import Field

from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.bundle.manifest import Axis, Precision
from hipa_deploy.engines.targets.build_options import BuildOptions
from hipa_deploy.engines.targets.target import Target, binding
from hipa_deploy.engines.tensorrt.gpu import Gpu
from hipa_deploy.engines.tensorrt.library import TensorRTLibrary
from hipa_deploy.record import Record

if TYPE_CHECKING:
    pass


class EngineKey(Record):
    """Everything an engine depends on: an equal key needs no rebuild. None: not bound to it."""

    onnx_sha256: str
    external_sha256: tuple[str, ...]
    precision: Precision
    axes: dict[str, Axis] = Field(default_factory=dict)
    options: BuildOptions
    # The TensorRT library, under the name that the file format has for it.
    flavour: TensorRTLibrary
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
    library: TensorRTLibrary,
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
        flavour=library,
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

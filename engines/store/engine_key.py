"""The key of an engine: what it was made from, and where it may run.

TensorRT's own message for an engine that does not fit names neither the difference nor a remedy.
So the key is compared before an engine is deserialised.
"""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

from pydantic import Field

from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.bundle.manifest import Axis, Precision
from hipa_deploy.engines.faults.repairs import Repairs
from hipa_deploy.engines.targets.build_options import BuildOptions
from hipa_deploy.engines.targets.target import Target, binding
from hipa_deploy.engines.tensorrt.gpu import Gpu
from hipa_deploy.engines.tensorrt.library import TensorRTLibrary
from hipa_deploy.record import Record

_SHA256_DIGITS = 64
_SHORT_DIGITS = 12  # of a hash, where a person or a file name has to hold it


class EngineKey(Record):
    """Everything that an engine depends on: with an equal key it needs no rebuild.

    None: the engine is not bound to it. The fields and their order are part of the file format:
    ``short`` is a hash of them, and stands in file names.
    """

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
    # What was changed to mend the engine; None for an engine as the options alone make it.
    repairs: Repairs | None = None

    @property
    def short(self) -> str:
        """Twelve hexadecimal digits that stand for the key in file names."""
        # pydantic writes the fields in the order of the class, so equal keys have equal text.
        # Without repairs it is the text of versions that knew none: their engines keep their names.
        absent = {"repairs"} if self.repairs is None else None
        text = self.model_dump_json(exclude=absent)
        return hashlib.sha256(text.encode()).hexdigest()[:_SHORT_DIGITS]

    @property
    def barriers(self) -> tuple[str, ...]:
        """Outputs of the engine that nobody reads."""
        return self.repairs.barriers if self.repairs else ()

    def repaired(self, repairs: Repairs) -> EngineKey:
        """This key with other repairs."""
        return self.model_copy(update={"repairs": repairs if repairs.any else None})


class Difference(NamedTuple):
    """A field of the key in which an engine does not fit."""

    field: str
    built: Any
    here: Any

    def __str__(self) -> str:
        return f"{self.field} was {brief(self.built)}, is {brief(self.here)}"


def brief(value: Any) -> str:
    """A value of the key for people: hashes cut short, only options that are set, '-' for None."""
    if value is None:
        return "-"
    if isinstance(value, BuildOptions):
        return value.model_dump_json(exclude_defaults=True)
    if isinstance(value, Repairs):
        return str(value)
    if isinstance(value, tuple):
        return "[" + ", ".join(brief(part) for part in value) + "]"
    if isinstance(value, str) and len(value) == _SHA256_DIGITS:
        return value[:_SHORT_DIGITS] + "…"
    return str(value)


def differences(built: EngineKey, here: EngineKey) -> list[Difference]:
    """The fields in which two keys differ, in the key's order."""
    found = []
    for name in EngineKey.model_fields:
        pair = Difference(name, getattr(built, name), getattr(here, name))
        if pair.built != pair.here:
            found.append(pair)
    return found


def key_for(
    bundle: Bundle,
    stage: str,
    library: TensorRTLibrary,
    version: str,
    target: Target,
    options: BuildOptions,
) -> EngineKey:
    """The key of an engine of ``stage``, built for ``target``.

    The hashes come from the manifest: ``bundle.verify`` checks the files against them.

    Args:
        bundle: the bundle that has the stage.
        stage: the stage's name.
        library: the TensorRT library that builds the engine.
        version: that library's version.
        target: where the engine is to run.
        options: the build options; the timing cache is no part of the key.

    """
    files = bundle.manifest.files
    # The weights lie beside the graph: model.onnx.data, or several such files.
    external = [files[name] for name in bundle.weight_files(stage)]
    return EngineKey(
        onnx_sha256=files[bundle.all_stages[stage].path],
        external_sha256=tuple(external),
        precision=bundle.all_stages[stage].precision,
        axes=bundle.all_stages[stage].spec.axes,
        # A timing cache changes how long a build takes, not what an engine depends on.
        options=options.model_copy(update={"timing_cache": None}),
        flavour=library,
        tensorrt=version,
        **target.model_dump(exclude={"name"}),
    )


def key_here(built: EngineKey, bundle: Bundle, stage: str, version: str, gpu: Gpu) -> EngineKey:
    """The key that an engine with the key ``built`` would need on ``gpu``, with the same options.

    An engine may be built for several GPUs. Where this one is among them, its capabilities fit.
    """
    fits = gpu.sm in built.compute_capabilities
    target = Target(
        name="here",
        compute_capabilities=built.compute_capabilities if fits else (gpu.sm,),
        **binding(built.flavour, gpu),
    )
    here = key_for(bundle, stage, built.flavour, version, target, built.options)
    # An engine passed its gate with the repairs that it has, so they fit wherever it fits.
    return here.model_copy(update={"repairs": built.repairs})

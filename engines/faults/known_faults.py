"""Faults of TensorRT that are known in public, with their remedies (``known_faults.toml``)."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import Field

from hipa_deploy.bundle.manifest import Precision
from hipa_deploy.disk.reading import shown
from hipa_deploy.engines.faults.repairs import Repairs
from hipa_deploy.engines.tensorrt.library import TensorRTLibrary
from hipa_deploy.errors import HipaError
from hipa_deploy.record import Record

# Python 3.10 has no tomllib.
if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_FILE = Path(__file__).parent / "known_faults.toml"

Apply = Literal["always", "if wrong", "tell", "not here"]


class Build(Record):
    """What decides whether a build meets a fault.

    Attributes:
        library: the TensorRT library.
        version: its version, such as '10.13.3.9'.
        sms: compute capabilities times ten, of every GPU that the engine is for.
        batch: images at once, the most that the engine takes.
        precision: of the stage.
        operators: ONNX operators in its graph.

    """

    library: TensorRTLibrary
    version: str
    sms: tuple[int, ...]
    batch: int
    precision: Precision
    operators: frozenset[str]


class KnownFault(Record):
    """A fault; ``known_faults.toml`` says what each field means."""

    id: str
    libraries: tuple[TensorRTLibrary, ...]
    first: str
    before: str | None = None
    sm: tuple[int, ...] = ()
    batch: int | None = None
    least_batch: int = 1
    precision: tuple[Precision, ...] = ()
    operators: tuple[str, ...] = ()
    error: str | None = None
    symptom: str
    remedy: str
    cost: str = ""
    apply: Apply
    myelin: tuple[str, ...] = ()
    islands: tuple[str, ...] = ()
    optimization_level: int | None = None
    sources: tuple[str, ...] = Field(min_length=1)
    origin: Literal["thread", "title"] = Field(alias="from")

    def is_met_by(self, build: Build) -> bool:
        """Whether a build is one of those that have the fault."""
        number = version_number(build.version)
        ended = self.before is not None and number >= version_number(self.before)
        return (
            build.library in self.libraries
            and number >= version_number(self.first)
            and not ended
            and (not self.sm or not set(self.sm).isdisjoint(build.sms))
            and self.batch in (None, build.batch)
            and build.batch >= self.least_batch
            and (not self.precision or build.precision in self.precision)
            and (not self.operators or not build.operators.isdisjoint(self.operators))
        )


def version_number(text: str) -> tuple[int, ...]:
    """A version as numbers that compare: '10.13.3.9' is (10, 13, 3, 9)."""
    return tuple(int(part) for part in re.findall(r"\d+", text))


@functools.cache
def known_faults() -> tuple[KnownFault, ...]:
    """Every fault of the data file, in its order."""
    content = tomllib.loads(_FILE.read_text(encoding="utf-8"))
    return tuple(KnownFault.model_validate(entry) for entry in content["fault"])


def find_fault(name: str) -> KnownFault:
    """The fault with this id.

    Raises:
        HipaError: there is none.

    """
    for fault in known_faults():
        if fault.id == name:
            return fault
    mendable = [fault.id for fault in known_faults() if fault.cost]
    raise HipaError(
        f"no known fault of TensorRT is called {shown(name)}. Expected one with a remedy: "
        f"{', '.join(mendable)}."
    )


def faults_of(build: Build, apply: Apply) -> tuple[KnownFault, ...]:
    """The faults that a build meets, of those with this ``apply``.

    Example:
        >>> [fault.id for fault in faults_of(thor, "always")]
        ['fc-h-fusion', 'match-dual-gemm']

    """
    return tuple(
        fault for fault in known_faults() if fault.apply == apply and fault.is_met_by(build)
    )


def remedies(faults: Iterable[KnownFault], before: Repairs = Repairs()) -> Repairs:
    """``before``, and the remedies of ``faults``."""
    known = list(before.known_faults)
    myelin = list(before.myelin)
    islands = list(before.islands)
    level = before.optimization_level
    for fault in faults:
        known += [fault.id] if fault.id not in known else []
        myelin += [option for option in fault.myelin if option not in myelin]
        islands += [island for island in fault.islands if island not in islands]
        if fault.optimization_level is not None:
            level = fault.optimization_level
    return before.model_copy(
        update={
            "known_faults": tuple(known),
            "myelin": tuple(myelin),
            "islands": tuple(islands),
            "optimization_level": level,
        }
    )

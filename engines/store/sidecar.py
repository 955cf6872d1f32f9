"""The JSON file beside an engine, called its sidecar, and where both files lie.

Both are in ``BUNDLE/engines/<library>-<target>/``: ``<stage>-<key>.engine``, and ``.json`` with the
same stem. An engine that failed its gate is ``.rejected`` instead, and its report ``.rejection``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.bundle.manifest import Parity, StageName
from hipa_deploy.disk.hashing import file_sha256
from hipa_deploy.disk.reading import MIB, inside, inside_folder, read_record
from hipa_deploy.engines.faults.bisect import Bisection
from hipa_deploy.engines.faults.repairs import Repairs
from hipa_deploy.engines.store.engine_key import EngineKey
from hipa_deploy.engines.tensorrt.library import TensorRTLibrary
from hipa_deploy.errors import HipaError, reason_of
from hipa_deploy.record import Record

FOLDER = "engines"
LOCK = ".lock"  # in the folder of a target; a build holds it


class PrecisionCheck(Record):
    """How many layers compute in each type, and how that was found out.

    'network types' counts the convolutions and matrix products of the parsed network before the
    build; strong typing obliges TensorRT to keep their types. 'inspector' counts what the
    deserialised engine reports, which needs a driver.
    """

    by: Literal["network types", "inspector"]
    float16: int
    float32: int


class EngineCheck(Record):
    """How an engine did on the bundle's reference tensors.

    Attributes:
        outcome: 'not run' where no GPU here runs the engine, or has the memory for it now, or the
            bundle has no reference.
        detail: the reason, or what is wrong; empty if it passed.
        parity: against PyTorch in FP32; None where nothing could be measured.
        least_psnr_db: the gate, in dB.

    """

    outcome: Literal["passed", "failed", "not run"]
    detail: str = ""
    parity: Parity | None = None
    least_psnr_db: float | None = None

    def __str__(self) -> str:
        words: list[str] = [self.outcome]
        if self.parity is not None and self.least_psnr_db is not None:
            words.append(
                f"{self.parity.psnr_db:.1f} dB from PyTorch FP32, gate {self.least_psnr_db:.0f} dB"
            )
        if self.detail:
            words.append(self.detail)
        return ": ".join(words)


class AttentionCount(Record):
    """How many attentions an engine computes in one kernel each.

    Attributes:
        in_graph: the attentions of the stage's graph, as it was built.
        fusable: those that meet TensorRT's conditions for one kernel.
        fused: those in one kernel, by the engine's inspector; None where it names no layers:
            without a GPU, and in an engine of TensorRT-RTX, which compiles its kernels when it is
            loaded.
        islands: float32 parts of the graph that keep an attention from being fused.

    """

    in_graph: int
    fusable: int
    fused: int | None
    islands: tuple[str, ...] = ()

    def __str__(self) -> str:
        fused = "not known how many" if self.fused is None else str(self.fused)
        return f"{fused} of {self.in_graph} fused; {self.fusable} could be"


class AppliedRemedy(Record):
    """A known fault of TensorRT whose remedy an engine was built with.

    Attributes:
        fault: its id in ``known_faults.toml``.
        remedy: what was done.
        cost: what that costs, in words.
        sources: the public threads that say so.

    """

    fault: str
    remedy: str
    cost: str
    sources: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.fault}: {self.remedy} Cost: {self.cost} ({', '.join(self.sources)})"


class Attempt(Record):
    """A build that was tried for an engine.

    Attributes:
        repairs: what was changed.
        check: how it did; None if the build failed.
        error: why the build failed.
        build_seconds: of the build; None if it failed.
        latency_ms: the engine's median time on this GPU; None if it does not run.

    """

    repairs: Repairs
    check: EngineCheck | None = None
    error: str = ""
    build_seconds: float | None = None
    latency_ms: float | None = None


class Sidecar(Record):
    """What the JSON file beside an engine holds.

    ``candidates_ms`` is the median latency of every build with ``--best-of``, the fastest kept.
    ``activation_bytes`` is what TensorRT says its activations take, None where no GPU loaded it.
    ``chosen_at`` is when a build made this engine, or found it up to date where another would have
    run, in seconds since 1970. These two, ``check``, ``attention``, ``attempts`` and ``remedies``
    are absent in files of older versions. ``attempts`` has the builds that failed their gate before
    this one, and this one; it is empty without any. ``remedies`` are those of known faults that are
    among the key's repairs.
    """

    schema_version: Literal[1] = 1
    producer: str
    stage: StageName
    key: EngineKey
    precision_check: PrecisionCheck
    engine_sha256: str
    engine_bytes: int
    chosen_at: float | None = None
    activation_bytes: int | None = None
    build_seconds: float
    build_peak_mib: int | None
    candidates_ms: tuple[float, ...] = ()
    check: EngineCheck | None = None
    attention: AttentionCount | None = None
    attempts: tuple[Attempt, ...] = ()
    remedies: tuple[AppliedRemedy, ...] = ()


class Rejection(Record):
    """What the file beside an engine that failed its gate holds.

    Attributes:
        sidecar: what its sidecar would have held.
        bisection: where it goes wrong; None if that was not looked for.
        advice: faults of this TensorRT that are known and that no build can mend.

    """

    schema_version: Literal[1] = 1
    sidecar: Sidecar
    bisection: Bisection | None = None
    advice: tuple[str, ...] = ()


def read_sidecar(path: Path) -> Sidecar:
    """Read the JSON file of an engine.

    Raises:
        HipaError: the file is not a sidecar, or has another schema version.

    """
    try:
        return read_record(path, Sidecar, "", max_bytes=MIB)
    except HipaError as error:
        raise HipaError(
            f"{path} is not an engine's sidecar of this version ({reason_of(error)}). "
            "Remove it and run hipa-build again."
        ) from None


def find_sidecars(
    bundle: Bundle, stage: str, library: TensorRTLibrary, *, skip_damaged: bool = False
) -> dict[Path, Sidecar]:
    """The sidecars of a stage's engines by path, the one that was chosen last first.

    A file of an older version does not say when it was chosen, and comes behind those that do.
    Among such files the time of the last change counts, which a copy of the bundle does not keep.

    Args:
        bundle: the bundle.
        stage: the stage's name.
        library: 'rtx' or 'tensorrt'.
        skip_damaged: leave out what cannot be read.

    Raises:
        HipaError: a sidecar cannot be read.

    """
    sidecars = {}
    for path in (bundle.root / FOLDER).glob(f"{library}-*/{stage}-*.json"):
        try:
            inside_path = inside(bundle.root, path.relative_to(bundle.root).as_posix())
            sidecars[inside_path] = read_sidecar(inside_path)
        except HipaError:
            if not skip_damaged:
                raise

    def chosen_at(path: Path) -> tuple[bool, float]:
        noted = sidecars[path].chosen_at
        return noted is not None, path.stat().st_mtime if noted is None else noted

    # By name where the times are equal, so that every machine takes the same one.
    paths = sorted(sorted(sidecars), key=chosen_at, reverse=True)
    return {path: sidecars[path] for path in paths}


def engine_folder(bundle: Bundle, library: TensorRTLibrary, target: str) -> Path:
    """The folder of the bundle where engines for ``target`` are written.

    Raises:
        HipaError: it, or its lock, is a link that leads out of the bundle.

    """
    folder = inside_folder(bundle.root, f"{FOLDER}/{library}-{target}")
    inside_folder(folder, LOCK)  # it is opened for writing
    return folder


def engine_path(sidecar_path: Path) -> Path:
    """The engine file that a sidecar describes."""
    return sidecar_path.with_suffix(".engine")


def rejected_path(sidecar_path: Path) -> Path:
    """Where an engine is kept that failed its gate. No command loads a file of this name."""
    return sidecar_path.with_suffix(".rejected")


def rejection_path(sidecar_path: Path) -> Path:
    """The report beside such an engine; no sidecar is looked for under this name."""
    return sidecar_path.with_suffix(".rejection")


def read_rejection(path: Path) -> Rejection:
    """Read the report of an engine that failed its gate.

    Raises:
        HipaError: the file is no such report.

    """
    try:
        return read_record(path, Rejection, "", max_bytes=MIB)
    except HipaError as error:
        raise HipaError(
            f"{path} is not the report of a rejected engine ({reason_of(error)}). "
            "Remove it and run hipa-build again."
        ) from None


def check_engine_file(path: Path, sidecar: Sidecar, remedy: str) -> None:
    """Raise HipaError unless ``path`` has the size and SHA-256 that its sidecar says.

    ``remedy`` ends the message: how to get a whole engine.
    """
    if not path.exists():
        raise HipaError(f"{path} is missing beside its sidecar. {remedy}")
    inside(path.parent, path.name)
    # The size first: hashing a file of gigabytes takes seconds.
    if path.stat().st_size != sidecar.engine_bytes or file_sha256(path) != sidecar.engine_sha256:
        raise HipaError(f"{path} is corrupt: its size or SHA-256 is not the sidecar's. {remedy}")

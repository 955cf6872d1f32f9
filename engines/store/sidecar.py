"""The JSON file beside an engine, called its sidecar, and where both files lie.

Both are in ``BUNDLE/engines/<library>-<target>/``: ``<stage>-<key>.engine``, and ``.json`` with the
same stem.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.bundle.manifest import StageName
from hipa_deploy.disk.hashing import file_sha256
from hipa_deploy.disk.reading import MIB, inside, inside_folder, read_record
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


class Sidecar(Record):
    """What the JSON file beside an engine holds.

    ``candidates_ms`` is the median latency of every build with ``--best-of``; the fastest was kept.
    """

    schema_version: Literal[1] = 1
    producer: str
    stage: StageName
    key: EngineKey
    precision_check: PrecisionCheck
    engine_sha256: str
    engine_bytes: int
    build_seconds: float
    build_peak_mib: int | None
    candidates_ms: tuple[float, ...] = ()


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


def find_sidecars(bundle: Bundle, stage: str, library: TensorRTLibrary) -> dict[Path, Sidecar]:
    """The sidecars of a stage's engines by path, newest first.

    Raises:
        HipaError: a sidecar cannot be read.

    """
    paths = []
    for path in (bundle.root / FOLDER).glob(f"{library}-*/{stage}-*.json"):
        paths.append(inside(bundle.root, path.relative_to(bundle.root).as_posix()))
    paths.sort(key=_modified_ns, reverse=True)
    return {path: read_sidecar(path) for path in paths}


def _modified_ns(path: Path) -> int:
    return path.stat().st_mtime_ns


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

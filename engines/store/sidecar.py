"""The JSON beside an engine, and where both files lie."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import ValidationError

from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.engines.store.engine_key import EngineKey
from hipa_deploy.engines.tensorrt.library import TensorRTLibrary
from hipa_deploy.errors import HipaError
from hipa_deploy.hashing import file_sha256
from hipa_deploy.record import Record

if TYPE_CHECKING:
    pass


FOLDER = "engines"


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


def find_sidecars(bundle: Bundle, stage: str, library: TensorRTLibrary) -> dict[Path, Sidecar]:
    """Sidecars of a stage's engines by path, newest first.

    Raises:
        HipaError: a sidecar that cannot be read.

    """
    paths = (bundle.root / FOLDER).glob(f"{library}-*/{stage}-*.json")
    return {
        path: read_sidecar(path)
        for path in sorted(paths, key=lambda path: path.stat().st_mtime_ns, reverse=True)
    }


def engine_path(sidecar_path: Path) -> Path:
    """The engine file that a sidecar describes."""
    return sidecar_path.with_suffix(".engine")


def check_engine_file(path: Path, sidecar: Sidecar, remedy: str) -> None:
    """Raise HipaError unless ``path`` has the size and SHA-256 that its sidecar says."""
    if not path.is_file():
        raise HipaError(f"{path} is missing beside its sidecar. {remedy}")
    if path.stat().st_size != sidecar.engine_bytes or file_sha256(path) != sidecar.engine_sha256:
        raise HipaError(f"{path} is corrupt: its size or SHA-256 is not the sidecar's. {remedy}")

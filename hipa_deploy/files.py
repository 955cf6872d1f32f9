"""Writing that leaves either the whole result or nothing."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hipa_deploy.errors import HipaError


def user_cache() -> Path:
    """Where what can be made again is kept: $HIPA_CACHE, or ~/.cache/hipa-deploy."""
    return Path(os.environ.get("HIPA_CACHE") or Path.home() / ".cache" / "hipa-deploy")


def refuse_to_overwrite(out: Path) -> None:
    """Raise HipaError if ``out`` is a file, a folder with anything in it, or where we stand."""
    if out.resolve() == Path.cwd():
        raise HipaError(f"{out} is the current folder. Choose a name for a new one.")
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise HipaError(f"{out} exists and is not empty. Choose another name, or remove it first.")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``out`` on success and vanishes on any failure.

    Raises:
        HipaError: ``out`` exists and is not empty.

    """
    refuse_to_overwrite(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        yield scratch
        scratch.chmod(0o755)
        if out.is_dir():
            out.rmdir()
        scratch.replace(out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_file(path: Path, content: bytes) -> None:
    """Write to a temporary name in the same folder, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    finally:
        Path(name).unlink(missing_ok=True)

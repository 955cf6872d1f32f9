"""Writing of files and folders that leaves either the complete result or nothing."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hipa_deploy.errors import HipaError


def user_cache() -> Path:
    """Return the folder of files that can be made again: $HIPA_CACHE, or ~/.cache/hipa-deploy."""
    return Path(os.environ.get("HIPA_CACHE") or Path.home() / ".cache" / "hipa-deploy")


def refuse_to_overwrite(out: Path) -> None:
    """Check that writing to ``out`` would replace nothing.

    Raises:
        HipaError: ``out`` is a file, a folder that is not empty, or the current folder.

    """
    if out.resolve() == Path.cwd():
        raise HipaError(f"{out} is the current folder. Choose a name for a new one.")
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise HipaError(f"{out} exists and is not empty. Choose another name, or remove it first.")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``out`` on success and is removed on any failure.

    Raises:
        HipaError: ``out`` exists and is not empty.

    Example:
        >>> with new_folder(Path("bundle")) as scratch:
        ...     (scratch / "hipa.json").write_text("{}")

    """
    refuse_to_overwrite(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    # Beside ``out``, so that the two are on one disk and the last step is a rename.
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        yield scratch
        scratch.chmod(0o755)  # mkdtemp makes a folder that only its owner can read
        # A rename replaces an empty folder on Linux, but not on Windows.
        if out.is_dir():
            out.rmdir()
        scratch.replace(out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_file(path: Path, content: bytes) -> None:
    """Write a file completely or not at all; its folder is made if necessary.

    Raises:
        OSError: the file cannot be written.

    """
    # A reader sees the old file or the new one, since a rename within a folder is atomic.
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    scratch = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        scratch.chmod(0o644)  # mkstemp makes a file that only its owner can read
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)

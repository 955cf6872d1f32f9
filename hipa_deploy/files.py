"""Writing of files and folders that leaves either the complete result or nothing.

A result is made in a scratch file or folder, and renamed when it is complete. Scratch is removed
however the work ends. SIGKILL alone leaves it: the next process that writes in the same place
removes it. The owner of scratch holds a lock on it, so that none is removed while it is in use.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from hipa_deploy.errors import HipaError
from hipa_deploy.interrupts import uninterrupted
from hipa_deploy.locks import HAS_LOCKS, is_locked_now, is_still_at

# mkdtemp and mkstemp end a name in eight such characters.
_SCRATCH_FOLDER = re.compile(r"\..+-[a-z0-9_]{8}")
_SCRATCH_FILE = re.compile(r"\..+-[a-z0-9_]{8}\.hipa-tmp")
_FILE_SUFFIX = ".hipa-tmp"
_LOCK = ".hipa-lock"  # in every scratch folder; it shows that the folder is ours
_NAME_CHARACTERS = 40  # of the result's name in the scratch's: a file name has at most 255 bytes

_swept: set[Path] = set()


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
    with _scratch_folder(out.parent, out.name) as holder:
        scratch = holder / out.name
        scratch.mkdir()
        yield scratch
        try:
            # A rename replaces an empty folder on Linux, but not on Windows.
            if out.is_dir():
                out.rmdir()
            scratch.replace(out)
        except OSError:
            refuse_to_overwrite(out)  # another process was faster
            raise


@contextmanager
def temporary_folder(name: str) -> Iterator[Path]:
    """Yield a folder among the system's temporary files, which is removed at the end of the block.

    Args:
        name: what the folder is for; a part of its name.

    """
    with _scratch_folder(Path(tempfile.gettempdir()), name) as holder:
        folder = holder / name
        folder.mkdir()
        yield folder


def write_file(path: Path, content: bytes) -> None:
    """Write a file completely or not at all; its folder is made if necessary.

    What a link points to is written, not the link. A device or a pipe is written to directly.

    Raises:
        OSError: the file cannot be written.

    """
    path = Path(os.path.realpath(path))
    if path.exists() and not _can_be_replaced(path):
        path.write_bytes(content)
        return

    # A reader sees the old file or the new one, since a rename within a folder is atomic.
    path.parent.mkdir(parents=True, exist_ok=True)
    file, scratch = _scratch_file(path)
    try:
        with file:
            file.write(content)
            file.flush()
            scratch.chmod(0o644)  # mkstemp makes a file that only its owner can read
            # Renamed while it is locked; Windows has no locks and renames no open file.
            if not HAS_LOCKS:
                file.close()
            scratch.replace(path)
    finally:
        with uninterrupted():
            scratch.unlink(missing_ok=True)


def _can_be_replaced(path: Path) -> bool:
    """Whether a rename may replace ``path``; a folder is left to the rename, which refuses it."""
    mode = path.stat().st_mode
    return stat.S_ISREG(mode) or stat.S_ISDIR(mode)


@contextmanager
def _scratch_folder(parent: Path, name: str) -> Iterator[Path]:
    """Yield a new, locked folder in ``parent``; it is removed at the end of the block."""
    sweep(parent)
    with ExitStack() as stack:
        while True:
            holder = Path(tempfile.mkdtemp(prefix=_prefix(name), dir=parent))
            stack.callback(_remove, holder)
            try:
                file = (holder / _LOCK).open("w", encoding="utf-8")
            except FileNotFoundError:  # as below
                continue
            stack.enter_context(file)
            is_locked_now(file)
            # Before it was locked, a sweep of another process may have taken it for a leftover.
            if is_still_at(file, holder / _LOCK):
                break
        yield holder


def _scratch_file(path: Path) -> tuple[IO[bytes], Path]:
    """Make and lock a new file beside ``path``."""
    # Once for each folder: it may hold many files, and get many more.
    if path.parent not in _swept:
        sweep(path.parent)
        _swept.add(path.parent)
    while True:
        descriptor, name = tempfile.mkstemp(
            prefix=_prefix(path.name), suffix=_FILE_SUFFIX, dir=path.parent
        )
        file = os.fdopen(descriptor, "wb")
        is_locked_now(file)
        if is_still_at(file, Path(name)):
            return file, Path(name)
        file.close()


def _prefix(name: str) -> str:
    return f".{name[:_NAME_CHARACTERS]}-"


def sweep(folder: Path) -> None:
    """Remove the scratch that killed processes left in ``folder``.

    Only what this module made is removed, and only if no process holds its lock. What cannot be
    removed is left.
    """
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return
    for entry in entries:
        path = Path(entry.path)
        if _SCRATCH_FILE.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
            _sweep_if_dead(path, lock=path)
        elif _SCRATCH_FOLDER.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
            _sweep_if_dead(path, lock=path / _LOCK)


def _sweep_if_dead(scratch: Path, lock: Path) -> None:
    if lock.is_symlink():
        return
    try:
        # Not made if it is missing: such a folder is somebody else's.
        with lock.open("r+b") as file:
            if is_locked_now(file) and is_still_at(file, lock):
                _remove(scratch)
    except OSError:
        return


def _remove(path: Path) -> None:
    """Remove a file or folder, as far as that is possible."""
    with uninterrupted():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

"""Writing of files and folders that leaves either the complete result or nothing.

A result is made in a scratch file or folder, and renamed when it is complete. Scratch is removed
however the work ends. SIGKILL alone leaves it: the next process that writes in the same place
removes it. The owner of scratch holds a lock on it, so that none is removed while it is in use.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from hipa_deploy.disk.locks import HAS_LOCKS, is_locked_now, is_still_at, locked
from hipa_deploy.errors import HipaError
from hipa_deploy.interrupts import raise_interruption, uninterrupted

# mkdtemp ends a name in eight such characters, and so does a scratch file's name.
_SCRATCH_FOLDER = re.compile(r"\..+-[a-z0-9_]{8}")
_SCRATCH_FILE = re.compile(r"\..+-[a-z0-9_]{8}\.hipa-tmp")
_FILE_SUFFIX = ".hipa-tmp"
_LOCK = ".hipa-lock"  # in every scratch folder; it shows that the folder is ours
_NAME_CHARACTERS = 40  # of the result's name in the scratch's: a file name has at most 255 bytes

# Windows would change the ends of lines in a file that is not opened as binary.
_NEW_FILE = os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_BINARY", 0)

_swept: set[Path] = set()

# errno has no EDQUOT (the user's share of the disk is used up) on Windows.
_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}


def user_cache() -> Path:
    """Return the folder of files that can be made again.

    It is $HIPA_CACHE, else hipa-deploy in $XDG_CACHE_HOME or in ~/.cache. Of a user without a home
    it is a folder that cannot be made: whoever writes into it names HIPA_CACHE.
    """
    own = os.environ.get("HIPA_CACHE")
    # The XDG base directory specification says that a path that is not absolute is ignored.
    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        if own:
            # No shell has expanded a '~' in a Dockerfile or in a unit of systemd.
            return Path(own).expanduser()
        parent = shared if shared.is_absolute() else Path.home() / ".cache"
    except RuntimeError:  # a number without a name, as a container may have, and no HOME
        parent = Path(os.devnull)
    return parent / "hipa-deploy"


def refuse_to_overwrite(out: Path) -> None:
    """Check that a new folder ``out`` would replace nothing, and that it can be written.

    Raises:
        HipaError: ``out`` is a file, a folder that is not empty, the current folder, or a link that
            leads nowhere; or the folder around it cannot be written.

    """
    check_name(out)
    if Path(os.path.realpath(out)) == Path.cwd():
        raise HipaError(f"{out} is the current folder. Choose a name for a new one.")
    if out.is_symlink() and not out.exists():
        raise HipaError(f"{out} is a link that leads nowhere. Choose another name, or remove it.")
    is_empty_folder = out.is_dir() and not any(out.iterdir())
    if out.exists() and not is_empty_folder:
        raise HipaError(f"{out} exists and is not empty. Choose another name, or remove it first.")
    check_writable(out)


def check_name(out: Path) -> None:
    """Check that the system takes the name of a file or folder, which need not exist.

    Raises:
        HipaError: the name is too long, has a zero byte, or leads through a loop of links.

    """
    try:
        out.stat()
    except ValueError:
        raise HipaError(f"{out} has a character that no file name has. Choose another.") from None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            name = f"{str(out)[:60]}…"
            raise HipaError(
                f"{name}: the name is too long for this disk. Choose another."
            ) from None
        if error.errno == errno.ELOOP:
            raise HipaError(f"{out} is a loop of links. Choose another name.") from None


def check_space(out: Path, needed: int) -> None:
    """Check that the disk of a file or folder ``out``, which need not exist, has some space free.

    Args:
        out: what will be written.
        needed: the least number of bytes that it will have.

    Raises:
        HipaError: less is free.

    """
    folder = Path(os.path.realpath(out))
    while not folder.is_dir():
        folder = folder.parent
    free = free_bytes(folder)
    if free < needed:
        raise HipaError(
            f"{out} will have at least {_size(needed)}, and {_size(free)} are free on its disk. "
            "Free some space, or choose another disk."
        )


def check_writable(out: Path) -> None:
    """Check that a file or folder ``out`` can be made, with those around it that are missing.

    Raises:
        HipaError: something on the way to ``out`` is no folder, or may not be written.

    """
    check_name(out)
    parent = Path(os.path.realpath(out)).parent
    while not os.path.lexists(parent):
        parent = parent.parent
    if not parent.is_dir():
        raise HipaError(f"{out} cannot be written: {parent} is no folder. Choose another name.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise HipaError(
            f"{out} cannot be written: no permission to write in {parent}. Choose another folder."
        )


@contextmanager
def new_folder(out: Path, *, alone: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``out`` on success and is removed on any failure.

    Args:
        out: the folder.
        alone: whether another process that is making the same folder, in this way, is an error
            now. Otherwise the first that finishes has it, and the other ones fail at their end.

    Raises:
        HipaError: ``out`` exists and is not empty, or another process is making it.

    Example:
        >>> with new_folder(Path("bundle")) as scratch:
        ...     (scratch / "hipa.json").write_text("{}")

    """
    refuse_to_overwrite(out)
    out = Path(os.path.realpath(out))  # a link to an empty folder stays a link
    out.parent.mkdir(parents=True, exist_ok=True)
    # Beside ``out``, so that the two are on one disk and the last step is a rename.
    with ExitStack() as stack:
        if alone:
            lock = out.with_name(f".{out.name[:_NAME_CHARACTERS]}.lock")
            remedy = "Wait until it ends, or choose another name."
            stack.enter_context(locked(lock, str(out), remedy))
        holder = stack.enter_context(scratch_folder(out.parent, out.name))
        scratch = holder / out.name
        scratch.mkdir()
        try:
            yield scratch
        except Exception as error:
            if not is_disk_full(error):
                raise
            written = sum(path.stat().st_size for path in scratch.rglob("*") if path.is_file())
            raise HipaError(
                f"{out} cannot be written: the disk is full. {_size(written)} of it were written, "
                f"and {_size(free_bytes(scratch))} are free. Free some space, or choose another "
                "disk."
            ) from None
        raise_interruption()
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
    with scratch_folder(Path(tempfile.gettempdir()), name) as holder:
        folder = holder / name
        folder.mkdir()
        yield folder


def write_file(path: Path, content: bytes, *, replace: bool = True) -> None:
    """Write a file completely or not at all; its folder is made if necessary.

    What a link points to is written, not the link. A device or a pipe is written to directly. A
    new file may be read by whom the umask allows, and written by its owner. One that is replaced
    keeps its permissions.

    Args:
        path: the file.
        content: what it will hold.
        replace: whether a file that exists is replaced.

    Raises:
        FileExistsError: ``replace`` is False and the file exists.
        OSError: the file cannot be written.

    """
    if path.exists() and is_special(path):
        path.write_bytes(content)
        return
    path = Path(os.path.realpath(path))

    # A reader sees the old file or the new one, since a rename within a folder is atomic.
    path.parent.mkdir(parents=True, exist_ok=True)
    file, scratch = _scratch_file(path)
    problem = None
    try:
        with file:
            file.write(content)
            file.flush()
            if path.exists():
                scratch.chmod(stat.S_IMODE(path.stat().st_mode))
            raise_interruption()
            # Renamed while it is locked; Windows has no locks and renames no open file.
            if not HAS_LOCKS:
                file.close()
            if not replace:
                # An empty file with this name shows that nobody else had it.
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            scratch.replace(path)
    except OSError as error:
        problem = error
    finally:
        with uninterrupted():
            scratch.unlink(missing_ok=True)
    if problem is not None:
        # Now that the scratch is gone: what is free is what the file may take.
        raise describe_write_error(problem, path, len(content)) from None


def describe_write_error(error: OSError, path: Path, needed: int) -> OSError:
    """The error of writing ``path``, with its name, and of a full disk with how much is missing.

    Args:
        error: what the system said.
        path: the file.
        needed: its size in bytes.

    """
    reason = error.strerror or str(error)
    if is_disk_full(error):
        reason += f" ({_size(needed)} needed, {_size(free_bytes(path.parent))} free)"
    # OSError makes the class that fits the number, such as FileExistsError.
    return OSError(error.errno or errno.EIO, reason, str(path))


def is_disk_full(error: BaseException) -> bool:
    """Whether an error comes from a full disk or a used-up quota, whichever library raised it."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    text = str(error).lower()
    return "no space left on device" in text or "disk quota exceeded" in text


def free_bytes(folder: Path) -> int:
    """How much this user may still write on the disk of a folder."""
    return shutil.disk_usage(folder).free


def _size(count: int) -> str:
    """A number of bytes for a message.

    Example:
        >>> _size(2_500_000)
        '2.5 MB'

    """
    if count < 1_000_000:
        return f"{count / 1e3:.1f} kB"
    return f"{count / 1e6:.1f} MB" if count < 1_000_000_000 else f"{count / 1e9:.1f} GB"


def is_special(path: Path) -> bool:
    """Whether ``path`` is neither a file nor a folder: a device or a pipe, such as /dev/stdout."""
    mode = path.stat().st_mode
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


@contextmanager
def scratch_folder(parent: Path, name: str) -> Iterator[Path]:
    """Yield a new, locked folder in ``parent``; it is removed at the end of the block.

    What earlier processes left in ``parent`` is removed first.
    """
    sweep(parent)
    with ExitStack() as stack:
        while True:
            # A folder without a lock in it is never swept: an interruption must not leave one.
            with uninterrupted():
                holder = Path(tempfile.mkdtemp(prefix=_prefix(name), dir=parent))
                stack.callback(_remove, holder)
            try:
                file = (holder / _LOCK).open("w", encoding="utf-8")
            except FileNotFoundError:  # as below
                continue
            stack.enter_context(file)
            if _is_ours(file, holder / _LOCK):
                break
        yield holder


def _scratch_file(path: Path) -> tuple[IO[bytes], Path]:
    """Make and lock a new file beside ``path``."""
    # Once for each folder: it may hold many files, and get many more.
    if path.parent not in _swept:
        sweep(path.parent)
        _swept.add(path.parent)
    while True:
        scratch = path.with_name(f"{_prefix(path.name)}{secrets.token_hex(4)}{_FILE_SUFFIX}")
        try:
            # Not by mkstemp, whose files have permissions of their own, whatever the umask is.
            descriptor = os.open(scratch, _NEW_FILE, 0o644)
        except FileExistsError:
            continue
        file = os.fdopen(descriptor, "wb")
        if _is_ours(file, scratch):
            return file, scratch
        file.close()
        scratch.unlink(missing_ok=True)


def _is_ours(file: IO[Any], path: Path) -> bool:
    """Lock new scratch by its file, and say whether no other process took it for a leftover.

    Before it is locked, a sweep of another process may have removed it, or may have locked it and
    be about to remove it.
    """
    return is_locked_now(file) is not False and is_still_at(file, path)


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

"""Hashes that are remembered: a file that has not changed is read once, and not at every start.

A record is kept in the user's own cache. It holds, for each file, its SHA-256 and the marks that
the system gave the file when it was hashed: inode, size, and the times of the last change of its
content (mtime) and of its inode (ctime). A program can set a file's mtime, and can write
another content of the same size. It cannot set the ctime, which every write changes.

The guarantee ends where the system's does. Whoever may set the clock, write to the disk below its
file system, or write into this user's cache can bring in another content unseen. So can a process
that has the file mapped for writing, until the system writes the page to the disk, and so can a
network disk that keeps no ctime. Windows keeps none: there every file is hashed each time.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import time
import warnings
from pathlib import Path
from typing import Any

from hipa_deploy.disk.files import user_cache, write_file
from hipa_deploy.disk.hashing import file_sha256
from hipa_deploy.disk.reading import MIB, read_json
from hipa_deploy.errors import HipaError, HipaWarning

_FORMAT = 1
# A file that is written twice within one tick of the disk's clock has the same times both times.
# The coarsest clock of a common file system (FAT) ticks every two seconds.
_SETTLED_NS = 3_000_000_000

_has_ctime = os.name == "posix"


class RememberedHashes:
    """The hashes of the files of one folder, as they were at an earlier start.

    A record that is missing, damaged or somebody else's counts as empty. ``save`` writes what is
    new; where the cache cannot be written, one warning says so, and the next start hashes again.

    Args:
        folder: of a bundle or an adaptor.

    Example:
        >>> hashes = RememberedHashes(Path("my-bundle"))
        >>> hashes.sha256(Path("my-bundle/unet/model.onnx.data"))
        '5f1c…'
        >>> hashes.save()

    """

    def __init__(self, folder: Path) -> None:
        name = hashlib.sha256(os.path.realpath(folder).encode(errors="surrogateescape"))
        self._path = user_cache() / "hashes" / f"{name.hexdigest()[:32]}.json"
        self._known = _read(self._path) if _has_ctime else {}
        self._seen: dict[str, dict[str, Any]] = {}

    def sha256(self, path: Path, *, again: bool = False) -> str:
        """The SHA-256 of a file, hexadecimal: the remembered one if the file has not changed.

        Args:
            path: a file in the folder; a link counts as what it leads to.
            again: read the file, whatever is remembered.

        Raises:
            HipaError: it is missing, or no regular file.

        """
        name = os.path.realpath(path)
        before = file_marks(path)
        known = self._known.get(name)
        if known and not again and before is not None and known["marks"] == before:
            self._seen[name] = known
            return str(known["sha256"])

        started = time.time_ns()
        found = file_sha256(path)
        # Not remembered: what changed while it was read, or so shortly before that the next change
        # could have the same time.
        is_settled = before is not None and started - max(before[-2:]) > _SETTLED_NS
        if is_settled and file_marks(path) == before:
            self._seen[name] = {"marks": before, "sha256": found}
        return found

    def matches(self, path: Path, expected: str, *, again: bool = False) -> bool:
        """Whether a file has the SHA-256 that is expected; it is read before the answer is no."""
        if self.sha256(path, again=again) == expected:
            return True
        return self.sha256(path, again=True) == expected

    def save(self) -> None:
        """Keep what was hashed or found unchanged; files that were not asked for are forgotten."""
        if self._seen == self._known or not _has_ctime:
            return
        content = json.dumps({"format": _FORMAT, "files": self._seen}, indent=1)
        try:
            private_folder(self._path.parent)
            write_file(self._path, content.encode())
        except (OSError, HipaError) as error:
            warnings.warn(
                f"the hashes of unchanged files cannot be kept ({error}): every start reads all "
                "files. Set HIPA_CACHE to a folder that can be written.",
                HipaWarning,
                stacklevel=2,
            )


class VerifiedFiles:
    """Files whose hashes were checked: one that is opened again later is still what it was.

    A file is read again only if the system's marks of it are others than then.

    Example:
        >>> verified = VerifiedFiles()
        >>> marks = file_marks(path)  # before it is hashed
        >>> verified.note(path, marks)
        >>> verified.check(path, sha256, "the bundle")

    """

    def __init__(self) -> None:
        self._marks: dict[Path, list[int] | None] = {}

    def note(self, path: Path, marks: list[int] | None) -> None:
        """Note the marks that a file had before it was hashed."""
        self._marks[path] = marks

    def check(self, path: Path, expected: str, owner: str) -> None:
        """Check a file that was noted; one that was not may be anything.

        Args:
            path: of the file.
            expected: its SHA-256.
            owner: what the file is of, for the message.

        Raises:
            HipaError: it is missing, or has another content.

        """
        if path not in self._marks:
            return
        marks = file_marks(path)
        if marks is not None and marks == self._marks[path]:
            return
        if file_sha256(path) != expected:
            raise HipaError(f"{path} has changed since {owner} was loaded. Load {owner} again.")
        self._marks[path] = marks


def file_marks(path: Path) -> list[int] | None:
    """Inode, size, mtime and ctime (both in ns) of a file; None where it cannot be seen.

    The device's number is not among them: for some disks it is another after every start.
    """
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return [status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def private_folder(folder: Path) -> None:
    """Make a folder of the cache that this user alone can write, and check one that is there.

    Raises:
        HipaError: it is somebody else's, or others may write into it.
        OSError: it cannot be made.

    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    problem = foreign(folder)
    if problem:
        raise HipaError(f"{folder} {problem}. Remove it, or set HIPA_CACHE to another folder.")


def foreign(path: Path) -> str | None:
    """Why a file or folder of the cache cannot be trusted as this user's own; None if it can.

    A link is judged by itself, not by what it leads to: the cache makes none.
    """
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode):
        return "is a link"
    if not hasattr(os, "geteuid"):  # Windows: the user's profile is private by default
        return None
    if status.st_uid != os.geteuid():
        return "belongs to another user"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return "can be written by other users"
    return None


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """The entries of a record that are whole; none of one that is not this user's."""
    try:
        if foreign(path.parent) or foreign(path):
            return {}
        record = read_json(path, max_bytes=4 * MIB)
    except (OSError, HipaError):
        return {}
    if not isinstance(record, dict) or record.get("format") != _FORMAT:
        return {}
    files = record.get("files")
    entries = {}
    for name, entry in files.items() if isinstance(files, dict) else ():
        if _is_entry(entry):
            entries[name] = entry
    return entries


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("sha256"), str):
        return False
    marks = entry.get("marks")
    return isinstance(marks, list) and len(marks) == 4 and all(type(mark) is int for mark in marks)

"""Compiled stages, kept in this user's cache: the next start maps one and compiles nothing.

An entry is a folder that one library wrote, ONNX Runtime or OpenVINO, for one stage of one bundle.
It is taken only if everything that decides its content is equal: the hashes of the stage's files,
the library's version, its options, and the processor. It is written whole or not at all. An entry
that does not fit, or is damaged, is made again. No image ever depends on an entry being there.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from hipa_deploy.bundle.adaptor_swap import stage_files
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.disk.files import free_bytes, scratch_folder, user_cache, write_file
from hipa_deploy.disk.reading import MIB, read_json
from hipa_deploy.disk.remembered import file_marks, foreign, private_folder
from hipa_deploy.engines.device.machine import cpu_features, cpu_name, read_text
from hipa_deploy.errors import HipaError, HipaWarning, first_line

_FORMAT = 1
_ENTRY = "entry.json"
# A stage of fewer bytes compiles about as fast as its entry is looked up and mapped.
SMALLEST = MIB
# All entries together; the least recently used ones go first.
LARGEST_CACHE = 24 << 30
# What an entry takes, at most, in bytes for each byte of its stage: float32 in place of float16
# doubles it, and ONNX Runtime keeps the weights of matrix products in a second order too.
_GROWTH = 4
# Variables with which a user limits the instruction sets that the libraries use.
_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "OV_CPU_MAX_ISA")

# By then the system has written most of an entry to the disk by itself, and waiting is short.
_SYNC_AFTER = 60  # seconds

_warned: set[str] = set()


class CompiledStage:
    """The place of one stage in the cache.

    Args:
        folder: of the entry; it need not exist.
        identity: all that decides the entry's content.
        source_bytes: size of the files that it is made from.
        again: make it again, even if it is there.

    Example:
        >>> if compiled.found() or compiled.write(make):
        ...     session = load(compiled.folder / "model.onnx")

    """

    def __init__(
        self, folder: Path, identity: Mapping[str, Any], source_bytes: int, again: bool = False
    ) -> None:
        self.folder = folder
        self._identity = dict(identity)
        self._source_bytes = source_bytes
        self._again = again
        self._not_kept: str | None = None

    def found(self) -> bool:
        """Whether the entry is whole, unchanged, this user's own, and of the same identity."""
        if self._again:
            return False
        try:
            entry = self._read()
            return entry is not None and self._is_whole(entry)
        except (HipaError, OSError):
            return False

    def _read(self) -> dict[str, Any] | None:
        for path in (self.folder.parent, self.folder, self.folder / _ENTRY):
            if foreign(path):
                return None
        entry = read_json(self.folder / _ENTRY, max_bytes=MIB)
        is_same = isinstance(entry, dict) and entry.get("identity") == self._identity
        if not is_same or not isinstance(entry.get("files"), dict):
            return None
        return entry if isinstance(entry.get("written", 0), int | float) else None

    def _is_whole(self, entry: dict[str, Any]) -> bool:
        """Compare every file's marks, and keep the entry from being removed as the oldest."""
        files = {self.folder / name: marks for name, marks in entry["files"].items()}
        if not files or any(foreign(path) or file_marks(path) != files[path] for path in files):
            return False
        if not entry.get("synced"):
            # A crash of the system loses what was not on the disk, and may leave zeros there.
            if entry.get("boot") != _boot():
                return False
            if time.time() - float(entry.get("written", 0)) > _SYNC_AFTER:
                with suppress(OSError):
                    _sync(files)
                    self._write_entry(self.folder, synced=True)
        with suppress(OSError):  # a cache that can be read and not written serves all the same
            os.utime(self.folder / _ENTRY)
        return True

    def write(self, make: Callable[[Path], None]) -> bool:
        """Call ``make`` with a new folder, and keep what it writes there.

        Where the cache cannot be written, the disk has too little space or ``make`` fails, nothing
        is kept, and ``warn_if_not_kept`` says why.

        Returns:
            Whether the entry is there now.

        """
        self._not_kept = self._problem()
        if self._not_kept is None:
            try:
                with scratch_folder(self.folder.parent, "compiled") as holder:
                    scratch = holder / "entry"
                    scratch.mkdir(mode=0o700)
                    make(scratch)
                    self._keep(scratch)
            except Exception as error:  # of a library, whose errors share no base class
                self._not_kept = first_line(error).rstrip(".")
        return self._not_kept is None

    def warn_if_not_kept(self) -> None:
        """Say once in a process that nothing is kept: this costs time at the next start."""
        if self._not_kept is None or self._not_kept in _warned:
            return
        _warned.add(self._not_kept)
        warnings.warn(
            f"compiled stages cannot be kept ({self._not_kept}): every start compiles them again. "
            "Set HIPA_CACHE to a folder that can be written.",
            HipaWarning,
            stacklevel=2,
        )

    def _problem(self) -> str | None:
        """Why nothing can be written."""
        parent = self.folder.parent
        try:
            private_folder(parent)
        except (OSError, HipaError) as error:
            return first_line(error).rstrip(".")
        if not os.access(parent, os.W_OK | os.X_OK):
            return f"no permission to write in {parent}"
        needed = _GROWTH * self._source_bytes
        if free_bytes(parent) < 2 * needed:
            return f"the disk of {parent} has less than {2 * needed / 1e9:.1f} GB free"
        return None

    def _keep(self, scratch: Path) -> None:
        """Describe what was written, and give it its name."""
        is_synced = _boot() is None
        if is_synced:
            _sync(list(scratch.iterdir()))
        for path in scratch.iterdir():
            path.chmod(0o600)
        self._write_entry(scratch, synced=is_synced)
        self.discard()
        try:
            scratch.rename(self.folder)
        except OSError:
            # Another process was faster, and left the same.
            self._again = False
            if not self.found():
                raise
        _remove_oldest(self.folder)

    def _write_entry(self, folder: Path, *, synced: bool) -> None:
        files = {}
        for path in sorted(folder.iterdir()):
            if path.name != _ENTRY:
                files[path.name] = file_marks(path)
        entry = {
            "identity": self._identity,
            "files": files,
            "boot": _boot(),
            "written": time.time(),
            "synced": synced,
        }
        write_file(folder / _ENTRY, json.dumps(entry, indent=1).encode())

    def discard(self) -> None:
        """Remove the entry, if it is there."""
        shutil.rmtree(self.folder, ignore_errors=True)


def compiled_stage(
    bundle: Bundle,
    stage: str,
    backend: str,
    options: Callable[[], Mapping[str, Any]],
    *,
    again: bool = False,
) -> CompiledStage | None:
    """Where the compiled form of a bundle's stage is kept; None for one that is not worth it.

    Args:
        bundle: of the stage; its hashes have been checked.
        stage: its name.
        backend: what compiles it.
        options: gives the library's version, and whatever else decides what it makes of the stage.
        again: make it again, even if it is there.

    """
    files = stage_files(bundle, stage)
    size = sum(bundle.path(name).stat().st_size for name in files)
    features = cpu_features()
    # Without the processor's instruction sets an entry could meet another processor.
    if size < SMALLEST or features is None:
        return None
    identity = {
        "format": _FORMAT,
        "backend": backend,
        "options": dict(options()),
        "graph": bundle.all_stages[stage].path,
        "files": files,
        "processor": [platform.machine(), cpu_name(), features],
        "limits": {name: os.environ.get(name) for name in _LIMITS},
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    folder = user_cache() / "compiled" / f"{backend}-{stage}-{key[:32]}"
    return CompiledStage(folder, identity, size, again)


def _boot() -> str | None:
    """What changes whenever the system starts; None where it has no such number."""
    return read_text("/proc/sys/kernel/random/boot_id")


def _sync(paths: Iterable[Path]) -> None:
    """Wait until the files are on the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove_oldest(kept: Path) -> None:
    """Remove the least recently used entries while all of them take more than is allowed."""
    entries = []
    for folder in kept.parent.iterdir():
        with suppress(OSError):
            used = (folder / _ENTRY).stat().st_mtime
            size = sum(path.stat().st_size for path in folder.iterdir())
            entries.append((used, size, folder))
    total = sum(size for _, size, _ in entries)
    for _, size, folder in sorted(entries):
        if total <= LARGEST_CACHE:
            return
        if folder != kept:
            shutil.rmtree(folder, ignore_errors=True)
            total -= size

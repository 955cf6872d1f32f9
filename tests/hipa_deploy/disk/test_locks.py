"""Locks between processes, of which the other one is a real process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hipa_deploy.disk.locks import locked
from hipa_deploy.errors import HipaError

HOLDS = """
import sys, time
from pathlib import Path
from hipa_deploy.disk.locks import locked
with locked(Path(sys.argv[1]), "it"):
    print("held", flush=True)
    time.sleep(120)
"""


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    return tmp_path / ".lock"


@pytest.fixture
def holder(lock: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock."""
    command = [sys.executable, "-c", HOLDS, str(lock)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def take(lock: Path) -> None:
    with locked(lock, "run folder x", "Choose another --out."):
        assert lock.exists()


def test_another_process_is_named(lock: Path, holder: subprocess.Popen[str]) -> None:
    message = rf"^run folder x: process {holder.pid} \(.*\) on .* Choose another --out\.$"
    with pytest.raises(HipaError, match=message):
        take(lock)
    assert lock.exists()


def test_a_killed_process_holds_nothing(lock: Path, holder: subprocess.Popen[str]) -> None:
    holder.kill()
    holder.wait()
    assert lock.exists()  # left, and used again
    take(lock)
    assert not lock.exists()


def test_the_lock_file_goes_however_the_block_ends(lock: Path) -> None:
    def interrupted() -> None:
        with locked(lock, "it"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not lock.exists()
    take(lock)


def test_a_disk_without_locks_locks_nothing(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("hipa_deploy.disk.locks.fcntl.flock", unsupported)
    take(lock)
    assert not lock.exists()

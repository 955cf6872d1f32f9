"""``hipa-bulk`` on a local Ray cluster whose actors are killed. Runs where Ray is installed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from hipa_deploy.bulk.bulk_job import shard_path
from hipa_deploy.bulk.tries import MOST

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
pytest.importorskip("ray")
pytestmark = pytest.mark.slow

ROWS = 120
SHARD = 20
SHARDS = ROWS // SHARD
PATIENCE = 240.0  # seconds: a cluster starts slowly on a busy machine
RAY = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("table") / "p.parquet"
    captions = [f"3d emoji of a red apple {number}" for number in range(ROWS)]
    parquet.write_table(pyarrow.table({"caption": captions}), path)
    return path


@contextmanager
def bulk(prompts: Path, out: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """A ``hipa-bulk`` in a process of its own."""
    command = [sys.executable, "-m", "hipa_deploy", "bulk", "emoji", str(prompts)]
    command += ["--out", str(out), *options]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **RAY},
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def finished(prompts: Path, out: Path, *options: str) -> str:
    """The standard output of a ``hipa-bulk`` that succeeds."""
    with bulk(prompts, out, *options) as process:
        printed, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    return printed


def maker_of(
    out: Path,
    shard: int | None,
    process: subprocess.Popen[str],
    killed: Sequence[int] = (),
) -> tuple[int, int]:
    """The process that is writing a shard, stopped midway, and the shard's number.

    Args:
        out: the folder of the shards.
        shard: its number; None takes any.
        process: the command, which must live until then.
        killed: processes before it, which may have the file open for a while.

    """
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        for part in out.glob(".shard-*.tar.part"):
            number = int(part.name[7:13])
            pid = _writer(part) if shard in (None, number) else None
            if pid is None or pid in killed:
                continue
            os.kill(pid, signal.SIGSTOP)
            if part.exists():
                return pid, number
            os.kill(pid, signal.SIGCONT)
        time.sleep(0.02)
    raise AssertionError("no shard was begun")


def _writer(path: Path) -> int | None:
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            open_files = [link.readlink() for link in (folder / "fd").iterdir()]
        except OSError:
            continue
        if path in open_files:
            return int(folder.name)
    return None


def hidden(out: Path) -> list[str]:
    return [path.name for path in out.iterdir() if path.name.startswith(".")]


def test_a_killed_actor_changes_no_byte(prompts: Path, tmp_path: Path) -> None:
    size = ("--shard-size", str(SHARD), "--seed", "40")
    finished(prompts, tmp_path / "alone", *size)
    out = tmp_path / "ray"
    cluster = ("--ray", "local", "--replicas", "2", "--replica-cpus", "0.5")
    with bulk(prompts, out, *size, *cluster) as process:
        pid, killed = maker_of(out, None, process)
        assert not shard_path(out, killed).exists()
        os.kill(pid, signal.SIGKILL)
        printed, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors

    for shard in range(SHARDS):
        expected = shard_path(tmp_path / "alone", shard).read_bytes()
        assert shard_path(out, shard).read_bytes() == expected
    assert hidden(out) == []

    # Nothing of Ray's stands between the lines, and no step of Ray Data is told.
    first, *reports, last = printed.splitlines()
    assert first == f"{SHARDS} shards, {SHARDS} to make"
    assert sorted(reports) == [f"shard {n}: {SHARD} images, 0 failures" for n in range(SHARDS)]
    assert last == str(out)
    assert "raylet" not in errors
    assert re.findall(r"INFO|WARNING|deprecated|Traceback", errors) == []

    stamps = [shard_path(out, shard).stat().st_mtime_ns for shard in range(SHARDS)]
    again = finished(prompts, out, *size, *cluster)
    assert again.splitlines() == [f"{SHARDS} shards, 0 to make", str(out)]
    assert [shard_path(out, shard).stat().st_mtime_ns for shard in range(SHARDS)] == stamps


def test_a_shard_that_kills_its_process_each_time_is_named(prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--shard-size", str(ROWS // 2), "--ray", "local")
    with bulk(prompts, out, *options) as process:
        killed: list[int] = []
        for _ in range(MOST):
            pid, _ = maker_of(out, 1, process, killed)
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)
        _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    (line,) = [line for line in errors.splitlines() if line.startswith("hipa: ")]
    assert f"shard 1 has killed the process that made it {MOST} times" in line
    assert "Traceback" not in errors
    assert not shard_path(out, 1).exists()
    assert not (out / ".tries").exists()  # another run begins to count anew

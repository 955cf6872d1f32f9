"""The process of the build worker: real TensorRT-RTX builds of a tiny graph, and their ends."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from hipa_deploy.engines.build import worker as build_worker
from hipa_deploy.engines.build import worker_process as build_process
from hipa_deploy.engines.build.worker import Job
from hipa_deploy.engines.build.worker_process import (
    count_skipped_tactics,
    explain_failure,
    run_worker,
)
from hipa_deploy.engines.targets.build_options import BuildOptions
from hipa_deploy.errors import HipaError

pytest.importorskip("tensorrt_rtx")


# What TensorRT 10 prints where memory is short and nothing is wrong.
SKIPPED = """\
[E] Tactic Device request: 2304MB Available: 1536MB. Device memory is insufficient to use tactic.
[W] UNSUPPORTED_STATE: Skipping tactic 3 due to insufficient memory on requested size of 2304 \
detected for tactic 0x3.
[E] Some tactics do not have sufficient memory to run. Increasing workspace will enable \
more tactics.
"""


@pytest.fixture
def job(make_bundle, tmp_path) -> Job:
    """A build of one convolution."""
    bundle = make_bundle(stages=("unet",))
    return Job(
        library="rtx",
        onnx=bundle.stage_path("unet"),
        spec=bundle.stages["unet"].spec,
        out=tmp_path / "out",
        precision="fp16",
        compute_capabilities=(89,),
        options=BuildOptions(),
        timing_cache=None,
    )


def test_progress_rises_to_one(job):
    events = []
    outcome = run_worker(job, events.append)
    fractions = [event.fraction for event in events]
    assert fractions == sorted(fractions)
    assert len(set(fractions)) > 5
    assert fractions[-1] == 1.0
    assert outcome.seconds > 0
    assert outcome.skipped_tactics == 0
    assert [event.layers for event in events if event.layers] == [4]


def test_an_engine_is_not_lost_where_its_timings_cannot_be_kept(job, tmp_path):
    """TensorRT-RTX times nothing, and its builder takes a timing cache all the same."""
    (tmp_path / "file").write_text("where the folder goes")
    path = tmp_path / "file" / "timing.cache"
    outcome = run_worker(job.model_copy(update={"timing_cache": path}), lambda event: None)
    assert job.out.stat().st_size > 10_000
    assert outcome.timing_cache_problem == f"{path}: File exists"
    kept = run_worker(job.model_copy(update={"timing_cache": tmp_path / "t"}), lambda event: None)
    assert kept.timing_cache_problem is None


def test_a_full_disk_says_how_much_is_missing(tmp_path, monkeypatch):
    def write(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write)
    engine = SimpleNamespace(nbytes=26_500_000)
    message = r"cannot be written into .*: No space left on device \(26\.5 MB needed, .* free\)"
    with pytest.raises(HipaError, match=message):
        build_worker._write_engine(tmp_path / "engine", engine)


def test_a_worker_whose_parent_is_gone_stops(job):
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    env = build_worker.environment("rtx")
    with subprocess.Popen(build_process.WORKER, env=env, text=True, **pipes) as worker:
        # A parent that has died reads no events.
        worker.stdout.close()
        worker.stdin.write(job.model_dump_json())
        worker.stdin.close()
        assert worker.wait(timeout=30) != 0
    assert not job.out.exists()


def test_a_killed_worker_is_explained(job, monkeypatch):
    kill_itself = (sys.executable, "-c", "import os; os.kill(os.getpid(), 9)")
    monkeypatch.setattr(build_process, "WORKER", kill_itself)
    with pytest.raises(HipaError, match="the build was killed by SIGKILL"):
        run_worker(job, lambda event: None)


@pytest.mark.parametrize(
    ("status", "log", "expected"),
    [
        (-9, "", "the build was killed by SIGKILL (out of memory?)."),
        (-11, "[E] x", "the build was killed by SIGSEGV."),
        (1, "[W] w\n[E] first\n[E] In node 3: Det\nTraceback\nX: y", "In node 3: Det"),
        (1, f"[E] it broke\n{SKIPPED}", "it broke"),
        (1, f"{SKIPPED}\nValueError: y\n", "ValueError: y"),
        (1, "Traceback\nValueError: y\n", "ValueError: y"),
        (1, "", "the build ended with status 1."),
    ],
)
def test_failures_are_one_line(status, log, expected):
    assert explain_failure(status, log) == expected


def test_tactics_that_did_not_fit_are_counted():
    assert count_skipped_tactics(SKIPPED) == 2
    assert count_skipped_tactics("[E] it broke") == 0

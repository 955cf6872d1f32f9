"""A local Ray cluster of two replicas behind ``hipa-serve --ray``. Runs where Ray is installed."""

from __future__ import annotations

import json
import os
import signal
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hipa_deploy.generate.pipeline import OneStepPipeline
from hipa_deploy.marks.marker import encode_marked
from tests.served import Server, running

pytest.importorskip("ray")
pytestmark = pytest.mark.slow

PROMPT = "3d emoji of a red apple"
REQUESTS = 50


def image(server: Server, seed: int) -> bytes:
    request = urllib.request.Request(
        server.url + "/hipa/generate",
        json.dumps({"prompt": PROMPT, "seed": seed}).encode(),
        {"content-type": "application/json", "accept": "image/png"},
    )
    with urllib.request.urlopen(request, timeout=240) as answer:
        return answer.read()


def replica_processes(server: Server) -> list[int]:
    """The replicas of this server's own cluster: Ray names their processes."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and _is_replica(folder):
            ancestors = _ancestors(int(folder.name))
            if server.process.pid in ancestors:
                found.append(int(folder.name))
    return found


def _is_replica(folder: Path) -> bool:
    try:
        return b"ServeReplica:hipa-emoji" in (folder / "cmdline").read_bytes()
    except OSError:
        return False


def _ancestors(pid: int) -> list[int]:
    chain = []
    while pid > 1:
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        chain.append(pid)
    return chain


def test_a_killed_replica_loses_no_accepted_request() -> None:
    arguments = ("emoji", "--backend", "onnxruntime", "--ray", "local", "--replicas", "2")
    with OneStepPipeline.load("emoji", "onnxruntime") as pipe:
        expected = []
        for seed in range(REQUESTS):
            result = pipe.generate([(PROMPT, seed)])
            marks = pipe.bundle.manifest.marks
            expected.append(
                encode_marked(
                    result.images_BHWC[0], result.parameters[0], "png", marks=marks, signer=None
                )
            )
    with running(*arguments, RAY_USAGE_STATS_ENABLED="0", RAY_worker_niceness="0") as server:
        assert image(server, 0) == expected[0]
        replicas = replica_processes(server)
        assert len(replicas) == 2
        with ThreadPoolExecutor(REQUESTS) as threads:
            answers = [threads.submit(image, server, seed) for seed in range(REQUESTS)]
            answers[0].result()
            os.kill(replicas[0], signal.SIGKILL)
            assert [answer.result() for answer in answers] == expected
        assert [line for line in server.lines if line["event"] == "bug"] == []

"""A local Ray cluster of two replicas behind ``hipa-serve --ray``. Runs where Ray is installed."""

from __future__ import annotations

import inspect
import io
import json
import os
import signal
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from PIL import Image

from hipa_deploy.disk.reading import MIB
from hipa_deploy.errors import HipaError
from hipa_deploy.generate.pipeline import OneStepPipeline
from hipa_deploy.marks.marker import encode_marked
from hipa_deploy.serve.process.command import serve
from tests.refine_samples import refine_bundle
from tests.served import Server, running, tiny_bundles

pytest.importorskip("ray")
pytestmark = pytest.mark.slow

PROMPT = "3d emoji of a red apple"
REQUESTS = 50
RAY = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}


def image(server: Server, seed: int) -> bytes:
    request = urllib.request.Request(
        server.url + "/hipa/generate",
        json.dumps({"prompt": PROMPT, "seed": seed}).encode(),
        {"content-type": "application/json", "accept": "image/png"},
    )
    with urllib.request.urlopen(request, timeout=240) as answer:
        return answer.read()


def encoded_size(width: int, height: int) -> bytes:
    """A PNG of one colour."""
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "PNG")
    return file.getvalue()


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
    with running(*arguments, **RAY) as server:
        assert server.wait_for("ready", bundle="emoji")["backend"] == "onnxruntime"
        assert image(server, 0) == expected[0]
        replicas = replica_processes(server)
        assert len(replicas) == 2
        with ThreadPoolExecutor(REQUESTS) as threads:
            answers = [threads.submit(image, server, seed) for seed in range(REQUESTS)]
            answers[0].result()
            os.kill(replicas[0], signal.SIGKILL)
            assert [answer.result() for answer in answers] == expected
        assert [line for line in server.lines if line["event"] == "bug"] == []


def test_limits_and_signals_are_those_of_the_single_machine(tmp_path: Path) -> None:
    """A refining that nobody waits for stops in its replica too."""
    roots = [str(refine_bundle(tmp_path).root), str(tiny_bundles(tmp_path)["tiny-edit"].root)]
    limits = ("--steps-limit", "900", "--body-limit", "1", "--pixel-limit", "1")
    options = ("--backend", "onnxruntime", "--ray", "local", "--replica-cpus", "0.1")
    with (
        running(*roots, *options, *limits, "--time-limit", "2", **RAY) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):

        def refused(steps: int) -> tuple[int, str]:
            order = {"model": "tiny-refine", "prompt": PROMPT, "steps": steps, "count": 3}
            answer = client.post("/hipa/refine", json=order)
            return answer.status_code, answer.text

        def edited(image: bytes) -> tuple[int, str]:
            form = {"model": "tiny-edit", "prompt": PROMPT}
            answer = client.post("/hipa/edit", data=form, files={"image": image})
            return answer.status_code, answer.text

        assert refused(901)[0] == 400
        assert "at most 900" in refused(901)[1]
        assert edited(bytes(1 << 21))[0] == 413
        status, words = edited(encoded_size(1001, 1000))
        assert status == 400
        assert "at most 1000000" in words
        while refused(2)[0] != 200:  # the base model is loaded
            pass
        assert refused(900)[0] == 504
        began = time.monotonic()
        assert refused(2)[0] == 200
        assert time.monotonic() - began < 1
        assert server.stop() == 143
        assert "hipa: stopped\n" in server.other


def test_replicas_have_the_checker_of_the_service(tmp_path: Path) -> None:
    source = "def second(images):\n    return [n == 1 for n in range(len(images))]\n"
    (tmp_path / "checker_on_ray.py").write_text(source, encoding="utf-8")
    checker = ("--checker", "checker_on_ray:second", "--allow-code")
    options = ("--backend", "onnxruntime", "--ray", "local", "--replica-cpus", "0.1")
    environment = {**RAY, "PYTHONPATH": _path_with(tmp_path)}
    with running("emoji", *options, *checker, **environment) as server:
        order = {"model": "emoji", "prompt": PROMPT, "n": 3, "seed": 5}
        answer = httpx.post(f"{server.url}/v1/images/generations", json=order, timeout=60).json()
    assert [made["seed"] for made in answer["data"]] == [5, 7]
    assert answer["withheld"] == [{"seed": 6, "reason": "the checker that was given"}]


def _path_with(folder: Path) -> str:
    """Python's path for a process, with one more folder."""
    return os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])


def test_an_application_has_a_checker_only_where_code_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hipa_deploy.serve.cluster.application import application

    (tmp_path / "checker_of_app.py").write_text("def f(images):\n    return []\n", "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    arguments = {"bundles": "emoji", "checker": "checker_of_app:f"}
    with pytest.raises(HipaError, match="--allow-code"):
        application(arguments)
    application({**arguments, "allow_code": "true"})
    with pytest.raises(HipaError, match="cannot be imported"):
        application({**arguments, "checker": "checker_of_app:g", "allow_code": "true"})


def test_the_application_takes_every_limit_of_the_command() -> None:
    from hipa_deploy.serve.cluster.application import Arguments

    numbers = {"prompt_limit": 5, "body_limit": 2, "pixel_limit": 3, "steps_limit": 4}
    limits = Arguments.model_validate({"bundles": "emoji", **numbers}).limits()
    assert (limits.prompt, limits.body, limits.pixels) == (5, 2 << 20, 3_000_000)
    assert limits.steps == 4
    usual = Arguments.model_validate({"bundles": "emoji"}).limits()
    given = inspect.signature(serve).parameters
    assert usual.prompt == given["prompt_limit"].default
    assert usual.body == given["body_limit"].default * MIB
    assert usual.pixels == given["pixel_limit"].default * 1_000_000
    assert usual.steps == given["steps_limit"].default

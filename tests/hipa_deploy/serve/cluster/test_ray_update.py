"""A Ray Serve application that changes under load: updates, more replicas. Needs Ray."""

from __future__ import annotations

import json
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from hipa_deploy.bundle.folder import MANIFEST
from hipa_deploy.embedded import resolve_bundle
from hipa_deploy.generate.pipeline import OneStepPipeline
from hipa_deploy.marks.marker import encode_marked

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow

PROMPT = "3d emoji of a red apple"
SEEDS = 8
CLIENTS = 4


def two_versions(folder: Path) -> dict[str, Path]:
    """The included bundle, and another version, whose files do not say that a model made them."""
    versions = {}
    for name in ("v1", "v2"):
        versions[name] = folder / name
        shutil.copytree(resolve_bundle("emoji"), versions[name])
    path = versions["v2"] / MANIFEST
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "marks": {"provenance": False}}))
    return versions


def files_of(root: Path) -> list[bytes]:
    """What a bundle makes of every seed on a single machine."""
    files = []
    with OneStepPipeline.load(root, "onnxruntime") as pipe:
        for seed in range(SEEDS):
            made = pipe.generate([(PROMPT, seed)])
            marks = pipe.bundle.manifest.marks
            image = made.images_BHWC[0]
            files.append(encode_marked(image, made.parameters[0], "png", marks=marks, signer=None))
    return files


class Crowd:
    """Clients that ask without a pause.

    Attributes:
        answers: seed, status and content of every answer, in the order of their arrival.
        errors: connections that broke.

    """

    def __init__(self, url: str) -> None:
        self._url = url
        self.answers: list[tuple[int, int, bytes]] = []
        self.errors: list[Exception] = []
        self._stopping = False
        self._threads = [threading.Thread(target=self._ask, args=(i,)) for i in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def _ask(self, first: int) -> None:
        seed = first
        with httpx.Client(timeout=120, headers={"accept": "image/png"}) as http:
            while not self._stopping:
                order = {"prompt": PROMPT, "model": "m", "seed": seed % SEEDS}
                try:
                    answer = http.post(f"{self._url}/hipa/generate", json=order)
                except httpx.HTTPError as error:
                    self.errors.append(error)
                    continue
                self.answers.append((seed % SEEDS, answer.status_code, answer.content))
                seed += 1

    def stop(self) -> None:
        self._stopping = True
        for thread in self._threads:
            thread.join()


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A cluster with Ray's HTTP proxy; the port."""
    from ray import serve

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_worker_niceness", "0")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray.init(address="local", num_cpus=8, log_to_driver=False, configure_logging=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield port
    serve.shutdown()
    ray.shutdown()


def deploy(arguments: dict[str, Any]) -> None:
    """Deploy the application, and wait until Ray has changed everything over."""
    from ray import serve

    from hipa_deploy.serve.cluster.application import application

    serve.run(application(arguments), name="hipa", route_prefix="/")
    wait_for_replicas(1)


def wait_for_replicas(count: int) -> None:
    """Until the bundle has so many replicas or more, and no replica starts or stops."""
    from ray import serve

    deadline = time.monotonic() + 240
    while True:
        deployments = serve.status().applications["hipa"].deployments
        states = {one.status for one in deployments.values()}
        counts = [one.replica_states for one in deployments.values()]
        settled = states == {"HEALTHY"} and all(set(one) == {"RUNNING"} for one in counts)
        if settled and deployments["hipa-m"].replica_states["RUNNING"] >= count:
            return
        assert time.monotonic() < deadline, deployments
        time.sleep(0.2)


def test_an_update_loses_no_request(cluster: int, tmp_path: Path) -> None:
    """Two replicas and two doors are replaced while four clients ask on."""
    versions = two_versions(tmp_path)
    expected = {name: files_of(root) for name, root in versions.items()}
    assert expected["v1"] != expected["v2"]
    options = {"replicas": 2, "doors": 2, "backend": "onnxruntime"}
    deploy({"bundles": [f"m={versions['v1']}"], **options})
    crowd = Crowd(f"http://127.0.0.1:{cluster}")
    try:
        while len(crowd.answers) < 20 and not crowd.errors:
            time.sleep(0.1)
        before = len(crowd.answers)
        deploy({"bundles": [f"m={versions['v2']}"], **options})
        after = len(crowd.answers)
        while len(crowd.answers) < after + 20 and not crowd.errors:
            time.sleep(0.1)
    finally:
        crowd.stop()
    assert crowd.errors == []
    assert {status for _, status, _ in crowd.answers} == {200}
    made_by = []
    for seed, _, content in crowd.answers:
        (version,) = [name for name, files in expected.items() if files[seed] == content]
        made_by.append(version)
    assert set(made_by[:before]) == {"v1"}
    assert set(made_by[after + CLIENTS :]) == {"v2"}, "the change is complete"
    print(f"{before} answers before, {after - before} during, {len(made_by) - after} after")


def test_a_second_replica_comes_under_load(cluster: int, tmp_path: Path) -> None:
    """``replicas=1:2``: it starts while clients ask, and makes the same images."""
    root = two_versions(tmp_path)["v1"]
    expected = files_of(root)
    deploy({"bundles": [f"m={root}"], "replicas": "1:2", "scale_at": 1})
    crowd = Crowd(f"http://127.0.0.1:{cluster}")
    try:
        wait_for_replicas(2)
        after = len(crowd.answers)
        while len(crowd.answers) < after + 20 and not crowd.errors:
            time.sleep(0.1)
    finally:
        crowd.stop()
    assert crowd.errors == []
    for seed, status, content in crowd.answers:
        assert (status, content) == (200, expected[seed])
    print(f"{after} answers until there were two replicas, {len(crowd.answers) - after} after")

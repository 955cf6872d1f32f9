"""The process: readiness, signals, time limits, floods, keys, metrics."""

from __future__ import annotations

import gc
import json
import re
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from hipa_deploy.commands.app import main
from hipa_deploy.errors import HipaError
from hipa_deploy.serve.process import server as server_module
from hipa_deploy.serve.settings import KEEP_SECONDS
from hipa_deploy.serve.web.api_keys import read_keys
from tests.served import Server, running

KEY = "0123456789abcdef"
ORDER = {"prompt": "a green pear", "model": "tiny", "seed": 1}


def generate(server: Server, **fields: object) -> httpx.Response:
    return httpx.post(f"{server.url}/hipa/generate", json={**ORDER, **fields}, timeout=60)


def test_what_a_request_takes_for_a_moment_starts_no_collection() -> None:
    """Python's 700 objects were a collection at every fifth request."""
    usual = gc.get_threshold()
    generations = []

    def collected(phase: str, details: dict[str, int]) -> None:
        generations.append(details["generation"])

    try:
        server_module._collect_less()
        gc.callbacks.append(collected)
        for _ in range(10):
            _ = [[] for _ in range(5_000)]
            del _
        assert generations == []
        _ = [[] for _ in range(20_000)]
        assert 0 in generations
    finally:
        gc.callbacks.remove(collected)
        gc.set_threshold(*usual)


def queued_images(server: Server) -> float:
    """How many images wait for the bundle 'tiny'."""
    text = httpx.get(f"{server.url}/metrics").text
    found = re.search(r'^hipa_queue_images\{bundle="tiny"\} (.+)$', text, re.MULTILINE)
    return float(found[1]) if found else 0.0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_lets_accepted_requests_end(bundles, number: int, code: int) -> None:
    """Eight hundred images take a while; the signal comes when both requests are in the queue."""
    root = str(bundles["tiny"].root)
    with (
        running(root, "--backend", "onnxruntime", "--queue", "800", "--images", "400") as server,
        ThreadPoolExecutor(2) as pool,
    ):
        answers = [pool.submit(generate, server, seed=seed, count=400) for seed in (0, 1000)]
        deadline = time.monotonic() + 60
        while queued_images(server) <= 400:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert server.stop(number) == code
        for answer in answers:
            assert answer.result().status_code == 200
            assert len(answer.result().json()["images"]) == 400
    assert [line for line in server.lines if line["event"] == "stopped"]
    assert server.other == ["hipa: stopped\n"]


def test_a_flood_is_refused_and_the_accepted_are_served(bundles) -> None:
    root = str(bundles["tiny"].root)
    with (
        running(root, "--backend", "onnxruntime", "--queue", "4", "--images", "2") as server,
        ThreadPoolExecutor(40) as pool,
    ):
        answers = list(pool.map(lambda seed: generate(server, seed=seed), range(80)))
        codes = {answer.status_code for answer in answers}
        assert codes == {200, 429}
        for answer in answers:
            if answer.status_code == 429:
                assert int(answer.headers["retry-after"]) >= 1
                assert answer.json()["error"]["type"] == "rate_limit_error"
        text = httpx.get(f"{server.url}/metrics").text
        refused = sum(answer.status_code == 429 for answer in answers)
        assert f'hipa_refusals_total{{reason="rate_limit_exceeded"}} {refused}.0' in text
        assert f'hipa_images_total{{model="tiny"}} {80 - refused}.0' in text
        assert server.stop() == 143
        logged = 0
        for line in server.lines:
            if line.get("status") == 429:
                logged += line["requests"] if line["event"] == "refused unread" else 1
        assert logged == refused


def test_a_time_limit_and_a_client_that_leaves_cost_nothing_more(bundles) -> None:
    root = str(bundles["tiny"].root)
    options = ("--backend", "onnxruntime", "--queue", "2000", "--images", "1000")
    with running(root, *options, "--time-limit", "0.3") as server:
        answer = generate(server, count=1000)
        assert answer.status_code == 504
        assert answer.json()["error"]["code"] == "timeout"
        # A client that goes away in the middle.
        address = urlsplit(server.url)
        body = json.dumps({**ORDER, "count": 900}).encode()
        head = (
            "POST /hipa/generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        with socket.create_connection((address.hostname, address.port)) as connection:
            connection.sendall(head.encode() + body)
            time.sleep(0.1)
        server.wait_for("request", error="client_closed")
        text = httpx.get(f"{server.url}/metrics").text
        assert 'hipa_queue_images{bundle="tiny"} 0.0' in text
        made = float(text.split('hipa_queue_seconds_count{bundle="tiny"} ')[1].split("\n")[0])
        assert made < 1000, "the rest was not made"


def test_keys_names_and_prompts_in_the_log(bundles, tmp_path: Path) -> None:
    keys = tmp_path / "keys.txt"
    keys.write_text(f"# of the team\n{KEY}\n")
    with running(
        f"pears={bundles['tiny'].root}", "--backend", "onnxruntime", "--log-prompts",
        "--api-keys", str(keys), HIPA_API_KEYS="another-key-of-16",
    ) as server:  # fmt: skip
        assert server.status("/metrics") == 401
        order = {**ORDER, "model": "pears"}
        for key, status in ((KEY, 200), ("another-key-of-16", 200), ("wrong", 401)):
            head = {"authorization": f"Bearer {key}"}
            answer = httpx.post(f"{server.url}/hipa/generate", json=order, headers=head)
            assert answer.status_code == status
        server.wait_for("request", prompt="a green pear")
        assert not [line for line in server.lines if "everybody" in line["event"]]
        assert KEY not in json.dumps(server.lines)


def test_an_open_service_says_so() -> None:
    with running("emoji", "--host", "0.0.0.0", "--backend", "onnxruntime") as server:
        assert "everybody" in server.lines[0]["event"]


def test_metrics(server: Server) -> None:
    assert generate(server, count=3).status_code == 200
    text = httpx.get(f"{server.url}/metrics").text
    for name in (
        'hipa_requests_total{route="/hipa/generate",status="200"}',
        'hipa_request_seconds_bucket{le="0.1",route="/hipa/generate"}',
        'hipa_queue_images{bundle="tiny"}',
        'hipa_batch_images_bucket{bundle="tiny",le="4.0"}',
        'hipa_stage_seconds_count{bundle="tiny",stage="unet"}',
        'hipa_images_total{model="tiny"}',
        'hipa_encode_seconds_count{format="png"}',
        "hipa_ready 1.0",
        "process_resident_memory_bytes",
    ):
        assert name in text, name


def test_a_connection_is_kept_for_longer_than_proxies_keep_theirs(server: Server) -> None:
    """uvicorn's own time is 5 seconds; Caddy's 120 would be long for a test."""
    assert KEEP_SECONDS > 120
    where = urlsplit(server.url)
    with closing(HTTPConnection(where.hostname, where.port, timeout=30)) as connection:
        connection.connect()
        first = connection.sock
        for pause in (0.0, 5.5):
            time.sleep(pause)
            connection.request("GET", "/health/live")
            assert connection.getresponse().read() == b'{"status":"live"}'
        assert connection.sock is first


def test_a_warning_is_a_line_of_its_own_words() -> None:
    """A container without a home has no cache."""
    with running("emoji", "--backend", "onnxruntime", HIPA_CACHE="/proc/none") as server:
        words = [line["event"] for line in server.lines if line["level"] == "warning"]
    assert len(words) == 2
    assert words[0].startswith("the hashes of unchanged files cannot be kept")
    assert words[1].startswith("compiled stages cannot be kept")
    assert "--no-cache" not in words[1]  # which hipa-serve does not have
    assert not any("\n" in event for event in words)


def test_a_second_ctrl_c_ends_at_once(bundles) -> None:
    """What was accepted is answered with an error, and nothing is a bug."""
    options = ("--backend", "onnxruntime", "--queue", "4000", "--images", "4000")
    with running(str(bundles["tiny"].root), *options) as server, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(generate, server, count=4000)
        deadline = time.monotonic() + 60
        while not queued_images(server):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        server.process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        began = time.monotonic()
        assert server.stop(signal.SIGINT) == 130
        assert time.monotonic() - began < 10
        assert answer.result().status_code == 503
        assert answer.result().json()["error"]["code"] == "stopping"
    assert [line for line in server.lines if "traceback" in line] == []
    assert server.other == ["hipa: stopped\n"]


def test_it_listens_before_it_is_ready(server: Server) -> None:
    events = [line["event"] for line in server.lines]
    assert events.index("listening") < events.index("ready")


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(["serve", *arguments])
    assert stopped.value.code == 1
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "nothing does not exist"),
        (["emoji", "emoji"], "two bundles are called 'emoji'"),
        (["a b=emoji"], "cannot be the name of a model"),
        (["emoji", "--backend", "gpu"], "backend 'gpu' is unknown"),
        (["emoji", "--port", "99999"], "--port is 99999"),
        (["emoji", "--queue", "0"], "--queue is 0"),
        (["emoji", "--queue", "5"], "--images 10 is more than --queue 5"),
        (["emoji", "--time-limit", "nan"], "--time-limit is nan"),
        (["emoji", "--steps-limit", "0"], "--steps-limit is 0"),
        (["emoji", "--wait", "-1"], "--wait is -1"),
        (["emoji", "--batch", "0"], "--batch is 0"),
        (
            ["emoji", "--api-keys", "none.txt"],
            "none.txt is missing, so it cannot be read. Expected a file with API keys",
        ),
        (["emoji", "--allow-host", "http://gpu-box"], "without http:// and without a port"),
        (["emoji", "--allow-host", "gpu-box:8000"], "--allow-host is 'gpu-box:8000'"),
        (["emoji", "--allow-origin", "example.org"], "--allow-origin is 'example.org'"),
        (["emoji", "--allow-origin", "https://example.org/app"], "and no path"),
        (["emoji", "--allow-origin", "*"], "Name each site"),
        (["emoji", "--host", "no.such.name.invalid"], "cannot listen at"),
    ],
    ids=str,
)
def test_mistakes_are_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    error = refused(capsys, *arguments)
    assert message in error
    assert error.count("\n") == 1


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        error = refused(capsys, "emoji", "--port", str(taken.getsockname()[1]))
    assert "Choose another --host or --port" in error


@pytest.mark.parametrize("content", ["", "# nothing\n", "short\n", "with blanks in the key\n"])
def test_keys_that_are_wrong(tmp_path: Path, content: str) -> None:
    (tmp_path / "keys").write_text(content)
    with pytest.raises(HipaError) as caught:
        read_keys(tmp_path / "keys")
    assert "short" not in str(caught.value).replace("too short", "")


@pytest.mark.parametrize("content", ["", " , "])
def test_a_variable_without_a_key_opens_no_service(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    """As where a secret did not arrive in a container."""
    monkeypatch.setenv("HIPA_API_KEYS", content)
    error = refused(capsys, "emoji", "--host", "no.such.name.invalid")
    assert "the variable HIPA_API_KEYS is set, and has no API key" in error

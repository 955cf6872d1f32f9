"""Clients that send half a head or take no answer, at a server here whose limits are short."""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
import uvicorn

from hipa_deploy.serve.process import http_protocol
from hipa_deploy.serve.web import guard as guard_module
from hipa_deploy.serve.web.api_errors import ApiError
from hipa_deploy.serve.web.guard import Guard

SECONDS = 0.5  # the limit here
LARGE = 4 << 20  # bytes, far more than the system keeps for a connection here
REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


def set_limit(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    monkeypatch.setattr(http_protocol, "ANSWER_SECONDS", seconds)
    monkeypatch.setattr(guard_module, "ANSWER_SECONDS", seconds)


@pytest.fixture(autouse=True)
def short_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    set_limit(monkeypatch, SECONDS)


class Answers:
    """Answers every request with as many bytes, and counts the requests."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.calls = 0

    async def __call__(self, scope, receive, send) -> None:
        self.calls += 1
        length = (b"content-length", str(self.size).encode())
        await send({"type": "http.response.start", "status": 200, "headers": [length]})
        await send({"type": "http.response.body", "body": bytes(self.size)})


@contextmanager
def served(app, keep: int = 1) -> Iterator[tuple[uvicorn.Server, socket.socket]]:
    """A server, and a connection to it; both keep few bytes in the system."""
    listening = socket.create_server(("127.0.0.1", 0))
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
    config = uvicorn.Config(
        app,
        http=http_protocol.PunctualProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        timeout_keep_alive=keep,
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])))
    thread.start()
    client = socket.socket()
    try:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(30)
        client.connect(listening.getsockname())
        yield server, client
    finally:
        client.close()
        server.should_exit = True
        thread.join()


def whole_answer(client: socket.socket) -> bytes:
    """An answer of ``Answers(10)``, from a connection that is not closed before its end."""
    answer = b""
    while not answer.endswith(bytes(10)):
        part = client.recv(1000)
        assert part, "the connection was closed"
        answer += part
    return answer


def wait_until_dropped(server: uvicorn.Server, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while server.server_state.connections:
        assert time.monotonic() < deadline, "the connection is still open"
        time.sleep(0.05)


def wait_until_idle(server: uvicorn.Server) -> None:
    """Until no application runs for a request."""
    deadline = time.monotonic() + 10
    while server.server_state.tasks:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def problems(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("guarded", [True, False])
def test_many_answers_that_nobody_takes(caplog: pytest.LogCaptureFixture, guarded: bool) -> None:
    """Not all answers come through the guard: those to a browser's preflights do not."""
    app = Answers(20_000)
    with served(Guard(app, body=100) if guarded else app) as (server, client):
        client.sendall(400 * REQUEST)
        time.sleep(SECONDS / 2)
        assert server.server_state.connections
        wait_until_dropped(server)
        wait_until_idle(server)
    assert app.calls < 100, "what was pipelined is disregarded"
    assert problems(caplog) == []


def test_a_refusal_that_nobody_takes(caplog: pytest.LogCaptureFixture) -> None:
    app = Answers(LARGE)
    with served(Guard(app, body=100)) as (server, client):
        client.sendall(REQUEST + REQUEST.replace(b"localhost", b"stranger.example") + REQUEST)
        time.sleep(SECONDS / 2)
        assert server.server_state.connections
        wait_until_dropped(server)
        wait_until_idle(server)
    assert app.calls == 1
    assert problems(caplog) == []


@pytest.mark.parametrize("request_head", [REQUEST, REQUEST[:-2] + b"Connection: close\r\n\r\n"])
def test_one_answer_that_nobody_takes(
    caplog: pytest.LogCaptureFixture, request_head: bytes
) -> None:
    """The application has answered, and the closed connection waits for its client."""
    with served(Guard(Answers(LARGE), body=100)) as (server, client):
        client.sendall(request_head)
        time.sleep(SECONDS / 2)
        assert server.server_state.connections
        wait_until_dropped(server)
    assert problems(caplog) == []


def test_half_a_head_behind_an_answer_that_nobody_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_SECONDS", 0.2)
    with served(Guard(Answers(LARGE), body=100)) as (server, client):
        client.sendall(REQUEST + b"GET / HT")
        time.sleep(0.1)
        assert server.server_state.connections
        wait_until_dropped(server)


def test_a_slow_client_gets_its_whole_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes three times the limit, and is closed in the usual way long before it has all."""
    set_limit(monkeypatch, 2 * SECONDS)
    with served(Guard(Answers(LARGE), body=100)) as (_, client):
        client.sendall(REQUEST)
        began = time.monotonic()
        got = 0
        while part := client.recv(LARGE // 100):
            got += len(part)
            should_take = got / LARGE * 6 * SECONDS
            time.sleep(max(0.0, began + should_take - time.monotonic()))
        assert got > LARGE
        assert time.monotonic() - began > 5 * SECONDS


def test_half_a_head_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_SECONDS", 0.2)

    async def app(scope, receive, send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})

    # However long a connection is kept on which nothing has begun.
    with served(app, keep=60) as (_, client):
        address = client.getpeername()
        for begin in (b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: a\r\n\r\nGET / HT"):
            with socket.create_connection(address, timeout=3) as connection:
                connection.sendall(begin)
                answer = b""
                while part := connection.recv(1000):
                    answer += part
                assert (b"ok" in answer) == (b"\r\n\r\n" in begin)
                # A browser opens connections before it needs them: they are closed in silence.
                assert (b"HTTP/1.1 408 Request Timeout" in answer) == bool(begin)
                assert (b'"code":"request_timeout"' in answer) == bool(begin)


def test_a_body_whose_end_does_not_come_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The application has answered without it."""
    monkeypatch.setattr(http_protocol, "HEAD_SECONDS", 0.2)
    with served(Answers(10), keep=60) as (server, client):
        client.sendall(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{")
        assert client.recv(1000).startswith(b"HTTP/1.1 200 ")
        wait_until_dropped(server, 3)


def test_a_connection_waits_for_its_next_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy keeps its connections for a minute, which is longer than a head may take."""
    monkeypatch.setattr(http_protocol, "HEAD_SECONDS", 0.2)
    with served(Answers(10), keep=60) as (_, client):
        for _ in range(2):
            client.sendall(REQUEST)
            assert whole_answer(client).startswith(b"HTTP/1.1 200 ")
            time.sleep(0.5)


def test_half_a_head_that_trickles_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_SECONDS", 0.5)
    with served(Answers(10)) as (server, client):
        client.sendall(b"GET / HTTP/1.1\r\nHost: ")
        client.settimeout(0.1)
        answer = b""
        deadline = time.monotonic() + 10
        while not answer:
            assert time.monotonic() < deadline
            client.sendall(b"a")
            with suppress(TimeoutError):
                answer = client.recv(1000)
        assert answer.startswith(b"HTTP/1.1 408 ")
        wait_until_dropped(server)


def test_a_body_that_trickles_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole server: the connection is dropped after the answer too."""
    monkeypatch.setattr(guard_module, "BODY_SECONDS", 0.5)

    async def app(scope, receive, send) -> None:
        try:
            while (await receive())["more_body"]:
                pass
        except ApiError as error:
            await error.response()(scope, receive, send)

    with served(Guard(app, body=1 << 20)) as (server, client):
        client.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n")
        client.settimeout(0.1)
        answer = b""
        deadline = time.monotonic() + 10
        while b"request_timeout" not in answer:
            assert time.monotonic() < deadline
            client.sendall(b"a")
            with suppress(TimeoutError):
                answer += client.recv(1000)
        assert answer.startswith(b"HTTP/1.1 408 ")
        wait_until_dropped(server)


def test_a_client_that_sends_faster_than_it_is_answered_is_read_slowly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What waits for its turn has a limit, however long it sends."""
    set_limit(monkeypatch, 60)
    held = []

    async def app(scope, receive, send) -> None:
        (protocol,) = server.server_state.connections
        held.append(len(protocol._held))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})

    with served(app, keep=60) as (server, client):
        client.settimeout(0.05)
        deadline = time.monotonic() + 2
        sent = 0
        while time.monotonic() < deadline:
            with suppress(TimeoutError):
                sent += client.send((5000 * REQUEST)[sent % len(REQUEST) :])
            with suppress(TimeoutError):
                client.recv(1000)
        assert len(held) > 20
        assert max(held) < 1_000_000


def test_a_stopping_server_answers_the_request_under_way_alone() -> None:
    begun = threading.Event()

    async def app(scope, receive, send) -> None:
        begun.set()
        await asyncio.sleep(0.3)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})

    with served(app, keep=60) as (server, client):
        client.sendall(20 * REQUEST)
        assert begun.wait(10)
        server.should_exit = True
        answer = b""
        while part := client.recv(1000):
            answer += part
    assert answer.count(b"HTTP/1.1 200 ") == 1


@pytest.mark.parametrize("late", [b"\r\n", b"a"])
def test_what_begins_no_request_does_not_end_a_kept_connection(
    monkeypatch: pytest.MonkeyPatch, late: bytes
) -> None:
    """An empty line, as old clients send it behind a body, or the end of a body."""
    monkeypatch.setattr(http_protocol, "HEAD_SECONDS", 0.2)
    post = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\n"
    with served(Answers(10), keep=60) as (_, client):
        for _ in range(2):
            client.sendall(REQUEST if late == b"\r\n" else post)
            assert whole_answer(client).startswith(b"HTTP/1.1 200 ")
            client.sendall(late)
            time.sleep(0.5)


def test_a_connection_that_is_reset_is_forgotten_at_once() -> None:
    """Its keep-alive timer would hold its headers for two minutes."""
    protocols = weakref.WeakSet()

    async def app(scope, receive, send) -> None:
        protocols.update(server.server_state.connections)
        await Answers(10)(scope, receive, send)

    with served(app, keep=60) as (server, client):
        client.sendall(REQUEST)
        client.recv(1000)
        assert len(protocols) == 1
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        wait_until_dropped(server)
        time.sleep(0.1)
        assert len(protocols) == 0

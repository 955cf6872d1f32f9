"""Refusals before a request is parsed: which requests, what the connection does afterwards."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import h11
import httpx
import pytest
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st

from hipa_deploy.serve.arrivals import Arrivals
from hipa_deploy.serve.process import http_protocol
from hipa_deploy.serve.process.doorkeeper import Doorkeeper, plain_request
from hipa_deploy.serve.process.http_protocol import protocol_with
from hipa_deploy.serve.served import Models
from hipa_deploy.serve.service import ImageService
from hipa_deploy.serve.settings import Limits
from hipa_deploy.serve.web.web_app import image_paths, web_app

KEY = "0123456789abcdef"
PATH = "/v1/images/generations"
PATHS = frozenset([PATH.encode()])
BODY = b'{"prompt":"a pear"}'


def request(
    *lines: str, body: bytes = BODY, length: int | None = None, first: str = f"POST {PATH} HTTP/1.1"
) -> bytes:
    """A request as bytes; of a length of -1 the header is left out."""
    length = len(body) if length is None else length
    head = [first, "Host: localhost", "Content-Type: application/json", *lines]
    if length >= 0:
        head.append(f"Content-Length: {length}")
    return "\r\n".join([*head, "", ""]).encode("latin-1") + body


@pytest.mark.parametrize(
    ("data", "missing"),
    [
        (request(), 0),
        (request("Connection: keep-alive", "Accept: */*", "X-Empty:"), 0),
        (request(body=b"", length=19), 19),
        (request(body=b"", length=0), 0),
    ],
)
def test_plain_requests(data: bytes, missing: int) -> None:
    found = plain_request(data, PATHS)
    assert found is not None
    assert found.missing == missing


@pytest.mark.parametrize(
    "data",
    [
        b"",
        request()[:40],  # half a head
        request(first=f"GET {PATH} HTTP/1.1"),
        request(first=f"POST {PATH} HTTP/1.0"),
        request(first="POST /hipa/models HTTP/1.1"),
        request(first=f"POST {PATH}?a=b HTTP/1.1"),
        request(length=-1),
        request(length=100_000),
        request() + b"P",  # the next request
        request("Transfer-Encoding: chunked"),
        request("Expect: 100-continue"),
        request("Connection: close"),
        request("Connection: keep-alive, upgrade"),
        request("Upgrade: h2c"),
        request("Content-Length: 19"),  # twice
        request("CONTENT-LENGTH: 18"),
        request("Content-Length : 18"),
        request("X-Folded: a\r\n b"),
        request("X-Lone: a\nContent-Length: 3"),
        request("X-Return: a\rb"),
        request("X-Nul: \0"),
        request("No colon"),
        request("Content-Length: +19", length=-1),
        request("Content-Length: 19, 19", length=-1),
        request(f"Authorization: Bearer {KEY}", "authorization: other"),
    ],
)
def test_what_the_usual_parser_has_to_read(data: bytes) -> None:
    assert plain_request(data, PATHS) is None


NAMES = st.sampled_from(
    ["A", "content-length", "Content-Length", "Host", "X_y", "Bad name", "", " A"]
)
VALUES = st.sampled_from(["", "1", "19", " 19", "19 ", "\t0", "a b", "\xff", "x\ry", "x\ny", "\0"])
ENDS = st.sampled_from(["\r\n", "\r\n", "\r\n", "\n", "\r"])


@settings(max_examples=400, deadline=None)
@given(
    headers=st.lists(st.tuples(NAMES, st.sampled_from([":", " :"]), VALUES, ENDS), max_size=4),
    body=st.binary(max_size=40),
)
def test_h11_reads_the_same_request(headers: list[tuple[str, ...]], body: bytes) -> None:
    """Otherwise a request could hide in the body of another one."""
    head = f"POST {PATH} HTTP/1.1\r\nHost: a\r\n" + "".join("".join(line) for line in headers)
    data = f"{head}\r\n".encode("latin-1") + body
    found = plain_request(data, PATHS)
    if found is None:
        return
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(data)
    try:
        event = connection.next_event()
    except h11.RemoteProtocolError:
        # Stricter than we are, for example about two Host headers: nothing that changes a length.
        assert [name.lower() for name, *_ in headers].count("host") > 0
        return
    assert isinstance(event, h11.Request)
    (length,) = [int(value) for name, value in event.headers if name == b"content-length"]
    got = 0
    while isinstance(event := connection.next_event(), h11.Data):
        got += len(event.data)
    assert found.missing == length - got
    assert connection.trailing_data[0] == b""


class Full:
    """A service whose queue is full, behind uvicorn; it is never loaded.

    Attributes:
        seconds: of the refusals; None lets requests come in.

    """

    def __init__(
        self, root: str, keys: tuple[str, ...] = (), origins: tuple[str, ...] = ()
    ) -> None:
        self.seconds: int | None = 7
        self.service = ImageService(Models([f"tiny={root}"]), Limits())
        self.arrivals = Arrivals(lambda arriving: self.seconds)
        app = web_app(self.service, keys=keys, origins=origins, arrivals=self.arrivals)
        self.doorkeeper = Doorkeeper(
            self.arrivals, self.service.metrics, image_paths(), keys, origins
        )
        listening = socket.create_server(("127.0.0.1", 0))
        self.address = listening.getsockname()
        config = uvicorn.Config(
            app, http=protocol_with(self.doorkeeper), ws="none", lifespan="off", log_config=None
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=lambda: asyncio.run(self.server.serve([listening])))
        self.thread.start()

    @contextmanager
    def connection(self) -> Iterator[socket.socket]:
        """A client."""
        with socket.create_connection(self.address, timeout=5) as it:
            yield it

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join()
        self.service.close()

    def counted(self) -> float:
        """Refusals in the metrics."""
        name = 'hipa_refusals_total{reason="rate_limit_exceeded"} '
        return float(self.service.metrics.text().decode().split(name)[1].split("\n")[0])


@pytest.fixture
def full(bundles) -> Iterator[Full]:
    it = Full(str(bundles["tiny"].root))
    yield it
    it.stop()


def answer(connection: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """The next answer of a connection."""
    parser = h11.Connection(h11.CLIENT)
    parser.send(h11.Request(method="POST", target="/", headers=[("host", "a")]))
    parser.send(h11.EndOfMessage())
    head: h11.Response | None = None
    body = b""
    while True:
        event = parser.next_event()
        if event is h11.NEED_DATA:
            parser.receive_data(connection.recv(65536))
        elif isinstance(event, h11.Response):
            head = event
        elif isinstance(event, h11.Data):
            body += bytes(event.data)
        elif isinstance(event, h11.EndOfMessage):
            assert head is not None
            named = {name.decode(): value.decode() for name, value in head.headers}
            return head.status_code, named, body


def test_the_answer_is_the_guards(full: Full) -> None:
    """But for the connection, which the guard closes, and the number of the request."""
    with full.connection() as connection:
        connection.sendall(request())
        early = answer(connection)
        connection.sendall(request("Expect: 100-continue"))
        late = answer(connection)
    assert (early[0], early[2]) == (late[0], late[2])
    assert early[0] == 429
    assert json.loads(early[2])["error"]["code"] == "rate_limit_exceeded"
    assert early[1]["retry-after"] == "7"
    assert late[1].pop("connection") == "close"
    assert late[1].pop("x-request-id")
    assert sorted(early[1]) == sorted(late[1])
    assert full.counted() == 2


def test_a_connection_is_kept_and_the_body_thrown_away(full: Full) -> None:
    with full.connection() as connection:
        connection.sendall(request(body=b"", length=len(BODY)))
        assert answer(connection)[0] == 429
        # The rest of the body and the next request, in pieces that do not fit them.
        rest = BODY + request() + b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n"
        connection.sendall(rest[:5])
        connection.sendall(rest[5 : len(BODY)] + request())
        assert answer(connection)[0] == 429
        full.seconds = None
        connection.sendall(request())
        status, _, body = answer(connection)
        assert (status, json.loads(body)["error"]["code"]) == (503, "not_ready")
        full.seconds = 3
        connection.sendall(request())
        assert answer(connection)[1]["retry-after"] == "3"
    assert full.counted() == 3


def test_other_requests_are_answered(full: Full) -> None:
    with httpx.Client(base_url="http://{}:{}".format(*full.address)) as http:
        for path in ("/health/live", "/v1/models", "/metrics", "/hipa/models"):
            assert http.get(path).status_code == 200
        for path in image_paths():
            assert http.post(path, json={"prompt": "a"}).status_code == 429
        assert http.post(PATH, content=b"a" * 100_000).status_code == 429


def test_a_body_that_does_not_come_ends_the_connection(
    full: Full, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_SECONDS", 0.2)
    with full.connection() as connection:
        connection.sendall(request(body=b"{", length=19))
        assert answer(connection)[0] == 429
        assert connection.recv(10) == b""


@pytest.mark.parametrize("missing", [0, 9])
def test_a_refused_client_can_come_back_later(
    full: Full, monkeypatch: pytest.MonkeyPatch, missing: int
) -> None:
    """A proxy keeps the connection for other requests."""
    monkeypatch.setattr(http_protocol, "HEAD_SECONDS", 0.2)
    with full.connection() as connection:
        for _ in range(2):
            connection.sendall(request(body=BODY[missing:], length=len(BODY)))
            assert answer(connection)[0] == 429
            connection.sendall(BODY[:missing])
            time.sleep(0.5)


def test_answers_that_nobody_reads_do_not_pile_up(full: Full) -> None:
    """Once the system's buffers are full, the usual way takes over, which closes."""
    with full.connection() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(0.5)
        sent = 0
        try:
            while sent < 50_000:
                connection.sendall(request())
                sent += 1
        except OSError:
            pass
        assert 0 < full.counted() < 50_000
        assert sent < 50_000


def test_requests_that_came_in_count_until_they_are_answered(full: Full) -> None:
    full.seconds = None
    with full.connection() as connection:
        connection.sendall(request())
        assert answer(connection)[0] == 503
        # No HTTP after all: the parser wants a Host.
        connection.sendall(request().replace(b"Host: localhost\r\n", b""))
        assert answer(connection)[0] == 400
    with full.connection() as connection:
        connection.sendall(request())
    with httpx.Client(base_url="http://{}:{}".format(*full.address)) as http:
        assert http.get("/health/live").status_code == 200
    assert not full.arrivals._on_their_way


def test_who_has_no_key_does_not_learn_that_the_queue_is_full(bundles) -> None:
    full = Full(str(bundles["tiny"].root), (KEY,))
    try:
        for line, status in ((f"Authorization: Bearer {KEY}", 429), ("A: b", 401)):
            with full.connection() as connection:
                connection.sendall(request(line))
                assert answer(connection)[0] == status
        full.seconds = None
        assert full.doorkeeper.read(request()) is None
        assert full.doorkeeper.read(request(f"authorization:  bearer {KEY} ")) is not None
    finally:
        full.stop()


@pytest.mark.parametrize("key", ["another-key", KEY])
def test_a_page_of_an_allowed_site_can_read_refusals(bundles, key: str) -> None:
    """A browser hands an answer without these headers to no page."""
    site = "https://friend.example"
    it = Full(str(bundles["tiny"].root), keys=(KEY,), origins=("https://Friend.example/",))
    try:
        host, port = it.address
        headers = {"origin": site, "authorization": f"Bearer {key}"}
        answer = httpx.post(f"http://{host}:{port}{PATH}", json={"prompt": "a"}, headers=headers)
        assert answer.status_code == (429 if key == KEY else 401)
        assert answer.headers["access-control-allow-origin"] == site
        assert "retry-after" in answer.headers["access-control-expose-headers"]

        # Programs send no Origin and are refused before they are parsed, as without sites.
        plain = request(f"Authorization: Bearer {KEY}")
        assert it.doorkeeper.read(plain) is not None
        assert (
            it.doorkeeper.read(request(f"Authorization: Bearer {KEY}", f"Origin: {site}")) is None
        )
    finally:
        it.stop()

"""What the server reads of a connection: the same however it is cut, and never without a limit."""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
import weakref
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import h11
import pytest
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st
from uvicorn.server import ServerState

from hipa_deploy.serve.process.http_protocol import PunctualProtocol

END = b"\r\n\r\n"
CHUNKED_HEAD = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked" + END
OFFER = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAI\r\n"


def get(path: bytes = b"/", more: bytes = b"") -> bytes:
    return b"GET " + path + b" HTTP/1.1\r\nHost: a\r\n" + more + b"\r\n"


def post(path: bytes, body: bytes, more: bytes = b"") -> bytes:
    length = b"Content-Length: %d\r\n" % len(body)
    return b"POST " + path + b" HTTP/1.1\r\nHost: a\r\n" + length + more + b"\r\n" + body


def chunked(path: bytes, parts: list[bytes], more: bytes = b"", trailer: bytes = b"") -> bytes:
    head = (
        b"POST " + path + b" HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n" + more + b"\r\n"
    )
    frames = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)
    return head + frames + b"0\r\n" + trailer + b"\r\n"


Seen = tuple[str, str, bytes]  # method, path, body


@dataclass
class Reader:
    """An application that reads whole requests, and answers each with its number.

    Attributes:
        seen: method, path and body.
        headers: of each.
        most_waiting: requests that were parsed before their turn.
        left: requests whose client went away while they were read.

    """

    seen: list[Seen] = field(default_factory=list)
    headers: list[list[tuple[bytes, bytes]]] = field(default_factory=list)
    most_waiting: int = 0
    left: int = 0
    protocol: PunctualProtocol | None = None

    async def __call__(self, scope, receive, send) -> None:
        body = b""
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.left += 1
                return
            body += message["body"]
            more = message["more_body"]
        assert self.protocol is not None
        self.most_waiting = max(self.most_waiting, len(self.protocol.pipeline))
        self.seen.append((scope["method"], scope["path"], body))
        self.headers.append(scope["headers"])
        answer = str(len(self.seen)).encode()
        length = (b"content-length", str(len(answer)).encode())
        await send({"type": "http.response.start", "status": 200, "headers": [length]})
        await send({"type": "http.response.body", "body": answer})


async def answer_at_once(scope, receive, send) -> None:
    await send(
        {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]}
    )
    await send({"type": "http.response.body", "body": b""})


def read(pieces: list[bytes], answers: int = 1000, app: Any = None) -> tuple[Reader, bytes]:
    """What an application sees of a connection, and what the client gets.

    Args:
        pieces: what the client sends; the server runs for a moment after each.
        answers: after which the client leaves, if the server has not closed the connection.
        app: None is the reader.

    """
    reader = Reader()
    config = uvicorn.Config(app or reader, ws="none", lifespan="off", log_config=None)
    config.load()

    def protocol() -> PunctualProtocol:
        reader.protocol = PunctualProtocol(config, ServerState(), {})
        return reader.protocol

    async def send(theirs: socket.socket) -> None:
        for piece in pieces:
            await asyncio.get_running_loop().sock_sendall(theirs, piece)
            await asyncio.sleep(0)

    async def run() -> bytes:
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        transport, _ = await loop.connect_accepted_socket(protocol, ours)
        sending = asyncio.ensure_future(send(theirs))
        got = b""
        with suppress(ConnectionError):  # closed with something unread
            while got.count(b"HTTP/1.1 ") < answers:
                part = await asyncio.wait_for(loop.sock_recv(theirs, 1 << 16), 20)
                if not part:
                    break
                got += part
        sending.cancel()
        theirs.close()
        transport.abort()
        for _ in range(3):
            await asyncio.sleep(0)
        return got

    return reader, asyncio.run(run())


def statuses(got: bytes) -> list[int]:
    return [int(part[:3]) for part in got.split(b"HTTP/1.1 ")[1:]]


STREAMS: dict[str, tuple[list[bytes], list[Seen]]] = {
    "requests behind each other": (
        [get(b"/a"), post(b"/b", b"1234"), b"\r\n", get(b"/c?d=e"), chunked(b"/f", [b"gh", b"i"])],
        [("GET", "/a", b""), ("POST", "/b", b"1234"), ("GET", "/c", b""), ("POST", "/f", b"ghi")],
    ),
    "an offer of HTTP/2, as Java's client makes it": (
        [post(b"/a", b"body", OFFER), get(b"/b", OFFER), post(b"/c", b"", OFFER), get(b"/d")],
        [("POST", "/a", b"body"), ("GET", "/b", b""), ("POST", "/c", b""), ("GET", "/d", b"")],
    ),
    "the same with a body in chunks": (
        [chunked(b"/a", [b"bo", b"dy"], OFFER, b"X: y\r\n"), get(b"/b")],
        [("POST", "/a", b"body"), ("GET", "/b", b"")],
    ),
    "a body with what looks like a request": (
        [post(b"/a", get(b"/no")), post(b"/b", get(b"/no"), OFFER), chunked(b"/c", [get(b"/no")])],
        [("POST", "/a", get(b"/no")), ("POST", "/b", get(b"/no")), ("POST", "/c", get(b"/no"))],
    ),
    "a long body": (
        [post(b"/a", bytes(range(256)) * 300), get(b"/b")],
        [("POST", "/a", bytes(range(256)) * 300), ("GET", "/b", b"")],
    ),
}


@pytest.mark.parametrize("name", STREAMS)
@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.floats(0, 1), max_size=12))
def test_a_stream_is_read_alike_however_it_is_cut(name: str, cuts: list[float]) -> None:
    parts, expected = STREAMS[name]
    data = b"".join(parts)
    places = sorted({0, len(data), *(int(cut * len(data)) for cut in cuts)})
    pieces = [data[begin:end] for begin, end in pairwise(places)]
    reader, got = read(pieces, len(expected))
    assert reader.seen == expected
    assert statuses(got) == [200] * len(expected)


NAMES = st.sampled_from(["A", "Content-Length", "Transfer-Encoding", "Host", "Bad name", "", " A"])
VALUES = st.sampled_from(
    ["", "1", " 4", "4 ", "+4", "4,4", "chunked", "identity", "\t", "x\ry", "\0"]
)
LINE_ENDS = st.sampled_from(["\r\n", "\r\n", "\r\n", "\n", "\r"])
BODIES = st.sampled_from([b"", b"abcd", b"4\r\nabcd\r\n0\r\n\r\n", b"0\r\n\r\n", get(b"/no")])


@settings(max_examples=300, deadline=None)
@given(
    headers=st.lists(st.tuples(NAMES, st.sampled_from([":", " :"]), VALUES, LINE_ENDS), max_size=3),
    body=BODIES,
)
def test_another_parser_reads_the_same(headers: list[tuple[str, ...]], body: bytes) -> None:
    """A proxy's, say: otherwise a request could hide in the body of another one."""
    lines = "".join("".join(line) for line in headers).encode("latin-1")
    data = b"POST /a HTTP/1.1\r\nHost: a\r\n" + lines + b"\r\n" + body
    reader, _ = read([data, get(b"/last"), b"no HTTP" + END])
    others = h11_reads(data + get(b"/last"))
    if others is not None:
        # What we refuse hides nothing either.
        assert reader.seen in (others, others[: len(reader.seen)])
        return
    # h11 takes one empty line between requests, and httptools several: that hides nothing.
    assert reader.seen[1:] in ([], [("GET", "/last", b"")])


def h11_reads(data: bytes) -> list[Seen] | None:
    """The requests of a stream; None where something in it is no HTTP."""
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(data)
    seen: list[Seen] = []
    try:
        while not isinstance(event := connection.next_event(), type(h11.NEED_DATA)):
            if not isinstance(event, h11.Request):
                return None
            body = b""
            while isinstance(part := connection.next_event(), h11.Data):
                body += bytes(part.data)
            if not isinstance(part, h11.EndOfMessage):
                return seen
            seen.append((event.method.decode(), event.target.decode(), body))
            connection.send(h11.Response(status_code=200, headers=[("content-length", "0")]))
            connection.send(h11.EndOfMessage())
            connection.start_next_cycle()
    except h11.RemoteProtocolError:
        return None
    return seen


@pytest.mark.parametrize(
    "head",
    [
        b"GET /\r\nHost: a",
        b"GET / HTTP/0.9\r\nHost: a",
        b"GET / HTTP/2.0\r\nHost: a",
        b"GET http://a/ HTTP/1.1\r\nHost: a",
        b"CONNECT a:443 HTTP/1.1\r\nHost: a",
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked",
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: identity\r\n" + OFFER[:-2],
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 1\r\n"
        + OFFER[:-2],
    ],
)
def test_what_this_service_does_not_speak(caplog: pytest.LogCaptureFixture, head: bytes) -> None:
    reader, got = read([head + END + b"0" + END])
    assert statuses(got) == [400]
    assert reader.seen == []
    # Behind another request, which is answered.
    reader, got = read([get(b"/a") + head + END + b"0" + END])
    assert statuses(got) == [200]
    assert reader.seen == [("GET", "/a", b"")]
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_what_stands_behind_a_body_is_no_header() -> None:
    """It comes after the headers were checked."""
    reader, got = read([chunked(b"/", [b"a"], trailer=b"Authorization: Bearer x\r\n")], 1)
    assert statuses(got) == [200]
    assert [name for name, _ in reader.headers[0]] == [b"host", b"transfer-encoding"]


def test_few_requests_are_parsed_before_their_turn() -> None:
    reader, got = read([2000 * get()], 2000)
    assert len(reader.seen) == 2000
    assert statuses(got) == [200] * 2000
    assert 0 < reader.most_waiting < 300


@pytest.mark.parametrize("hosts", [b"", b"Host: a\r\nHost: a\r\n"])
def test_a_host_stands_there_once(hosts: bytes) -> None:
    reader, got = read([b"GET / HTTP/1.1\r\n" + hosts + b"\r\n"])
    assert statuses(got) == [400]
    assert reader.seen == []


def test_the_oldest_health_checks_need_no_host() -> None:
    """HAProxy's httpchk."""
    reader, got = read([b"GET /health/live HTTP/1.0\r\n\r\n"])
    assert statuses(got) == [200]
    assert reader.seen == [("GET", "/health/live", b"")]


def test_what_is_no_http_behind_requests_ends_the_connection_after_their_answers() -> None:
    reader, got = read([get(b"/a") + get(b"/b") + b"no HTTP" + END + get(b"/c"), get(b"/d")])
    assert statuses(got) == [200, 200]
    assert [path for _, path, _ in reader.seen] == ["/a", "/b"]


def test_a_body_that_is_no_http_is_refused() -> None:
    reader, got = read([CHUNKED_HEAD, b"4\r\nabcd\r\n", b"zz\r\n", b"more"])
    assert statuses(got) == [400]
    assert b'"code":"invalid_http"' in got
    assert (reader.seen, reader.left) == ([], 1)


@pytest.mark.parametrize(
    ("head", "piece"),
    [
        (b"GET /", b"a" * 1000),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: ", b"a" * 1000),
        (b"GET / HTTP/1.1\r\nHost: a\r\n", b"X: y\r\n" * 200),
    ],
)
def test_a_head_has_an_end(head: bytes, piece: bytes) -> None:
    reader, got = read([head, *200 * [piece]])
    assert statuses(got) in ([431], [])  # none: it was closed with something unread
    assert reader.seen == []
    assert reader.protocol is not None
    assert len(reader.protocol.headers) < 15_000


@pytest.mark.parametrize("piece", [b"X: y\r\n" * 200, b"a" * 1000])
def test_what_stands_behind_a_body_has_an_end(piece: bytes) -> None:
    begin = chunked(b"/", [b"a"], trailer=b"X: ")[: -len(b"\r\n")]
    reader, got = read([begin, *200 * [piece]])
    assert statuses(got) in ([400], [])
    assert reader.seen == []


def test_a_body_may_come_in_chunks_of_a_byte() -> None:
    reader, got = read([chunked(b"/", 30_000 * [b"a"])], 1)
    assert statuses(got) == [200]
    assert reader.seen == [("POST", "/", 30_000 * b"a")]


def test_a_broken_body_behind_a_request_is_not_waited_for() -> None:
    reader, got = read([get(b"/a") + CHUNKED_HEAD + b"4\r\nabcd\r\nzz\r\n"])
    assert statuses(got) == [200]
    assert (reader.seen, reader.left) == ([("GET", "/a", b"")], 0)


def test_a_request_has_one_answer_though_its_body_breaks_later() -> None:
    _, got = read([CHUNKED_HEAD, *20 * [b""], b"zz\r\n"], app=answer_at_once)
    assert statuses(got) == [200]


def test_nothing_is_swallowed_behind_a_close_that_stands_behind_a_body() -> None:
    """uvicorn's parser would drop it: the client waits, and its place in the queue is taken."""
    first = chunked(b"/a", [b"a"], trailer=b"Connection: close\r\n")
    reader, got = read([first, *20 * [b""], get(b"/b")], 2)
    assert len(statuses(got)) == 2
    assert reader.seen[0] == ("POST", "/a", b"a")


@pytest.mark.parametrize(
    "pieces",
    [
        [get(b"/a")],
        [b"GET http://evil HTTP/1.1\r\nHost: a\r\n\r\n"],
        [get(b"/a", b"Connection: close\r\n") + get(b"/b") + get(b"/c")],
        [8 * get()],
        [get(b"/a") + CHUNKED_HEAD + b"4\r\nabcd\r\nzz\r\n"],
        [get(b"/a") + post(b"/b", b"1234")[:-1]],
        [get(b"/a") + b"GET /b HT"],
    ],
)
def test_a_connection_leaves_nothing_to_the_collector(pieces: list[bytes]) -> None:
    """The service seldom looks for cycles."""
    gc.disable()
    try:
        reader, _ = read(pieces, 1)
        protocol = weakref.ref(reader.protocol)
        reader.protocol = None
        assert protocol() is None
    finally:
        gc.enable()


def test_an_application_learns_that_its_client_left_though_others_wait_behind_it() -> None:
    """uvicorn tells the latest request that was parsed."""
    left = asyncio.Event()

    async def app(scope, receive, send) -> None:
        await receive()
        if (await receive())["type"] == "http.disconnect":
            left.set()

    async def run() -> None:
        config = uvicorn.Config(app, ws="none", lifespan="off", log_config=None)
        config.load()
        ours, theirs = socket.socketpair()
        loop = asyncio.get_running_loop()
        protocol = PunctualProtocol(config, ServerState(), {})
        await loop.connect_accepted_socket(lambda: protocol, ours)
        theirs.sendall(get(b"/a") + get(b"/b"))
        await asyncio.sleep(0.05)
        theirs.close()
        await asyncio.wait_for(left.wait(), 10)

    asyncio.run(run())

"""uvicorn's HTTP protocol with limits on the time of a request's head, and of taking an answer.

uvicorn closes an idle connection after an answer, and none on which a client has never sent a whole
head, or has sent half of the next one. Thousands of those would take all file descriptors. So would
clients that do not take their answers: a connection with bytes to send stays open until they have
left, also after it was closed.

The parser is httptools, which has no limit on the size of a head. It is fed in small pieces, so
that a head can be refused while it comes, and few requests are parsed before their turn.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

import httptools
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from hipa_deploy.serve.process.doorkeeper import Doorkeeper
from hipa_deploy.serve.settings import ANSWER_SECONDS, HEAD_SECONDS
from hipa_deploy.serve.web.api_errors import ApiError, headers_too_large
from hipa_deploy.serve.web.guard import GIVE_UP, PLACE

_PIECE = 4096  # bytes that the parser gets at once
# Bytes of a request that are not its body, beside what the frames of a body in small chunks take.
_MOST_BESIDE_BODY = 64 * 1024
_FRAMES = 8  # bytes of frames for each byte of a body
# Headers that say where a body ends.
_FRAMING = (b"content-length", b"transfer-encoding")


class _Flow(FlowControl):
    """Reads no more while much waits for its turn, also where uvicorn would go on reading.

    Attributes:
        full: whether much waits.

    """

    full = False

    def resume_reading(self) -> None:
        """Read on, unless much waits."""
        if not self.full:
            super().resume_reading()


class PunctualProtocol(HttpToolsProtocol):
    """Closes a connection whose next request's head is not complete after ``HEAD_SECONDS``.

    One on which nothing has begun since its last answer is kept for uvicorn's keep-alive time,
    which may be longer. Half a head is answered with 408. A connection without a byte is closed in
    silence: browsers open some before they need them, and would take the answer for that of their
    next request.
    One whose client takes nothing of an answer is dropped after ``ANSWER_SECONDS`` to twice that.
    A class of ``protocol_with`` also asks a doorkeeper before it parses a request.
    """

    doorkeeper: Doorkeeper | None = None

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        # uvicorn's parser drops what comes behind a request that asks for the connection's end.
        # Behind the doorkeeper that would take a place in the queue, and give no answer.
        self.parser = httptools.HttpRequestParser(self)
        self._late: asyncio.TimerHandle | None = None
        self._next_look: asyncio.TimerHandle | None = None
        self._left = 0  # bytes that the client had not taken at the last look
        self._unwanted = 0  # bytes of a refused request's body that are still to come
        self._place: object | None = None  # of the latest request, in the doorkeeper's arrivals
        # Requests that were parsed and may not be answered yet; ``cycle`` is the latest of them.
        self._parsed: deque[RequestResponseCycle] = deque()
        self._in_head = False  # a request has begun, and its head is not complete
        self._in_request = False  # a request has begun, and its body is not complete
        self._beside_body = 0  # bytes of the latest request that are not its body
        self._of_body = 0  # bytes of its body
        self._held = b""  # what came behind a request that waits for its turn
        self._broken = False  # what came is no HTTP, and what comes is not read
        self._repeats_head = False  # the parser reads a head that it has read before

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first head."""
        super().connection_made(transport)
        self.flow: _Flow = _Flow(transport)
        self._watch()
        self._next_look = self.loop.call_later(ANSWER_SECONDS, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting, and let go of whatever holds this protocol."""
        self._stop_watching()
        self._unset_keepalive_if_required()
        if self._next_look is not None:
            self._next_look.cancel()
        self._leave()
        under_way = self._under_way()
        if under_way is not None:
            under_way.disconnected = True
            under_way.message_event.set()
        if self.scope is not None:
            self.scope.pop(GIVE_UP, None)  # type: ignore[misc,typeddict-item]
        if self.cycle is not None:
            self.cycle.scope.pop(GIVE_UP, None)  # type: ignore[misc,typeddict-item]
            self.cycle.on_response = _nothing
        self._parsed.clear()
        self.pipeline.clear()
        self._held = b""
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Stop waiting where the head is complete; begin where a part of the next one has come."""
        if self._unwanted:
            thrown_away = min(self._unwanted, len(data))
            self._unwanted -= thrown_away
            data = data[thrown_away:]
            if not data:
                if not self._unwanted:
                    self._keep()
                return
        place = None
        if self._is_idle():
            if self._is_refused(data):
                return
            place = self._place
        self._unset_keepalive_if_required()
        self._read(data)
        # None where the request is no HTTP after all.
        if place is not None and self.scope is not None:
            self.scope[PLACE] = place  # type: ignore[literal-required]
        if self._under_way() is not None:
            self._stop_watching()
        elif self._in_request or self.cycle is None:
            self._watch()
        elif not self.transport.is_closing():
            # The end of a body that was answered before, or an empty line.
            self._keep()

    def _under_way(self) -> RequestResponseCycle | None:
        """The request that is answered; None where all are."""
        while self._parsed and self._parsed[0].response_complete:
            self._parsed.popleft()
        return self._parsed[0] if self._parsed else None

    def _is_idle(self) -> bool:
        """Whether the next byte begins a request, and the client has taken all answers."""
        return not (
            self._under_way() is not None
            or self._in_request
            or self._held
            or self._broken
            or self.transport.is_closing()
            or self.transport.get_write_buffer_size()
        )

    def _read(self, data: bytes) -> None:
        """Parse what has come, up to a request that has to wait for its turn."""
        if self._held:
            data = self._held + data
        at = 0
        view = memoryview(data)
        while at < len(data) and not self._waits() and not self._broken:
            at += self._parse(view[at : at + _PIECE])
        self._held = b"" if self._broken else data[at:]
        self.flow.full = len(self._held) >= HIGH_WATER_LIMIT
        if self._held:
            self.flow.pause_reading()

    def _waits(self) -> bool:
        """Whether a request waits for the answer to the one before it."""
        return bool(self.pipeline) or self.transport.is_closing()

    def _parse(self, piece: memoryview) -> int:
        """Parse a piece; how many bytes of it are done with."""
        try:
            self.parser.feed_data(piece)
        except httptools.HttpParserUpgrade as upgrade:
            try:
                self._go_on_without_upgrade()
            except httptools.HttpParserError:
                self._refuse_rest(_no_http())
            return int(upgrade.args[0])
        except httptools.HttpParserError:
            self._refuse_rest(_no_http())
            return len(piece)
        self._beside_body += len(piece)
        most = _MOST_BESIDE_BODY + _FRAMES * self._of_body
        if self._in_request and self._beside_body > most:
            self._refuse_rest(headers_too_large() if self._in_head else _no_http())
        return len(piece)

    def _go_on_without_upgrade(self) -> None:
        """Read on where a client has offered another protocol.

        The offer may be left unanswered, and the request is plain HTTP. Java's client makes one
        with every request. The parser stops behind such a head, so another one takes over, which
        has read no more of the head than how long the body is.
        """
        self.parser = httptools.HttpRequestParser(self)
        if not self._in_request:
            return
        lines = [b"POST / HTTP/1.1"]
        for name, value in self.headers:
            if name in _FRAMING:
                lines.append(name + b": " + value)
        self._repeats_head = True
        self.parser.feed_data(b"\r\n".join(lines) + b"\r\n\r\n")
        self._repeats_head = False

    def on_message_begin(self) -> None:
        """A request begins."""
        if self._repeats_head:
            return
        self._in_head = True
        self._in_request = True
        self._beside_body = 0
        self._of_body = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """A part of the path."""
        if not self._repeats_head:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, or what stands behind a body in chunks, which nobody reads."""
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """A head is complete.

        Raises:
            ValueError: another protocol, no path, no Host or two, or a body in another form than
                chunks.

        """
        if not self._in_head:
            return
        version = self.parser.get_http_version()
        hosts = [value for name, value in self.headers if name == b"host"]
        forms = [value.lower() for name, value in self.headers if name == b"transfer-encoding"]
        if version not in ("1.0", "1.1") or self.url[:1] not in (b"/", b"*"):
            raise ValueError("request line")
        if len(hosts) > 1 or (not hosts and version == "1.1") or forms not in ([], [b"chunked"]):
            raise ValueError("headers")
        # ASGI lets servers add keys of their own; uvicorn's type knows the standard's alone.
        self.scope[GIVE_UP] = self._give_up  # type: ignore[literal-required]
        super().on_headers_complete()
        self._parsed.append(self.cycle)
        self._in_head = False

    def on_body(self, body: bytes) -> None:
        """A part of a body."""
        self._of_body += len(body)
        self._beside_body -= len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """A body is complete."""
        if self.parser.should_upgrade() and self._has_body():
            # It has not come yet: see ``_go_on_without_upgrade``.
            return
        self._in_request = False
        super().on_message_complete()

    def _has_body(self) -> bool:
        return any(name in _FRAMING for name, _ in self.headers)

    def on_response_complete(self) -> None:
        """Wait no longer than for any head where a part of the next request has come already."""
        super().on_response_complete()
        if self._held and not self._waits():
            self._read(b"")
        if self._in_request and self._under_way() is None and not self.transport.is_closing():
            self._watch()

    def shutdown(self) -> None:
        """Answer the request under way, and none behind it."""
        under_way = self._under_way()
        if under_way is None:
            self.transport.close()
        else:
            under_way.keep_alive = False

    def resume_writing(self) -> None:
        """Note that the client has taken a part of its answer."""
        self._left = 0
        super().resume_writing()

    def _is_refused(self, data: bytes) -> bool:
        """Refuse a request that cannot come in; count one that does."""
        self._leave()
        if self.doorkeeper is None:
            return False
        request = self.doorkeeper.read(data)
        if request is None:
            return False
        refusal = self.doorkeeper.refusal(self.server_state.default_headers)
        if refusal is None:
            # Only what has arrived whole counts, as in the guard.
            if not request.missing:
                self._place = self.doorkeeper.arrivals.enter()
            return False
        self._unset_keepalive_if_required()
        self._unwanted = request.missing
        self.transport.write(refusal)
        # The connection stays open: a client that tries again need not connect again.
        self._stop_watching()
        if self._unwanted:
            self._watch()
        else:
            self._keep()
        return True

    def _keep(self) -> None:
        """Keep a connection on which nothing has begun, as uvicorn does after an answer."""
        self._stop_watching()
        seconds = self.timeout_keep_alive
        self.timeout_keep_alive_task = self.loop.call_later(
            seconds, self.timeout_keep_alive_handler
        )

    def _leave(self) -> None:
        """Whatever became of the latest request, it is not on its way any more."""
        if self.doorkeeper is not None and self._place is not None:
            self.doorkeeper.arrivals.leave(self._place)
            self._place = None

    def _refuse_rest(self, error: ApiError) -> None:
        """Answer what cannot be read in the form of the API's other errors, and read no more."""
        self._broken = True
        under_way = self._under_way()
        in_body = self._in_request and not self._in_head
        if under_way is None and in_body:
            self.transport.close()  # the request of this body has its answer
        elif under_way is None:
            self._refuse_head(error)
        elif under_way is not self.cycle or not in_body:
            # It is behind whole requests, which are answered before the connection is closed.
            if in_body:
                self.pipeline.popleft()
                self._parsed.pop()
                self.cycle = self._parsed[-1]
            self.cycle.keep_alive = False
        elif under_way.response_started:
            self._give_up()
        else:
            under_way.disconnected = True
            under_way.message_event.set()
            self._refuse_head(error)

    def _refuse_head(self, error: ApiError) -> None:
        """Answer what never became a request, and close the connection."""
        self.transport.write(error.as_bytes([(b"connection", b"close")]))
        self.transport.close()

    def _should_upgrade(self) -> bool:
        """No web sockets here; the request goes on as plain HTTP, which the standard allows."""
        return False

    def _watch(self) -> None:
        if self._late is None:
            self._late = self.loop.call_later(HEAD_SECONDS, self._close_late)

    def _stop_watching(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _look(self) -> None:
        """Drop a connection whose client has taken nothing since the last look."""
        left = 0
        # Only then nothing is added to what waits, so that less of it means a client that reads.
        # A slow one has all the time that it needs.
        if self.flow.write_paused or self.transport.is_closing():
            left = self.transport.get_write_buffer_size()
        if left and left == self._left:
            self._give_up()
            return
        self._left = left
        self._next_look = self.loop.call_later(ANSWER_SECONDS, self._look)

    def _give_up(self) -> None:
        """Drop the connection, what waits in it, and the requests behind the one under way."""
        under_way = self._under_way()
        if under_way is not None:
            # Before the loop says so: an application that ends now is no error.
            under_way.disconnected = True
        self.transport.abort()

    def _close_late(self) -> None:
        self._late = None
        if self._under_way() is not None or self.transport.is_closing():
            return
        if not self._refuses_half_a_head():
            self.transport.close()

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection; half a head may have come together with the request before."""
        if self.transport.is_closing() or self._refuses_half_a_head():
            return
        super().timeout_keep_alive_handler()

    def _refuses_half_a_head(self) -> bool:
        """Answer with 408 where a request has begun that can still be answered."""
        if self._under_way() is not None or not self._in_head:
            return False
        words = "The head of the request did not arrive in time."
        self._refuse_head(ApiError(408, words, "request_timeout"))
        return True


def _nothing() -> None:
    """In place of what held a protocol."""


def _no_http() -> ApiError:
    return ApiError(400, "The request is no valid HTTP.", "invalid_http")


def protocol_with(doorkeeper: Doorkeeper) -> type[PunctualProtocol]:
    """The protocol of a server with this doorkeeper; uvicorn makes one for each connection."""
    return type("DoorkeptProtocol", (PunctualProtocol,), {"doorkeeper": doorkeeper})

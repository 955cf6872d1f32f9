"""uvicorn's HTTP protocol with limits on the time of a request's head, and of taking an answer.

uvicorn closes an idle connection after an answer, and none on which a client has never sent a whole
head, or has sent half of the next one. Thousands of those would take all file descriptors. So would
clients that do not take their answers: a connection with bytes to send stays open until they have
left, also after it was closed.
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Any

import h11
from fastapi.responses import JSONResponse
from uvicorn.protocols.http.h11_impl import H11Protocol

from hipa_deploy.serve.process.doorkeeper import Doorkeeper
from hipa_deploy.serve.settings import ANSWER_SECONDS, HEAD_SECONDS
from hipa_deploy.serve.web.api_errors import error_response
from hipa_deploy.serve.web.guard import GIVE_UP, PLACE


class PunctualProtocol(H11Protocol):
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
        self._late: asyncio.TimerHandle | None = None
        self._next_look: asyncio.TimerHandle | None = None
        self._left = 0  # bytes that the client had not taken at the last look
        self._unwanted = 0  # bytes of a refused request's body that are still to come
        self._place: object | None = None  # of the latest request, in the doorkeeper's arrivals

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first head."""
        super().connection_made(transport)
        self._watch()
        self._next_look = self.loop.call_later(ANSWER_SECONDS, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        self._stop_watching()
        if self._next_look is not None:
            self._next_look.cancel()
        if self.scope is not None:
            # Otherwise the scope and this protocol would hold each other.
            self.scope.pop(GIVE_UP, None)  # type: ignore[misc,typeddict-item]
        self._leave()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        """Let the application drop the connection, for requests that came behind others too."""
        super().handle_events()
        if self.scope is not None:
            # ASGI lets servers add keys of their own; uvicorn's type knows the standard's alone.
            self.scope[GIVE_UP] = self._give_up  # type: ignore[literal-required]

    def on_response_complete(self) -> None:
        """Wait no longer than for any head where a part of the next request has come already."""
        super().on_response_complete()
        answered = self.cycle is None or self.cycle.response_complete
        begun = self.conn.their_state is not h11.IDLE or bool(self.conn.trailing_data[0])
        if answered and begun and not self.transport.is_closing():
            self._watch()

    def resume_writing(self) -> None:
        """Note that the client has taken a part of its answer."""
        self._left = 0
        super().resume_writing()

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
        super().data_received(data)
        # None where the request is no HTTP after all.
        if place is not None and self.scope is not None:
            self.scope[PLACE] = place  # type: ignore[literal-required]
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_watching()
        else:
            self._watch()

    def _is_idle(self) -> bool:
        """Whether the next byte begins a request, and the client has taken all answers."""
        answered = self.cycle is None or self.cycle.response_complete
        return (
            answered
            and self.conn.our_state is h11.IDLE
            and not self.conn.trailing_data[0]
            and not self.transport.is_closing()
            and not self.transport.get_write_buffer_size()
        )

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

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP in the form of the API's other errors."""
        self._refuse_head(error_response(400, "The request is no valid HTTP.", "invalid_http"))

    def _refuse_head(self, response: JSONResponse) -> None:
        """Answer what never became a request, and close the connection."""
        status = HTTPStatus(response.status_code)
        headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
        for event in (
            h11.Response(status_code=status, headers=headers, reason=status.phrase.encode()),
            h11.Data(data=bytes(response.body)),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event))
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
        if self.cycle is not None:
            # Before the loop says so: an application that ends now is no error.
            self.cycle.disconnected = True
        self.transport.abort()

    def _close_late(self) -> None:
        self._late = None
        busy = self.cycle is not None and not self.cycle.response_complete
        if busy or self.transport.is_closing():
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
        waits = self.conn.our_state is h11.IDLE and self.conn.their_state is h11.IDLE
        if not waits or not self.conn.trailing_data[0]:
            return False
        words = "The head of the request did not arrive in time."
        self._refuse_head(error_response(408, words, "request_timeout"))
        return True


def protocol_with(doorkeeper: Doorkeeper) -> type[PunctualProtocol]:
    """The protocol of a server with this doorkeeper; uvicorn makes one for each connection."""
    return type("DoorkeptProtocol", (PunctualProtocol,), {"doorkeeper": doorkeeper})

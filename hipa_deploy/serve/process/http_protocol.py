"""uvicorn's HTTP protocol with a limit on the time that the head of a request may take.

uvicorn closes an idle connection after an answer, and none on which a client has never sent a whole
head, or has sent half of the next one. Thousands of those would take all file descriptors.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from hipa_deploy.serve.process.doorkeeper import Doorkeeper
from hipa_deploy.serve.settings import HEAD_SECONDS
from hipa_deploy.serve.web.api_errors import error_response
from hipa_deploy.serve.web.guard import PLACE


class PunctualProtocol(H11Protocol):
    """Closes a connection whose next request's head is not complete after ``HEAD_SECONDS``.

    A class of ``protocol_with`` also asks a doorkeeper before it parses a request.
    """

    doorkeeper: Doorkeeper | None = None

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._late: asyncio.TimerHandle | None = None
        self._unwanted = 0  # bytes of a refused request's body that are still to come
        self._place: object | None = None  # of the latest request, in the doorkeeper's arrivals

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first head."""
        super().connection_made(transport)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        self._stop_watching()
        self._leave()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Stop waiting where the head is complete; begin where a part of the next one has come."""
        if self._unwanted:
            thrown_away = min(self._unwanted, len(data))
            self._unwanted -= thrown_away
            data = data[thrown_away:]
            if not data:
                return
        place = None
        if self._is_idle():
            if self._is_refused(data):
                return
            place = self._place
        super().data_received(data)
        # None where the request is no HTTP after all.
        if place is not None and self.scope is not None:
            # ASGI lets servers add keys of their own; uvicorn's type knows the standard's alone.
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
        self._watch()
        return True

    def _leave(self) -> None:
        """Whatever became of the latest request, it is not on its way any more."""
        if self.doorkeeper is not None and self._place is not None:
            self.doorkeeper.arrivals.leave(self._place)
            self._place = None

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP in the form of the API's other errors."""
        response = error_response(400, "The request is no valid HTTP.", "invalid_http")
        headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
        for event in (
            h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
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

    def _close_late(self) -> None:
        self._late = None
        busy = self.cycle is not None and not self.cycle.response_complete
        if not busy and not self.transport.is_closing():
            self.transport.close()


def protocol_with(doorkeeper: Doorkeeper) -> type[PunctualProtocol]:
    """The protocol of a server with this doorkeeper; uvicorn makes one for each connection."""
    return type("DoorkeptProtocol", (PunctualProtocol,), {"doorkeeper": doorkeeper})

"""uvicorn's HTTP protocol with a limit on the time that the head of a request may take.

uvicorn closes an idle connection after an answer, and none on which a client has never sent a whole
head, or has sent half of the next one. Thousands of those would take all file descriptors.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from hipa_deploy.serve.settings import HEAD_SECONDS
from hipa_deploy.serve.web.api_errors import error_response


class PunctualProtocol(H11Protocol):
    """Closes a connection whose next request's head is not complete after ``HEAD_SECONDS``."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first head."""
        super().connection_made(transport)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        self._stop_watching()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Stop waiting where the head is complete; begin where a part of the next one has come."""
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_watching()
        else:
            self._watch()

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

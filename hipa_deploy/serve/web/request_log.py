"""One JSON line an event on the standard error, without what users wrote."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
import uuid
import warnings
from datetime import datetime, timezone
from typing import Any, TextIO

from hipa_deploy.errors import HipaWarning
from hipa_deploy.serve.serve_metrics import ServeMetrics
from hipa_deploy.serve.web.api_errors import ApiError
from hipa_deploy.serve.web.guard import GIVE_UP, App, Message, Receive, Scope, Send

LOG = logging.getLogger("hipa.serve")
_LATER = 0.004  # seconds; by then the client's next request is usually read, and its image begun


class JsonLines(logging.Formatter):
    """A record of Python's logging as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(
                timespec="milliseconds"
            ),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        line |= getattr(record, "facts", {})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        # ASCII alone: no character of a user can move the cursor of a terminal.
        return json.dumps(line)


def set_up_logs() -> None:
    """Send what this program, uvicorn and Python's warnings say through ``JsonLines``."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    warnings.showwarning = _log_warning
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    LOG.setLevel(logging.INFO)
    # It writes what a broken form holds.
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)


def _log_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Write a warning as an event: ours in their own words, a library's with its place."""
    facts = {} if issubclass(category, HipaWarning) else {"warning": category.__name__}
    if facts:
        facts["place"] = f"{filename}:{lineno}"
    log(str(message), logging.WARNING, **facts)


def log(event: str, level: int = logging.INFO, **facts: Any) -> None:
    """Write one event."""
    LOG.log(level, event, extra={"facts": facts})


class RequestLog:
    """Counts and logs every request; the outermost layer.

    Its line is written ``_LATER`` seconds after the answer, or when the event loop ends, and has
    that time: writing takes a tenth of a millisecond, for which the client's next request would
    wait.

    Args:
        app: the guard and the application.
        metrics: where requests are counted.

    """

    def __init__(self, app: App, metrics: ServeMetrics) -> None:
        self._app = app
        self._metrics = metrics
        self._ended: list[dict[str, Any]] = []  # facts of requests whose lines are not written
        self._writer: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on; say afterwards what became of it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        number = uuid.uuid4().hex
        scope["facts"] = {}
        status = 0
        cancelled = False

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message["headers"], (b"x-request-id", number.encode())]
                headers.append((b"x-content-type-options", b"nosniff"))
                message = {**message, "headers": headers}
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except asyncio.CancelledError:
            cancelled = True
            if GIVE_UP not in scope:
                raise  # another server's: it may have its own reason, and waits for this
            # Ours ends without waiting any longer: at a second Ctrl-C, or after its limit.
            stopping = ApiError(503, "The service is stopping.", "stopping")
            scope["error"] = stopping.code
            if not status:
                await stopping.response()(scope, receive, watched)
            else:
                scope[GIVE_UP]()
        finally:
            seconds = time.perf_counter() - started
            # The route as this program writes it, never the path as it was asked for.
            route = getattr(scope.get("route"), "path", "none")
            self._metrics.requests.labels(route, str(status)).inc()
            self._metrics.request_seconds.labels(route).observe(seconds)
            error = scope.get("error")
            if error:
                self._metrics.refusals.labels(error).inc()
            quiet = route.startswith("/health") or route == "/metrics"
            if not quiet or status >= 400:
                facts = {"error": error, **scope["facts"]} if error else scope["facts"]
                line = {
                    "id": number,
                    "route": route,
                    "status": status,
                    "ms": round(seconds * 1000, 2),
                    **facts,
                }
                # The loop may be ending: what is begun now would not be waited for.
                if cancelled:
                    log("request", **line)
                else:
                    self._write_later(line)

    def _write_later(self, facts: dict[str, Any]) -> None:
        self._ended.append(facts)
        loop = asyncio.get_running_loop()
        writer = self._writer
        if writer is None or writer.done() or writer.get_loop() is not loop:
            # A task and no timer: when a loop ends, its tasks are cancelled and still run.
            self._writer = loop.create_task(self._write())

    async def _write(self) -> None:
        try:
            await asyncio.sleep(_LATER)
        finally:
            ended = self._ended
            self._ended = []
            for facts in ended:
                log("request", **facts)

"""The guard before the application: which requests come in at all, and how much of them is read.

It is ASGI itself, because nothing of a request may be parsed before it was let in.
"""

from __future__ import annotations

import ipaddress
import re
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from hipa_deploy.errors import HipaError, brief
from hipa_deploy.serve.arrivals import Arrivals
from hipa_deploy.serve.settings import (
    ANSWER_SECONDS,
    BODY_RATE,
    BODY_SECONDS,
    JSON_BODY,
    UPLOAD_WAIT,
)
from hipa_deploy.serve.time_limit import LateError, TimeLimit
from hipa_deploy.serve.web.api_errors import (
    ApiError,
    headers_too_large,
    queue_full,
    too_many_uploads,
)
from hipa_deploy.serve.web.api_keys import ApiKeys

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

ANY = "*"  # of hosts: every name, for a service behind a proxy that checks names itself
OPEN_PATHS = ("/health/live", "/health/ready")
PLACE = "hipa.place"  # in a scope: the request's place in ``Arrivals``, where it has one already
GIVE_UP = "hipa.give_up"  # in a scope: drops the connection, where the server can
_DRAINED = 256 * 1024 * 1024  # bytes of a refused body that are read and thrown away
_DRAIN_SECONDS = 10.0
_MOST_HEADERS = 32 * 1024  # bytes
_HOST = re.compile(r"[a-z0-9_]([a-z0-9._-]*[a-z0-9_])?\.?", re.ASCII | re.IGNORECASE)
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[a-z0-9._:\[\]-]+/?", re.ASCII | re.IGNORECASE)
_USUAL_PORTS = {"http": ":80", "https": ":443"}  # that browsers leave out of an Origin


class Guard:
    """Refuse what must not come in, and limit what does.

    - The Host header must be a number, 'localhost' or a name that the owner gave: otherwise a page
      of another site could reach a service on this machine by DNS rebinding.
    - A request that a browser sends from a page of another site is refused. The service's own page
      is known by its Origin, which is the Host header with a scheme. Under a name that the owner
      gave the scheme may be https, because a proxy may add TLS.
    - With keys, every request but the health checks and the page's own files needs one.
    - Where no image can wait any more, a request for images is refused before it is parsed: in a
      flood that leaves the processor to those that were accepted. Requests that came in, and have
      no place in the queue yet, count as if they had one.
    - A body may have so many bytes, and so many seconds to arrive: more, the more has come.
    - So many bodies may be on their way at once: what has come of each takes memory or disk space.
    - A client has so many seconds to take a part of its answer.

    Args:
        app: the application.
        hosts: names that a Host header may have, beside numbers and localhost; ``ANY`` is all.
        origins: of other sites whose pages may send requests.
        keys: one of them is needed; none: no key is.
        open_paths: need no key, beside the health checks.
        body: bytes that a request with images may have.
        arrivals: where requests on their way to the queue are counted; None counts them, and
            refuses none.
        uploads: bodies that may be on their way at once, of those that do not come with their
            head; None is any number.

    """

    def __init__(
        self,
        app: App,
        *,
        hosts: Iterable[str] = (),
        origins: Iterable[str] = (),
        keys: Sequence[str] = (),
        open_paths: Iterable[str] = (),
        body: int,
        arrivals: Arrivals | None = None,
        uploads: int | None = None,
    ) -> None:
        self._app = app
        self._hosts = {"localhost", *(host.lower() for host in hosts)}
        self._origins = {as_sent(origin) for origin in origins}
        self._keys = ApiKeys(keys)
        self._open_paths = {*OPEN_PATHS, *open_paths}
        self._body = body
        self._arrivals = arrivals or Arrivals()

        def refused_for(coming: int) -> int | None:
            return None if uploads is None or coming < uploads else UPLOAD_WAIT

        self._uploads = Arrivals(refused_for)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or answer it here."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        send = _patient(scope, send)
        headers = Headers(scope)
        body = _Body(receive, min(self._body, JSON_BODY))
        try:
            await self._let_in(scope, headers, body)
        except ApiError as error:
            self._arrivals.leave(scope.get(PLACE))
            scope["error"] = error.code
            await _refuse(error, scope, body, send)
            return
        place = scope.get(PLACE)
        upload: object | None = None
        if place is None and scope["method"] == "POST":
            # Only what has arrived whole counts there: a client that sends slowly keeps nobody out.
            if body.complete:
                place = self._arrivals.enter()
            else:
                upload = self._uploads.enter()

        def leave() -> None:
            self._arrivals.leave(place)
            self._uploads.leave(upload)

        scope["queued"] = leave
        try:
            await self._app(scope, body.receive, send)
        finally:
            leave()

    async def _let_in(self, scope: Scope, headers: Headers, body: _Body) -> None:
        """Check all that can be checked before the application.

        Raises:
            ApiError: the request must not come in.

        """
        headers.check_size()
        self._check_host(scope, headers)
        self._check_origin(scope, headers)
        self._check_key(scope, headers)
        if self._is_form(headers):
            body.most = self._body
        body.check_length(headers)
        if scope["method"] != "POST":
            return
        if PLACE in scope:
            await body.begin()
            return
        self._check_place()
        await body.begin()
        # Others have come while this one was read.
        self._check_place()
        seconds = self._uploads.refused_for()
        if seconds is not None and not body.complete:
            raise too_many_uploads(seconds)

    def _check_host(self, scope: Scope, headers: Headers) -> None:
        host = headers.one("host")
        # Load balancers ask for the health in HTTP/1.0, which needs no Host (HAProxy's httpchk).
        # The check is against pages under a false name, and every browser sends one.
        if host is None and _own_path(scope) in OPEN_PATHS:
            return
        name = _host_name(host) if host is not None else None
        known = name is not None and (name in self._hosts or _is_number(name))
        if known or ANY in self._hosts:
            return
        raise ApiError(
            421,
            "This service is not known under that Host name. Its owner can allow one with "
            "--allow-host.",
            "unknown_host",
        )

    def _check_origin(self, scope: Scope, headers: Headers) -> None:
        """Refuse what a page of another site sends. Programs send no Origin at all."""
        origin = headers.one("origin")
        if origin is not None:
            own = self._own_origins(scope["scheme"], headers.one("host"))
            if origin.lower() in own | self._origins:
                return
        elif headers.one("sec-fetch-site") in (None, "same-origin", "none"):
            return
        elif scope["method"] == "GET" and headers.one("sec-fetch-mode") == "navigate":
            return  # a link on another site: its page does not see what comes
        raise ApiError(
            403,
            "Pages of other sites may not use this service. Its owner can allow one with "
            "--allow-origin.",
            "forbidden_origin",
        )

    def _own_origins(self, scheme: str, host: str | None) -> set[str]:
        """What a browser sends as Origin from a page that this service sent under a Host header."""
        if host is None:
            return set()
        origins = {f"{scheme}://{host}".lower()}
        if self._may_have_tls(_host_name(host) or ""):
            origins.add(f"https://{host}".lower())
        return origins

    def _may_have_tls(self, name: str) -> bool:
        """Whether the owner gave a name, so that what answers https under it is the owner's proxy.

        https://localhost can be another program of this machine, whose pages a browser lets send
        requests to http://localhost. The same holds for numbers.
        """
        if _is_localhost(name) or _is_number(name):
            return False
        return name in self._hosts or ANY in self._hosts

    def _check_key(self, scope: Scope, headers: Headers) -> None:
        # A browser asks without a key what it may ask with one.
        is_open = _own_path(scope) in self._open_paths or scope["method"] == "OPTIONS"
        if is_open:
            return
        if not self._keys.fit(headers.one("authorization") or ""):
            raise ApiError(
                401,
                "Incorrect API key provided. Send it as: Authorization: Bearer KEY",
                "invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )

    def _check_place(self) -> None:
        seconds = self._arrivals.refused_for()
        if seconds is not None:
            raise queue_full(seconds)

    def _is_form(self, headers: Headers) -> bool:
        kind = headers.one("content-type") or ""
        return kind.lower().startswith("multipart/form-data")


class Headers:
    """The headers of a request."""

    def __init__(self, scope: Scope) -> None:
        self._all: list[tuple[bytes, bytes]] = scope["headers"]

    def check_size(self) -> None:
        """Refuse headers that no client needs.

        Raises:
            ApiError: they are too large.

        """
        if sum(len(key) + len(value) for key, value in self._all) > _MOST_HEADERS:
            raise headers_too_large()

    def one(self, name: str) -> str | None:
        """A header that stands there once.

        Raises:
            ApiError: it stands there twice, so that two readers would read two things.

        """
        wanted = name.encode()
        found = [value for key, value in self._all if key == wanted]
        if len(found) > 1:
            raise ApiError(400, f"The header {name} is there twice.", "invalid_header")
        return found[0].decode("latin-1") if found else None


class _Body:
    """The body of a request, counted and timed while it arrives."""

    def __init__(self, receive: Receive, most: int) -> None:
        self._receive = receive
        self.most = most
        self._began = time.monotonic()
        self._got = 0
        self._first: Message | None = None
        self.complete = False

    def check_length(self, headers: Headers) -> None:
        """Refuse a body whose length is known to be too much, before it is sent."""
        length = headers.one("content-length")
        # The server has checked that it is a number.
        if length is not None and int(length) > self.most:
            raise self._too_large()

    async def begin(self) -> None:
        """Read the first part, which ``receive`` gives again."""
        self._first = await self.receive()

    async def receive(self) -> Message:
        """The next part; after the last one, whatever comes."""
        if self._first is not None:
            first = self._first
            self._first = None
            return first
        if self.complete:
            return await self._receive()
        seconds = BODY_SECONDS + self._got / BODY_RATE
        try:
            with TimeLimit(self._began + seconds - time.monotonic()):
                message = await self._receive()
        except LateError:
            self.complete = True  # nobody waits for the rest
            raise ApiError(
                408,
                f"The request was not complete after {seconds:.0f} seconds.",
                "request_timeout",
                headers={"connection": "close"},
            ) from None
        if message["type"] == "http.request":
            self._got += len(message.get("body", b""))
            self.complete = not message.get("more_body", False)
            if self._got > self.most:
                await self.drain()
                raise self._too_large()
        return message

    async def drain(self) -> None:
        """Read what is still on its way and throw it away."""
        if not self.complete:
            self.complete = True
            await _drain(self._receive)

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"The request is too large. Expected at most {self.most} bytes.",
            "request_too_large",
            headers={"connection": "close"},
        )


async def _refuse(error: ApiError, scope: Scope, body: _Body, send: Send) -> None:
    """Answer with an error, and read a body that is on its way, so that the client sees why.

    A client that is still sending when the connection closes gets a reset in place of the answer.
    """
    response = error.response()
    response.headers["connection"] = "close"
    await send(
        {
            "type": "http.response.start",
            "status": response.status_code,
            "headers": response.raw_headers,
        }
    )
    await send({"type": "http.response.body", "body": response.body, "more_body": True})
    expects = any(name == b"expect" for name, _ in scope["headers"])
    if not expects:
        await body.drain()
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _drain(receive: Receive) -> None:
    until = time.monotonic() + _DRAIN_SECONDS
    drained = 0
    while drained < _DRAINED:
        try:
            with TimeLimit(until - time.monotonic()):
                message = await receive()
        except LateError:
            return
        drained += len(message.get("body", b""))
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            return


def _patient(scope: Scope, send: Send) -> Send:
    """``send`` that gives up when a client does not take its answer.

    The connection is dropped then: closed in the usual way, it would wait for its client.
    """
    gave_up = False

    async def limited(message: Message) -> None:
        nonlocal gave_up
        if gave_up:
            return
        try:
            with TimeLimit(ANSWER_SECONDS):
                await send(message)
        except LateError:
            gave_up = True
            if GIVE_UP in scope:
                scope[GIVE_UP]()

    return limited


def check_names(hosts: Iterable[str], origins: Iterable[str]) -> None:
    """Check the names that the owner of a service gave: one that no request has lets nobody in.

    Args:
        hosts: as ``Guard`` takes them.
        origins: as ``Guard`` takes them.

    Raises:
        HipaError: a host with a scheme, a port or a path; an origin without a scheme, with a path,
            or '*'.

    """
    for host in hosts:
        if host != ANY and not _HOST.fullmatch(host) and not _is_number(host.strip("[]")):
            raise HipaError(
                f"--allow-host is {brief(host)}. Expected a name alone, without http:// and "
                "without a port, such as gpu-box; or '*' for all names."
            )
    for origin in origins:
        if origin == ANY:
            raise HipaError(
                "--allow-origin is '*'. Then each page that a user of this service opens could use "
                "it. Name each site, such as https://example.org."
            )
        if origin != "null" and not _ORIGIN.fullmatch(origin):
            raise HipaError(
                f"--allow-origin is {brief(origin)}. Expected a scheme and a host, with a port "
                "where the site has one, and no path: https://example.org, http://localhost:3000."
            )


def as_sent(origin: str) -> str:
    """An origin that the owner gave, as browsers send it.

    It is in small letters, and has neither a slash at its end nor the usual port of its scheme.
    """
    origin = origin.lower().rstrip("/")
    scheme = origin.partition("://")[0]
    return origin.removesuffix(_USUAL_PORTS.get(scheme, "/"))


def _own_path(scope: Scope) -> str:
    """The path within this application: it may be a part of another one, under a prefix."""
    path: str = scope["path"]
    prefix = scope.get("root_path", "").rstrip("/")
    if path.startswith(f"{prefix}/"):
        return path[len(prefix) :]
    return path


def _host_name(host: str) -> str | None:
    """The name in a Host header, without the port; None if it cannot be read."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def _is_localhost(name: str) -> bool:
    """Whether browsers take a host for their own machine without asking a name server."""
    name = name.rstrip(".")
    return name == "localhost" or name.endswith(".localhost")


def _is_number(name: str) -> bool:
    """Whether a host is an IP address: no name server can send a browser elsewhere with it."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True

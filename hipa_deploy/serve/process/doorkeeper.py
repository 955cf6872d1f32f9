"""Refuses requests for images before they are parsed, where no image can wait.

In a flood most requests are refused, and what a refusal costs is missing to those that were
accepted: the log, the guard and the framework take several times as long as the answer itself. So
a whole connection is read as bytes here, and only requests of a plain form are answered. All others
take the usual way, on which the guard refuses them.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from hipa_deploy.serve.arrivals import Arrivals
from hipa_deploy.serve.serve_metrics import ServeMetrics
from hipa_deploy.serve.web.api_errors import queue_full
from hipa_deploy.serve.web.api_keys import ApiKeys
from hipa_deploy.serve.web.request_log import log

# The strict grammar of RFC 9112, so that no other parser on the way sees another request in the
# same bytes: names without blanks, no folded lines, no lone line feed.
_HEAD = re.compile(
    rb"POST (/[!-~]*) HTTP/1\.1\r\n"
    rb"((?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[^\r\n\0]*\r\n)+)"
    rb"\r\n"
)
# The headers that say how long a request is, who sends it, and what happens to the connection.
_DECISIVE = re.compile(
    rb"^(content-length|transfer-encoding|connection|expect|upgrade|authorization|origin):"
    rb"[ \t]*([^\r]*?)[ \t]*\r$",
    re.IGNORECASE | re.MULTILINE,
)
_LENGTH = re.compile(rb"[0-9]{1,6}")
_SHORT = 64 * 1024  # bytes of a body; of a longer one the guard reads the rest
_LOG_SECONDS = 1.0


@dataclass(frozen=True)
class PlainRequest:
    """A request for images whose bytes can be read in one way only.

    Attributes:
        authorization: the header's value; empty without it.
        origin: the same.
        missing: bytes of the body that have not come yet.

    """

    authorization: bytes
    origin: bytes
    missing: int


def plain_request(data: bytes, paths: frozenset[bytes]) -> PlainRequest | None:
    """Read the bytes that begin a request; None where the usual parser has to.

    Args:
        data: what came on a connection that has answered everything else.
        paths: of the requests for images.

    """
    head = _HEAD.match(data)
    if head is None or head[1] not in paths:
        return None
    decisive: dict[bytes, bytes] = {}
    for name, value in _DECISIVE.findall(head[2]):
        if name.lower() in decisive:
            return None
        decisive[name.lower()] = value
    authorization = decisive.pop(b"authorization", b"")
    origin = decisive.pop(b"origin", b"")
    length = decisive.pop(b"content-length", b"")
    keeps = decisive.pop(b"connection", b"keep-alive").lower() == b"keep-alive"
    if decisive or not keeps or not _LENGTH.fullmatch(length) or int(length) > _SHORT:
        return None
    missing = int(length) - (len(data) - head.end())
    # A next request behind this one is the usual parser's too.
    return PlainRequest(authorization, origin, missing) if missing >= 0 else None


class Doorkeeper:
    """Decides about the plain requests for images.

    With API keys, a request without one takes the usual way and is answered with 401: it neither
    learns that the queue is full nor takes a place of those that have a key. Where pages of other
    sites are allowed, what a page sends takes the usual way too: its browser hands it a refusal
    with the right headers only.

    Args:
        arrivals: the guard's.
        metrics: where refusals are counted.
        paths: of the requests for images.
        keys: the guard's.
        origins: the guard's.

    """

    def __init__(
        self,
        arrivals: Arrivals,
        metrics: ServeMetrics,
        paths: Sequence[str],
        keys: Sequence[str] = (),
        origins: Sequence[str] = (),
    ) -> None:
        self.arrivals = arrivals
        self._paths = frozenset(path.encode() for path in paths)
        self._keys = ApiKeys(keys)
        self._has_origins = bool(origins)
        self._count = metrics.refused_unread
        self._unlogged = 0

    def read(self, data: bytes) -> PlainRequest | None:
        """A plain request of somebody who may send one; None for the usual way."""
        request = plain_request(data, self._paths)
        if request is None or not self._keys.fit(request.authorization.decode("latin-1")):
            return None
        if request.origin and self._has_origins:
            return None
        return request

    def refusal(self, headers: Sequence[tuple[bytes, bytes]]) -> bytes | None:
        """The answer to a request that cannot come in; None for one that can.

        Args:
            headers: that every answer of the server has, such as the date.

        """
        seconds = self.arrivals.refused_for()
        if seconds is None:
            return None
        self._count()
        if not self._unlogged:
            asyncio.get_running_loop().call_later(_LOG_SECONDS, self.write_log)
        self._unlogged += 1
        return _answer(seconds, tuple(headers))

    def write_log(self) -> None:
        """Write how many were refused: a line for each would cost more than the refusals."""
        if self._unlogged:
            log("refused unread", status=429, error="rate_limit_exceeded", requests=self._unlogged)
        self._unlogged = 0


@lru_cache(maxsize=128)
def _answer(seconds: int, headers: tuple[tuple[bytes, bytes], ...]) -> bytes:
    """What the guard would answer, but for the number of the request and the closed connection."""
    return queue_full(seconds).as_bytes((*headers, (b"x-content-type-options", b"nosniff")))

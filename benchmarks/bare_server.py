"""The least that a server of images needs: what the service is measured beside.

asyncio reads a request, one thread makes the image and its PNG, asyncio writes the answer. Nothing
is checked, counted or logged, and nobody else is served meanwhile.
"""

from __future__ import annotations

import asyncio
import json
import queue
import sys
import threading
import time
from multiprocessing.connection import Connection
from typing import Any

from hipa_deploy import OneStepPipeline
from hipa_deploy.images.png import png_bytes

_SWITCH_SECONDS = 0.0005  # as in the service


class _BareServer:
    """Requests of one client, one after the other."""

    def __init__(self, pipe: OneStepPipeline) -> None:
        self._pipe = pipe
        self._requests: queue.SimpleQueue[tuple[bytes, asyncio.Transport]] = queue.SimpleQueue()

    async def serve(self, ready: Connection) -> None:
        """Listen, send the port, and answer until the process ends."""
        loop = asyncio.get_running_loop()
        thread = threading.Thread(target=self._answer_all, args=(loop,), daemon=True)
        thread.start()
        server = await loop.create_server(lambda: _Reader(self._requests), "127.0.0.1", 0)
        ready.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    def _answer_all(self, loop: asyncio.AbstractEventLoop) -> None:
        while True:
            request, transport = self._requests.get()
            loop.call_soon_threadsafe(transport.write, self._answer(request))

    def _answer(self, request: bytes) -> bytes:
        fields = json.loads(request.partition(b"\r\n\r\n")[2])
        begun = time.perf_counter()
        result = self._pipe(fields["prompt"], seed=fields["seed"])
        made = time.perf_counter()
        body = png_bytes(result.images_BHWC[0], result.parameters[0])
        encoded = time.perf_counter()
        timing = f"make;dur={(made - begun) * 1000}, encode;dur={(encoded - made) * 1000}"
        head = f"HTTP/1.1 200 OK\r\ncontent-length: {len(body)}\r\nserver-timing: {timing}\r\n\r\n"
        return head.encode() + body


class _Reader(asyncio.Protocol):
    """Takes what arrives at once for a whole request, as the benchmark's client sends it."""

    def __init__(self, requests: queue.SimpleQueue[tuple[bytes, Any]]) -> None:
        self._requests = requests

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._requests.put((data, self._transport))


def run_bare_server(ready: Connection, bundle: str, backend: str) -> None:
    """A process's function: load ``bundle``, warm up, and serve; sends its port when ready."""
    sys.setswitchinterval(_SWITCH_SECONDS)
    with OneStepPipeline.load(bundle, backend) as pipe:
        pipe.warmup(1)
        asyncio.run(_BareServer(pipe).serve(ready))

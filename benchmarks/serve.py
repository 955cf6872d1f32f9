"""Load on a running hipa-serve over loopback: its overhead, its throughput, its memory, a flood.

    python benchmarks/serve.py emoji
    python benchmarks/serve.py my-bundle --backend openvino --requests 10000 --json serve.json

Everything is measured in one run on one machine, the service beside the bare pipeline. The clients
run on the same cores as the service, so every figure has their work in it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import re
import select
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from bare_server import run_bare_server

from hipa_deploy import OneStepPipeline
from hipa_deploy.images.png import png_bytes

PROMPTS = [f"3d emoji of a {colour} apple" for colour in ("red", "green", "blue", "white")]
QUEUE = 64
CLIENTS = 32
FLOOD = 20  # times the queue
ROUNDS = 3  # of the flood
BLOCK = 25  # images of the service, then of the bare pipeline
COLD = 5  # of each block


def request_bytes(
    seed: int, path: str = "/hipa/generate", prompts: Sequence[str] = PROMPTS
) -> bytes:
    """A request for one image; its seed chooses the prompt."""
    body = json.dumps({"prompt": prompts[seed % len(prompts)], "seed": seed}).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Accept: image/png\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


class Client:
    """One connection that is kept.

    Args:
        url: of the server.
        prompts: what the requests ask for.

    """

    def __init__(self, url: str, prompts: Sequence[str] = PROMPTS) -> None:
        self._prompts = prompts
        address = urlsplit(url)
        self._address = (address.hostname, address.port)
        self._streams: Any = None

    async def ask(self, seed: int, path: str = "/hipa/generate") -> tuple[int, dict[str, str]]:
        """One image as bytes; the status and the headers."""
        if self._streams is None:
            self._streams = await asyncio.open_connection(*self._address)
        reader, writer = self._streams
        writer.write(request_bytes(seed, path, self._prompts))
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {}
        for line in head[1:]:
            name, _, value = line.partition(": ")
            headers[name.lower()] = value
        await reader.readexactly(int(headers["content-length"]))
        return int(head[0].split()[1]), headers

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()


def figures(milliseconds: list[float]) -> dict[str, float]:
    """Median and 99th percentile, of milliseconds."""
    return {
        "median_ms": round(statistics.median(milliseconds), 3),
        "p99_ms": round(p99(milliseconds), 3),
        "count": len(milliseconds),
    }


def p99(milliseconds: list[float]) -> float:
    """The 99th percentile."""
    ordered = sorted(milliseconds)
    return ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]


async def overhead(
    url: str, arguments: argparse.Namespace, pipe: OneStepPipeline
) -> dict[str, Any]:
    """Requests to the service, to a bare server, and bare calls in turn: all see the same machine.

    They change places every ``BLOCK`` images: after each change the caches hold the weights of
    another process, so the first images of a block do not count.
    """
    bare = []
    whole: dict[str, list[float]] = {"service": [], "bare_server": []}
    own: dict[str, list[float]] = {"service": [], "bare_server": []}
    cpu_bare = 0.0
    cpu_before = await cpu_seconds(url)
    with running(run_bare_server, arguments.bundle, arguments.backend) as port:
        clients = {"service": Client(url), "bare_server": Client(f"http://127.0.0.1:{port}")}
        for first in range(0, arguments.runs, BLOCK):
            for name, client in clients.items():
                for seed in range(first, first + BLOCK):
                    took, beside = await timed_request(client, seed)
                    if seed < first + COLD:
                        continue
                    whole[name].append(took)
                    own[name].append(beside)
            cpu_started = time.process_time()
            for seed in range(first, first + BLOCK):
                started = time.perf_counter()
                result = pipe(PROMPTS[seed % len(PROMPTS)], seed=seed)
                png_bytes(result.images_BHWC[0], result.parameters[0])
                took = (time.perf_counter() - started) * 1000
                if seed >= first + COLD:
                    bare.append(took)
            cpu_bare += time.process_time() - cpu_started
        for client in clients.values():
            client.close()
    cpu_service = await cpu_seconds(url) - cpu_before
    images = -(-arguments.runs // BLOCK) * BLOCK
    served = whole["service"]
    return {
        # Processor time does not grow where other programs make both wait for a core.
        "cpu_ms_a_request": round(cpu_service / images * 1000, 3),
        "cpu_ms_a_bare_image": round(cpu_bare / images * 1000, 3),
        "service": figures(served),
        "bare_server": figures(whole["bare_server"]),
        "bare_pipeline_and_png": figures(bare),
        "difference_of_medians_ms": round(statistics.median(served) - statistics.median(bare), 3),
        "difference_of_p99_ms": round(p99(served) - p99(bare), 3),
        "request_without_pipeline_and_png": figures(own["service"]),
        "the_same_of_a_bare_server": figures(own["bare_server"]),
    }


async def timed_request(client: Client, seed: int) -> tuple[float, float]:
    """Milliseconds of a request, in all and beside pipeline and PNG."""
    started = time.perf_counter()
    status, headers = await client.ask(seed)
    took = (time.perf_counter() - started) * 1000
    assert status == 200, headers
    times = re.findall(r"(make|encode);dur=([\d.]+)", headers["server-timing"])
    return took, took - sum(float(value) for _, value in times)


@contextmanager
def running(server: Any, *options: Any) -> Iterator[int]:
    """A server's function in a process of its own, and the port that it sends."""
    receiving, sending = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=server, args=(sending, *options))
    process.start()
    # This process's end: without it a server that fails would be waited for.
    sending.close()
    try:
        yield receiving.recv()
    finally:
        process.terminate()
        process.join()


async def cpu_seconds(url: str) -> float:
    """Processor time that the server has used."""
    found = re.search(r"^process_cpu_seconds_total (\S+)$", await metrics(url), re.MULTILINE)
    assert found
    return float(found[1])


async def load(url: str, clients: int, requests: int, first: int = 0) -> dict[str, Any]:
    """Requests from several clients, each of which asks again when it has its answer."""
    times: list[float] = []
    codes: Counter[int] = Counter()
    seeds = iter(range(first, first + requests))

    async def one() -> None:
        client = Client(url)
        for seed in seeds:
            started = time.perf_counter()
            status, _ = await client.ask(seed)
            codes[status] += 1
            if status == 200:
                times.append((time.perf_counter() - started) * 1000)
        client.close()

    started = time.perf_counter()
    await asyncio.gather(*[one() for _ in range(clients)])
    seconds = time.perf_counter() - started
    return {
        "clients": clients,
        "images_per_second": round(codes[200] / seconds, 2),
        "codes": dict(codes),
        **figures(times),
    }


class Crowd:
    """Many clients at once, each on a connection of its own, in one thread with little Python.

    asyncio's streams would take several times as much of the processor that the service shares.

    Args:
        port: of the service.
        elsewhere: the port that all but every ``FLOOD``-th client ask; None is the service's.

    """

    def __init__(self, port: int, elsewhere: int | None = None) -> None:
        self._ports = (port, port if elsewhere is None else elsewhere)
        self._poll = select.epoll()
        self._clients: dict[int, tuple[socket.socket, bytes, float]] = {}
        self._answers: dict[int, bytes] = {}

    def ask(self, clients: int) -> dict[str, Any]:
        """What became of so many requests: codes, and times of the accepted and the refused."""
        times: dict[int, list[float]] = {200: [], 429: []}
        cpu = time.process_time()
        for seed in range(clients):
            self._connect(self._ports[seed % FLOOD != 0], seed)
        while self._clients:
            for number, event in self._poll.poll(600):
                client, request, started = self._clients[number]
                if event & select.EPOLLOUT:
                    client.send(request)
                    self._poll.modify(number, select.EPOLLIN)
                    continue
                self._answers[number] += client.recv(1 << 20)
                status = self._status(number)
                if status:
                    times[status].append((time.perf_counter() - started) * 1000)
                    self._poll.unregister(number)
                    del self._clients[number]
                    client.close()
        codes = {code: len(taken) for code, taken in times.items()}
        report: dict[str, Any] = {"codes": codes, "accepted": figures(times[200])}
        if times[429]:
            report["refused"] = figures(times[429])
        return report | {"clients_cpu_ms": round((time.process_time() - cpu) * 1000)}

    def _connect(self, port: int, seed: int) -> None:
        client = socket.socket()
        client.setblocking(False)
        client.connect_ex(("127.0.0.1", port))
        self._poll.register(client, select.EPOLLOUT)
        self._clients[client.fileno()] = (client, request_bytes(seed), time.perf_counter())
        self._answers[client.fileno()] = b""

    def _status(self, number: int) -> int:
        """The status of an answer that has come whole, else 0."""
        head, end, body = self._answers[number].partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head)
        if not end or not length or len(body) < int(length[1]):
            return 0
        return int(head.split()[1])


class Refuser(asyncio.Protocol):
    """Answers a constant to whatever comes: what a crowd costs whoever is asked."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._transport.write(b"HTTP/1.1 429 Full\r\ncontent-length: 0\r\n\r\n")


def run_refuser(ready: Connection) -> None:
    """A server of ``Refuser``, which sends its port."""

    async def run() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(Refuser, "127.0.0.1", 0, backlog=2048)
        ready.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


async def flood(url: str) -> dict[str, Any]:
    """As many requests at once as the queue holds, and twenty times as many, in turn.

    The third crowd shows what the machine takes: as many clients as of the flood, of which all but
    a full queue ask a server that answers a constant.
    """
    port = urlsplit(url).port
    assert port is not None
    rounds: dict[str, list[dict[str, Any]]] = {"full_queue": [], "flood": [], "elsewhere": []}
    with running(run_refuser) as elsewhere:
        for _ in range(ROUNDS):
            for name, found in rounds.items():
                before = await cpu_seconds(url)
                crowd = Crowd(port, elsewhere if name == "elsewhere" else None)
                report = crowd.ask(QUEUE if name == "full_queue" else QUEUE * FLOOD)
                cpu = (await cpu_seconds(url) - before) * 1000
                found.append(report | {"service_cpu_ms": round(cpu)})
    against = {}
    for name in ("flood", "elsewhere"):
        ratios = []
        for crowded, alone in zip(rounds[name], rounds["full_queue"], strict=True):
            ratios.append(crowded["accepted"]["p99_ms"] / alone["accepted"]["p99_ms"])
        against[name] = round(statistics.median(ratios), 2)
    return {"p99_against_full_queue": against, **rounds}


async def memory(url: str, requests: int) -> dict[str, Any]:
    """Resident memory of the server every tenth of the requests."""
    sizes = []
    steps = 10
    for step in range(steps):
        await load(url, 8, requests // steps, first=step * requests // steps)
        found = re.search(
            r"^process_resident_memory_bytes (\S+)$", await metrics(url), re.MULTILINE
        )
        assert found
        sizes.append(round(float(found[1]) / 2**20, 1))
    return {"requests": requests, "resident_mib": sizes}


async def metrics(url: str) -> str:
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    writer.write(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    text = (await reader.read()).decode()
    writer.close()
    return text


async def measure(url: str, arguments: argparse.Namespace, pipe: OneStepPipeline) -> dict:
    found: dict[str, Any] = {"overhead": await overhead(url, arguments, pipe)}
    print(json.dumps(found), flush=True)
    alone = await load(url, 1, arguments.runs)
    together = await load(url, CLIENTS, max(arguments.runs, CLIENTS * 4))
    gain = together["images_per_second"] / alone["images_per_second"]
    found["throughput"] = {"one": alone, "many": together, "gain": round(gain, 2)}
    print(json.dumps(found["throughput"]), flush=True)
    found["flood"] = await flood(url)
    print(json.dumps(found["flood"]), flush=True)
    if arguments.requests:
        found["memory"] = await memory(url, arguments.requests)
        print(json.dumps(found["memory"]), flush=True)
    return found


def start(arguments: argparse.Namespace, log: Path) -> tuple[subprocess.Popen, dict[str, Any]]:
    """A server that is ready, and what it says of itself.

    Its log goes into a file: a pipe would make it wait for a reader among the clients.
    """
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [
                sys.executable, "-m", "hipa_deploy", "serve", arguments.bundle,
                "--backend", arguments.backend, "--port", "0", "--queue", str(QUEUE),
                "--wait", str(arguments.wait), "--time-limit", "600",
            ],
            stderr=file,
        )  # fmt: skip
    facts: dict[str, Any] = {}
    while "ready" not in facts:
        time.sleep(0.1)
        text = log.read_text(encoding="utf-8")
        if process.poll() is not None:
            sys.exit(text)
        for line in text.splitlines(keepends=True):
            if line.endswith("\n") and line.startswith("{"):
                event = json.loads(line)
                facts[event["event"]] = event
    return process, facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("bundle", help="a bundle for images from prompts")
    parser.add_argument("--backend", default="onnxruntime")
    parser.add_argument("--runs", type=int, default=200, help="requests of each measurement")
    parser.add_argument("--requests", type=int, default=0, help="of the memory's measurement")
    parser.add_argument("--wait", type=float, default=4.0, help="milliseconds, of hipa-serve")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    arguments = parser.parse_args()

    with (
        OneStepPipeline.load(arguments.bundle, arguments.backend) as pipe,
        tempfile.TemporaryDirectory() as folder,
    ):
        pipe.warmup(1)
        process, facts = start(arguments, Path(folder) / "log")
        try:
            found = asyncio.run(measure(facts["listening"]["url"], arguments, pipe))
        finally:
            process.terminate()
            process.wait()
    found |= {
        "bundle": arguments.bundle,
        "backend": arguments.backend,
        "batch_sizes": facts["ready"]["batch_sizes"],
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
        "exit_code": process.returncode,
    }
    text = json.dumps(found, indent=2)
    if arguments.json:
        arguments.json.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()

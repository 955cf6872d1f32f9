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
import os
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from hipa_deploy import OneStepPipeline
from hipa_deploy.images.png import png_bytes

PROMPTS = [f"3d emoji of a {colour} apple" for colour in ("red", "green", "blue", "white")]
QUEUE = 64
CLIENTS = 32
FLOOD = 20  # times the queue
BLOCK = 25  # images of the service, then of the bare pipeline
COLD = 5  # of each block


class Client:
    """One connection that is kept."""

    def __init__(self, url: str) -> None:
        address = urlsplit(url)
        self._address = (address.hostname, address.port)
        self._streams: Any = None

    async def ask(self, seed: int, path: str = "/hipa/generate") -> tuple[int, dict[str, str]]:
        """One image as bytes; the status and the headers."""
        if self._streams is None:
            self._streams = await asyncio.open_connection(*self._address)
        reader, writer = self._streams
        body = json.dumps({"prompt": PROMPTS[seed % len(PROMPTS)], "seed": seed}).encode()
        writer.write(
            f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Accept: image/png\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
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


async def overhead(url: str, pipe: OneStepPipeline, runs: int) -> dict[str, Any]:
    """Requests and bare calls in turn, so that both see the same machine.

    They change places every ``BLOCK`` images: after each change the caches hold the weights of the
    other process, so the first images of a block do not count.
    """
    client = Client(url)
    served, bare, own = [], [], []
    cpu_bare = 0.0
    cpu_before = await cpu_seconds(url)
    for first in range(0, runs, BLOCK):
        for seed in range(first, first + BLOCK):
            started = time.perf_counter()
            status, headers = await client.ask(seed)
            took = (time.perf_counter() - started) * 1000
            assert status == 200, headers
            if seed >= first + COLD:
                served.append(took)
                times = re.findall(r"(make|encode);dur=([\d.]+)", headers["server-timing"])
                own.append(took - sum(float(value) for _, value in times))
        cpu_started = time.process_time()
        for seed in range(first, first + BLOCK):
            started = time.perf_counter()
            result = pipe(PROMPTS[seed % len(PROMPTS)], seed=seed)
            png_bytes(result.images_BHWC[0], result.parameters[0])
            took = (time.perf_counter() - started) * 1000
            if seed >= first + COLD:
                bare.append(took)
        cpu_bare += time.process_time() - cpu_started
    client.close()
    cpu_service = await cpu_seconds(url) - cpu_before
    images = -(-runs // BLOCK) * BLOCK
    return {
        # Processor time does not grow where other programs make both wait for a core.
        "cpu_ms_a_request": round(cpu_service / images * 1000, 3),
        "cpu_ms_a_bare_image": round(cpu_bare / images * 1000, 3),
        "service": figures(served),
        "bare_pipeline_and_png": figures(bare),
        "difference_of_medians_ms": round(statistics.median(served) - statistics.median(bare), 3),
        "difference_of_p99_ms": round(p99(served) - p99(bare), 3),
        "request_without_pipeline_and_png": figures(own),
    }


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


async def flood(url: str) -> dict[str, Any]:
    """Twenty times as many requests at once as the queue holds; then as many as it holds."""
    crowd = await load(url, QUEUE * FLOOD, QUEUE * FLOOD)
    full = await load(url, QUEUE, QUEUE)
    return {"flood": crowd, "full_queue": full}


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
    found: dict[str, Any] = {"overhead": await overhead(url, pipe, arguments.runs)}
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


def start(arguments: argparse.Namespace) -> tuple[subprocess.Popen[str], dict[str, Any]]:
    """A server that is ready, and what it says of itself."""
    process = subprocess.Popen(
        [
            sys.executable, "-m", "hipa_deploy", "serve", arguments.bundle,
            "--backend", arguments.backend, "--port", "0", "--queue", str(QUEUE),
            "--wait", str(arguments.wait), "--time-limit", "600",
        ],
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )  # fmt: skip
    facts: dict[str, Any] = {}
    assert process.stderr is not None
    for line in process.stderr:
        try:
            event = json.loads(line)
        except ValueError:
            sys.exit(line)
        if event["event"] == "listening":
            facts["url"] = event["url"]
        if event["event"] == "ready":
            facts["ready"] = event
            break
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

    with OneStepPipeline.load(arguments.bundle, arguments.backend) as pipe:
        pipe.warmup(1)
        process, facts = start(arguments)
        try:
            # The log would fill the pipe, and a full pipe would stop the server.
            import threading

            threading.Thread(target=process.stderr.read, daemon=True).start()
            found = asyncio.run(measure(facts["url"], arguments, pipe))
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

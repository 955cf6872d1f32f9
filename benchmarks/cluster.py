"""Replicas on a local Ray cluster: throughput of one against two, and what a killed one costs.

    python benchmarks/cluster.py [BUNDLE] [--images 200] [--clients 16] [--pin] [--json FILE]

Every image is compared with the one that ``ImageService`` makes in this process, byte for byte. The
replica is killed with SIGKILL while 50 requests are under way. All processes share this machine's
cores, and a replica uses all of them: throughput grows with replicas only where one leaves cores
free. With --pin each replica has one core, so two replicas have twice the cores of one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from hipa_deploy.serve.cluster.cluster_service import ClusterService
from hipa_deploy.serve.cluster.cluster_settings import ClusterSettings
from hipa_deploy.serve.cluster.ray_replicas import join_ray, start_replicas
from hipa_deploy.serve.served import Models
from hipa_deploy.serve.service import ImageService, Order
from hipa_deploy.serve.settings import Limits

BACKEND = "onnxruntime"
LIMITS = Limits(queue=128, seconds=300)
IN_FLIGHT = 50
PROMPTS = ("3d emoji of a red apple", "flat emoji of a cat", "3d emoji of a blue house")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("bundle", nargs="?", default="emoji")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--pin", action="store_true", help="give each replica one core of its own")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    report = asyncio.run(
        measure(arguments.bundle, arguments.images, arguments.clients, arguments.pin)
    )
    print(json.dumps(report, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


async def measure(bundle: str, images: int, clients: int, pin: bool) -> dict[str, Any]:
    count = max(images, IN_FLIGHT)
    expected = await single_machine(bundle, count)
    report: dict[str, Any] = {"pinned": pin, "cores": os.cpu_count(), "load": os.getloadavg()[0]}
    join_ray("local")
    for replicas in (1, 2):
        started = time.perf_counter()
        service = await asyncio.to_thread(cluster, bundle, replicas)
        pids = await wait_for(service, replicas)
        if pin:
            give_cores(pids)
        start_s = time.perf_counter() - started
        begun = time.perf_counter()
        made = await run(service, bundle, count, clients)
        seconds = time.perf_counter() - begun
        report[f"{replicas}_replicas"] = {
            "start_s": round(start_s, 1),
            "images_per_s": round(count / seconds, 2),
            "equal_to_single_machine": made == expected,
        }
        print(json.dumps(report), flush=True)
    report["kill"] = await kill_one(service, bundle, expected[:IN_FLIGHT])
    await asyncio.to_thread(service.close)
    return report


def cluster(bundle: str, replicas: int) -> ClusterService:
    """A loaded service with so many replicas. One that runs keeps its replicas, and gets more."""
    settings = ClusterSettings(replicas, replicas)
    service = ClusterService(
        Models([bundle]), LIMITS, lambda *given: start_replicas(*given, settings)
    )
    service.load(BACKEND)
    return service


async def wait_for(service: ClusterService, replicas: int) -> set[int]:
    """The processes of the replicas, once so many have answered."""
    (behind,) = service._replicas.values()
    pids: set[int] = set()
    deadline = time.monotonic() + 300
    while len(pids) < replicas and time.monotonic() < deadline:
        answers = await asyncio.gather(*(asyncio.to_thread(behind.facts) for _ in range(8)))
        pids |= {answer["pid"] for answer in answers}
    assert len(pids) == replicas, pids
    return pids


def give_cores(pids: set[int]) -> None:
    """One core for each process, all its threads included (Linux)."""
    for core, pid in enumerate(sorted(pids)):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            os.sched_setaffinity(int(thread.name), {core})


async def single_machine(bundle: str, count: int) -> list[bytes]:
    service = ImageService(Models([bundle]), LIMITS)
    service.load(BACKEND)
    made = await run(service, bundle, count, 1)
    service.close()
    return made


async def run(service: ImageService, bundle: str, count: int, clients: int) -> list[bytes]:
    """The images of seeds 0, 1, …, so many requests at once."""
    room = asyncio.Semaphore(clients)

    async def one(seed: int) -> bytes:
        async with room:
            return await deliver(service, bundle, seed)

    return await asyncio.gather(*(one(seed) for seed in range(count)))


async def deliver(service: ImageService, bundle: str, seed: int) -> bytes:
    (model,) = (model for model in service.models.by_name.values() if model.adaptor is None)
    order = Order(model=model, prompt=PROMPTS[seed % len(PROMPTS)], seeds=[seed])
    delivery = await service.deliver(order, asyncio.Event().wait)
    return delivery.files[0]


async def kill_one(service: ClusterService, bundle: str, expected: list[bytes]) -> dict[str, Any]:
    """Kill a replica while requests are under way; how many were answered, and how."""
    pids = await wait_for(service, 2)
    before = time.perf_counter()
    requests = []
    for seed in range(IN_FLIGHT):
        requests.append(asyncio.ensure_future(deliver(service, bundle, seed)))
    while sum(request.done() for request in requests) < 3:
        await asyncio.sleep(0.002)
    done = sum(request.done() for request in requests)
    os.kill(min(pids), signal.SIGKILL)
    made = await asyncio.gather(*requests, return_exceptions=True)
    return {
        "in_flight_at_kill": IN_FLIGHT - done,
        "answered": sum(isinstance(answer, bytes) for answer in made),
        "equal_to_single_machine": made == expected,
        "seconds": round(time.perf_counter() - before, 2),
    }


if __name__ == "__main__":
    main()

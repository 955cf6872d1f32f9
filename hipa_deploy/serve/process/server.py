"""The process: it listens at once, loads its bundles, and stops when it has answered everybody."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import ipaddress
import logging
import os
import socket
import sys
from collections.abc import Sequence

import uvicorn

from hipa_deploy.errors import HipaError
from hipa_deploy.serve.arrivals import Arrivals
from hipa_deploy.serve.process.doorkeeper import Doorkeeper
from hipa_deploy.serve.process.http_protocol import protocol_with
from hipa_deploy.serve.service import ImageService
from hipa_deploy.serve.settings import KEEP_SECONDS
from hipa_deploy.serve.web.request_log import log, set_up_logs
from hipa_deploy.serve.web.web_app import image_paths, web_app

_STOP_SECONDS = 5  # for the last answers to leave, on top of the time limit of a request
_SWITCH_SECONDS = 0.0005
# Objects, beyond those that have gone, after which Python looks for cycles among the new ones.
_COLLECT_AFTER = 10_000
_BACKLOG = 2048  # connections that the system keeps for us


def run_server(
    service: ImageService,
    backend: str,
    *,
    host: str,
    port: int,
    hosts: Sequence[str] = (),
    origins: Sequence[str] = (),
    keys: Sequence[str] = (),
    log_prompts: bool = False,
) -> None:
    """Listen, load the bundles, and answer until a signal or a bundle that does not load.

    Ctrl-C and SIGTERM let the requests end that were accepted; then the signal takes its usual
    effect.

    Args:
        service: not loaded yet.
        backend: that runs the bundles.
        host: name or address to listen at.
        port: 0 lets the system choose.
        hosts: as ``web_app`` takes them.
        origins: as ``web_app`` takes them.
        keys: as ``web_app`` takes them.
        log_prompts: write prompts to the log.

    Raises:
        HipaError: the address is not free, or a bundle does not load.

    """
    listening = _listen(host, port)
    set_up_logs()
    if not keys and not is_loopback(host):
        log(
            "everybody who reaches this address can use the service",
            logging.WARNING,
            host=host,
            remedy="give it --api-keys, or --host 127.0.0.1",
        )
    arrivals = Arrivals(service.full)
    app = web_app(
        service,
        hosts=hosts,
        origins=origins,
        keys=keys,
        log_prompts=log_prompts,
        arrivals=arrivals,
    )
    doorkeeper = Doorkeeper(arrivals, service.metrics, image_paths(), keys, origins)
    config = uvicorn.Config(
        app,
        http=protocol_with(doorkeeper),
        ws="none",
        loop="asyncio",
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
        backlog=_BACKLOG,
        timeout_keep_alive=KEEP_SECONDS,
        timeout_graceful_shutdown=round(service.limits.seconds) + _STOP_SECONDS,
    )
    _more_files()
    # A thread that waits for Python's lock gets it after this time. The usual 5 ms would be most of
    # what a request of a small model takes on top of its image.
    sys.setswitchinterval(_SWITCH_SECONDS)
    server = uvicorn.Server(config)
    try:
        asyncio.run(_run(server, listening, service, backend))
    finally:
        service.close()
        doorkeeper.write_log()
        log("stopped")


async def _run(
    server: uvicorn.Server, listening: socket.socket, service: ImageService, backend: str
) -> None:
    loading = asyncio.create_task(_load(server, service, backend))
    address, port = listening.getsockname()[:2]
    shown = f"[{address}]" if ":" in address else address
    log("listening", url=f"http://{shown}:{port}")
    await server.serve([listening])
    service.stopping = True
    # Loading goes on in a thread that cannot be interrupted; the error of one is the command's.
    await loading


async def _load(server: uvicorn.Server, service: ImageService, backend: str) -> None:
    """Load in a thread, so that /health/live answers meanwhile."""
    try:
        await asyncio.to_thread(service.load, backend)
    except BaseException:
        server.should_exit = True
        raise
    _collect_less()
    for served in service.models.served:
        if served.swap_problem:
            log(
                "adaptors are not served",
                logging.WARNING,
                bundle=served.name,
                adaptors=served.adaptors,
                reason=served.swap_problem,
            )
        if served.warm_up and served.pipe:
            log(
                "ready",
                bundle=served.name,
                backend=served.pipe.backend,
                load_s=round(served.pipe.load_seconds, 2),
                warm_up_s=round(served.warm_up.seconds, 2),
                batch_sizes=served.warm_up.sizes,
                sizes_that_change_an_image=served.warm_up.changing,
                sizes_that_save_no_time=served.warm_up.slow,
            )
        elif served.ready:
            # Replicas have loaded it, and measured in their own processes.
            log(
                "ready",
                bundle=served.name,
                backend=served.backend,
                batch_sizes=served.batch_sizes,
            )


def _collect_less() -> None:
    """Collect garbage seldom, and without what was loaded.

    A request leaves no cycles behind, but takes more than Python's usual 700 objects at a time. So
    every fifth one paid for a collection, every fiftieth for a large one (1.6 ms), and one in a
    thousand for a walk through everything that was loaded (26 ms; CPython 3.11, AMD EPYC).
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_COLLECT_AFTER, *gc.get_threshold()[1:])


def check_address(host: str, port: int) -> None:
    """Check that this process can listen at an address, and do not go on to.

    Args:
        host: name or address.
        port: 0 is any free one.

    Raises:
        HipaError: the address is not this machine's, or is taken.

    """
    _listen(host, port).close()


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        HipaError: the address is not this machine's, or is taken.

    """
    if not 0 <= port <= 65535:
        raise HipaError(f"--port is {port}. Expected 0 to 65535.")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        # asyncio sets TCP_NODELAY only where the protocol is named. Without it the body of an
        # answer waits 40 ms for the client's delayed acknowledgement of the head.
        listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            if os.name == "posix":
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind((host, port))
            listening.listen(_BACKLOG)
        except BaseException:
            listening.close()
            raise
        return listening
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise HipaError(
            f"cannot listen at {host}, port {port}: {reason}. Choose another --host or --port."
        ) from None


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a host."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _more_files() -> None:
    """Let this process have as many open connections as the system allows it."""
    if sys.platform == "win32":
        return
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

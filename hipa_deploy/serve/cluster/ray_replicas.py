"""Replicas as deployments of Ray Serve: one deployment a bundle."""

from __future__ import annotations

import asyncio
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hipa_deploy.bundle.manifest import Axis
from hipa_deploy.errors import HipaError
from hipa_deploy.interrupts import keeping_handlers
from hipa_deploy.marks.own_checker import check_checker_name
from hipa_deploy.serve.batcher import QueueFullError
from hipa_deploy.serve.cluster.carried_order import CarriedOrder, Refusal
from hipa_deploy.serve.cluster.cluster_service import ReplicaLostError, Replicas
from hipa_deploy.serve.cluster.cluster_settings import ClusterSettings
from hipa_deploy.serve.cluster.replica import Replica, fingerprint
from hipa_deploy.serve.served import Models, ServedBundle
from hipa_deploy.serve.service import Delivery, NotReadyError
from hipa_deploy.serve.settings import Limits

if TYPE_CHECKING:
    from ray.serve import Application
    from ray.serve.handle import DeploymentHandle

_HEALTH_SECONDS = 5.0  # between two health checks
_STOP_SECONDS = 5.0  # on top of the time limit of a request
_STARTS = 3  # that may fail before a bundle counts as broken
_HIPA_ERROR = re.compile(r"HipaError\S*: (?P<words>.+)|MissingDependencyError: (?P<missing>.+)")


def bundle_deployment(
    served: ServedBundle,
    backend: str,
    limits: Limits,
    settings: ClusterSettings,
    c2pa: Path | None = None,
    checker: str | None = None,
) -> Application:
    """The deployment of one bundle, to be run or to be bound into an application.

    Ray replaces the replicas one by one when an argument of theirs has changed. The fingerprint is
    one of them, so a bundle that was exported again under the same path is noticed.

    Args:
        served: the bundle.
        backend: not 'auto'.
        limits: of each replica.
        settings: how many replicas, and on what.
        c2pa: a file of key and certificates, under this path on every machine.
        checker: 'module:function' that sees every image; every machine must have the module.

    Raises:
        HipaError: a checker, and code is not allowed.

    """
    if checker is not None:
        # A replica does not ask again: it runs in another process.
        check_checker_name(checker)
    from ray import serve

    one = served.bundle.manifest.batch
    largest = served.bundle.axes.get("batch", Axis(min=one, opt=one, max=one)).max
    options: dict[str, Any] = {"num_replicas": settings.least}
    if settings.most > settings.least:
        options = {
            "autoscaling_config": {
                "min_replicas": settings.least,
                "initial_replicas": settings.least,
                "max_replicas": settings.most,
                "target_ongoing_requests": settings.waiting or 2 * (limits.batch or largest),
            }
        }
    deployment: Any = serve.deployment(
        Replica,
        name=f"hipa-{served.name}",
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus},
        # What a replica cannot take at once, and as much again before requests are refused.
        max_ongoing_requests=limits.queue,
        max_queued_requests=limits.queue,
        health_check_period_s=_HEALTH_SECONDS,
        graceful_shutdown_timeout_s=limits.seconds + _STOP_SECONDS,
        max_constructor_retry_count=_STARTS,
        **options,
    )
    root = str(served.bundle.root.resolve())
    known = fingerprint(served.bundle.root, served.adaptors)
    key = None if c2pa is None else str(c2pa.resolve())
    bound: Application = deployment.bind(served.name, root, known, backend, limits, key, checker)
    return bound


class RayReplicas:
    """The replicas of one bundle behind a handle of Ray Serve.

    Args:
        handle: of the deployment.
        app: the Serve application to delete at the end; None leaves it.

    """

    def __init__(self, handle: DeploymentHandle, app: str | None = None) -> None:
        self._handle = handle
        self._app = app

    async def deliver(self, order: CarriedOrder) -> Delivery | Refusal:
        """Let the replica with the shorter queue of two make an order."""
        from ray import exceptions
        from ray.serve.exceptions import (
            BackPressureError,
            DeploymentUnavailableError,
            ReplicaUnavailableError,
        )

        response = self._handle.deliver.remote(order)
        try:
            return await response
        except asyncio.CancelledError:
            response.cancel()
            raise
        except BackPressureError:
            raise QueueFullError(1) from None
        except DeploymentUnavailableError:
            raise NotReadyError from None
        except (
            exceptions.RayActorError,  # the process or its machine is gone, or out of reach
            exceptions.ObjectLostError,  # it had answered, and its machine went with the answer
            exceptions.OutOfMemoryError,
            exceptions.WorkerCrashedError,
            ReplicaUnavailableError,
        ) as error:
            raise ReplicaLostError(type(error).__name__) from error

    def facts(self) -> dict[str, Any]:
        """What a replica says of itself."""
        return self._handle.facts.remote().result()

    def close(self) -> None:
        """Delete the application: Ray waits for the requests that a replica has begun."""
        from ray import serve

        if self._app:
            serve.delete(self._app)


def join_ray(address: str) -> None:
    """Connect this process to a cluster.

    Args:
        address: 'local' starts one on this machine, which ends with this process; 'auto' joins the
            one that runs on this machine; or HOST:PORT of another one.

    Raises:
        HipaError: no cluster answers there.

    """
    import ray

    if address == "local":
        # Of a cluster that others started, its owner has decided.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        # What actors print would break the lines of JSON on the standard error.
        with keeping_handlers():
            ray.init(address=address, log_to_driver=False, configure_logging=False)
        _quieten("ray")
        _silence_raylets()
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no answer"
        raise HipaError(
            f"--ray {address}: {reason.rstrip('.')}. Start one with: ray start --head; or give "
            "--ray local."
        ) from None


def start_replicas(
    models: Models,
    backend: str,
    limits: Limits,
    settings: ClusterSettings,
    c2pa: Path | None = None,
    checker: str | None = None,
) -> Mapping[str, Replicas]:
    """Start the replicas of every bundle on the cluster that ``join_ray`` has joined.

    Args:
        models: what is served.
        backend: not 'auto'.
        limits: of each replica.
        settings: how many replicas, and on what.
        c2pa: as ``bundle_deployment`` takes it.
        checker: as ``bundle_deployment`` takes it.

    Returns:
        The replicas by the bundle's name, each with at least one that has made its first image.

    Raises:
        HipaError: a replica cannot be started; the message is the replica's own.

    """
    from ray import serve

    # This process answers HTTP itself.
    serve.start(proxy_location="Disabled")
    _quieten("ray.serve")
    started: dict[str, Replicas] = {}
    try:
        for served in models.served:
            app = f"hipa-{served.name}"
            deployment = bundle_deployment(served, backend, limits, settings, c2pa, checker)
            handle = serve.run(deployment, name=app, route_prefix=None)
            started[served.name] = RayReplicas(handle, app)
    except RuntimeError as error:
        for replicas in started.values():
            replicas.close()
        raise HipaError(f"Ray cannot start {served.name}: {reason_of(error)}") from None
    return started


def _quieten(name: str) -> None:
    """Let warnings of a library's logger go the way of all others, and drop the rest."""
    logger = logging.getLogger(name)
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.WARNING)


def keep_off_the_console(name: str) -> None:
    """Let a library's logger write to its own file alone: its errors reach us as exceptions."""
    logger = logging.getLogger(name)
    for handler in list(logger.handlers):
        if isinstance(handler, logging.StreamHandler):
            logger.removeHandler(handler)


def _silence_raylets() -> None:
    """Keep what raylets say, such as that a worker has died, off the standard output.

    ``log_to_driver`` is about the workers' own lines. For these Ray has no public switch: this is
    the one that its debugger uses.
    """
    from ray._private import worker

    worker._worker_logs_enabled = False


def reason_of(error: Exception) -> str:
    """What a replica or an actor said when it failed, in one line."""
    found = _HIPA_ERROR.findall(str(error))
    if found:
        return next(words for words in found[-1] if words).strip()
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{lines[-1].strip() if lines else 'no reason given'}. See the log of its replica."

"""The service as an application of Ray Serve, for ``serve run``, ``serve build`` and its config.

    serve run hipa_deploy.serve.cluster.application:application bundles=emoji replicas=2

HTTP then comes in through Ray's own proxies. A ``Door`` answers it, and hands orders to the
replicas of the bundle. Doors take no GPU.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from hipa_deploy.disk.reading import MIB
from hipa_deploy.extras import require
from hipa_deploy.marks.content_credentials import ContentSigner
from hipa_deploy.marks.own_checker import chosen_checker
from hipa_deploy.serve.cluster.cluster_service import ClusterService, Replicas
from hipa_deploy.serve.cluster.cluster_settings import ClusterSettings, replicas_from
from hipa_deploy.serve.cluster.ray_replicas import RayReplicas, bundle_deployment
from hipa_deploy.serve.served import Models, check_start
from hipa_deploy.serve.settings import Limits
from hipa_deploy.serve.web.api_keys import read_keys
from hipa_deploy.serve.web.guard import check_names
from hipa_deploy.serve.web.request_log import set_up_logs
from hipa_deploy.serve.web.web_app import web_app
from hipa_deploy.user_code import code_allowed


class Arguments(BaseModel):
    """What ``application`` takes: on the command line as KEY=VALUE, in a config file as ``args``.

    Attributes:
        bundles: 'PATH' or 'NAME=PATH' each; on the command line separated by commas. The folders
            must be under the same path on every machine.
        backend: that runs them; 'auto' is refused.
        replicas: of each bundle: 'N', or 'FEWEST:MOST' to follow the load.
        cpus: CPU cores of a replica.
        gpus: GPUs of a replica.
        scale_at: requests a replica above which another one is started.
        doors: processes that answer HTTP.
        door_cpus: CPU cores that are set aside for a door.
        keys_file: a file with API keys on every machine; the variable HIPA_API_KEYS works too.
        allow_host: names under which the service may be called.
        allow_origin: sites whose pages may use it.
        c2pa: a file of key and certificates on every machine, to sign the images with.
        checker: 'module:function' that sees every image; every machine must have the module.
        allow_code: whether the checker's module may be imported.
        batch: the most images of a batch.
        wait: milliseconds that a busy replica waits for company.
        queue: images that may wait at a replica.
        images: the most images of a request.
        time_limit: seconds.
        prompt_limit: the most characters of a prompt.
        body_limit: the most MiB of a request with images.
        pixel_limit: the most pixels of an uploaded image, in millions.
        steps_limit: the most steps of a refining.
        release: any text. ``serve deploy`` does nothing where a config says what it said before,
            also where another bundle lies under the same path since: another text makes it look.

    """

    model_config = ConfigDict(extra="forbid")

    bundles: list[str]
    backend: str = "onnxruntime"
    replicas: str = "1"
    cpus: float = 1.0
    gpus: float = 0.0
    scale_at: float | None = None
    doors: int = 1
    door_cpus: float = 0.0
    keys_file: str | None = None
    allow_host: list[str] = []
    allow_origin: list[str] = []
    c2pa: str | None = None
    checker: str | None = None
    allow_code: bool = False
    batch: int | None = None
    wait: float = 4.0
    queue: int = 64
    images: int = 10
    time_limit: float = 60.0
    prompt_limit: int = 4000
    body_limit: int = 32
    pixel_limit: int = 16
    steps_limit: int = 100
    release: str = ""

    @field_validator("bundles", "allow_host", "allow_origin", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return value.split(",") if isinstance(value, str) else value

    @field_validator("replicas", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) else value

    def limits(self) -> Limits:
        """The limits of each replica."""
        return Limits(
            queue=self.queue,
            images=self.images,
            seconds=self.time_limit,
            prompt=self.prompt_limit,
            body=self.body_limit * MIB,
            pixels=self.pixel_limit * 1_000_000,
            steps=self.steps_limit,
            wait=self.wait / 1000,
            batch=self.batch,
        )

    def settings(self) -> ClusterSettings:
        """How many replicas, and on what."""
        least, most = replicas_from(self.replicas)
        return ClusterSettings(least, most, self.cpus, self.gpus, self.scale_at)


_current: list[ASGIApp] = []  # of the door in this process


def _app_of_this_door() -> ASGIApp:
    """Called by Ray once ``Door`` was made."""
    return _current[0]


@serve.ingress(_app_of_this_door)
class Door:
    """Answers HTTP with the same routes and guards as ``hipa-serve``.

    Args:
        arguments: of the application.
        replicas: a handle to the replicas of each bundle, by its name.

    """

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self, arguments: Arguments, **replicas: DeploymentHandle
    ) -> None:
        set_up_logs()
        handles: dict[str, Replicas] = {}
        for number, served in enumerate(Models(arguments.bundles).served):
            handles[served.name] = RayReplicas(replicas[f"bundle_{number}"])
        service = ClusterService(
            Models(arguments.bundles),
            arguments.limits(),
            lambda *_: handles,
            None if arguments.c2pa is None else ContentSigner.read(Path(arguments.c2pa)),
        )
        # In a thread: it waits for the replicas, which nothing may do in Ray's event loop.
        await asyncio.to_thread(service.load, arguments.backend)
        keys = read_keys(Path(arguments.keys_file) if arguments.keys_file else None)
        app = web_app(
            service, hosts=arguments.allow_host, origins=arguments.allow_origin, keys=keys
        )
        _current[:] = [app]


def application(args: Mapping[str, Any]) -> Application:
    """Build the application: a deployment a bundle, and the doors.

    Args:
        args: the fields of ``Arguments``.

    Raises:
        HipaError: no bundle, an unknown backend, a number out of range, a host or an origin that
            no request can have, or a checker that cannot be imported or is not allowed.

    """
    require("serve", "ray")
    # Ray would build the record itself, but not from an annotation that is a text, as ours are.
    arguments = Arguments.model_validate(args)
    check_names(arguments.allow_host, arguments.allow_origin)
    settings = arguments.settings()
    settings.check_backend(arguments.backend)
    limits = arguments.limits()
    models = check_start(arguments.bundles, arguments.backend)
    c2pa = Path(arguments.c2pa) if arguments.c2pa else None
    # Only to find mistakes here: each replica imports it anew.
    chosen_checker(arguments.checker, arguments.allow_code)
    replicas = {}
    with code_allowed(arguments.allow_code):
        for number, served in enumerate(models.served):
            replicas[f"bundle_{number}"] = bundle_deployment(
                served, arguments.backend, limits, settings, c2pa, arguments.checker
            )
    door: Any = serve.deployment(
        Door,
        name="hipa-door",
        num_replicas=arguments.doors,
        ray_actor_options={"num_cpus": arguments.door_cpus},
        max_ongoing_requests=limits.queue * settings.most * len(models.served),
        graceful_shutdown_timeout_s=limits.seconds + 5,
    )
    built: Application = door.bind(arguments, **replicas)
    return built

"""``hipa-serve``: an image service of one bundle or several."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hipa_deploy.checker_options import AllowCodeOption, CheckerOption
from hipa_deploy.errors import HipaError

if TYPE_CHECKING:
    from hipa_deploy.marks.content_credentials import ContentSigner
    from hipa_deploy.serve.cluster.cluster_service import Replicas
    from hipa_deploy.serve.cluster.cluster_settings import ClusterSettings
    from hipa_deploy.serve.served import Models
    from hipa_deploy.serve.service import ImageService
    from hipa_deploy.serve.settings import Limits

Bundles = Annotated[
    list[str],
    typer.Argument(
        metavar="BUNDLE...",
        help="Folders that hipa-export wrote, or 'emoji' for the included one. NAME=FOLDER gives "
        "the model another name than its folder's.",
    ),
]


def serve(
    bundles: Bundles,
    host: Annotated[
        str, typer.Option(help="Address to listen at. By default only this machine reaches it.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at; 0 takes a free one.")] = 8000,
    backend: Annotated[
        str,
        typer.Option(
            help="What runs the models: auto | onnxruntime | openvino | openvino-bf16 | "
            "onnxruntime-cuda | onnxruntime-tensorrt | onnxruntime-rtx | tensorrt | rtx."
        ),
    ] = "auto",
    api_keys: Annotated[
        Path | None,
        typer.Option(
            help="A file with API keys, one a line: requests need one of them. The variable "
            "HIPA_API_KEYS can hold them too, with commas between."
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            help="A name under which the service may be called, such as gpu-box, or '*' for all. "
            "IP addresses and localhost always may. May be repeated."
        ),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            help="Another site whose pages may use the service, such as https://example.org. May "
            "be repeated."
        ),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(help="The most images of a batch; by default the bundle's largest."),
    ] = None,
    wait: Annotated[
        float,
        typer.Option(
            help="Milliseconds that a busy service waits for more requests to join a batch."
        ),
    ] = 4.0,
    queue: Annotated[
        int, typer.Option(help="Images of a bundle that may wait; more are refused with 429.")
    ] = 64,
    images: Annotated[int, typer.Option(help="The most images of one request.")] = 10,
    time_limit: Annotated[
        float, typer.Option(help="Seconds after which a request is given up.")
    ] = 60.0,
    prompt_limit: Annotated[int, typer.Option(help="The most characters of a prompt.")] = 4000,
    body_limit: Annotated[int, typer.Option(help="The most MiB of a request with images.")] = 32,
    pixel_limit: Annotated[
        int, typer.Option(help="The most pixels of an uploaded image, in millions.")
    ] = 16,
    steps_limit: Annotated[int, typer.Option(help="The most steps of a refining.")] = 100,
    c2pa: Annotated[
        Path | None,
        typer.Option(
            metavar="PEM",
            envvar="HIPA_C2PA",
            help="Sign content credentials (C2PA) into every image: a file with the private key "
            "and the certificates.",
        ),
    ] = None,
    checker: CheckerOption = None,
    allow_code: AllowCodeOption = False,
    log_prompts: Annotated[
        bool, typer.Option("--log-prompts", help="Write prompts to the log too.")
    ] = False,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Let replicas on a Ray cluster make the images: local starts one on this machine, "
            "auto joins the one that runs here, HOST:PORT another one. By default this process "
            "makes them.",
        ),
    ] = None,
    replicas: Annotated[
        str | None,
        typer.Option(
            help="With --ray: replicas of each bundle, as N, or as FEWEST:MOST to follow the load; "
            "1 by default."
        ),
    ] = None,
    replica_cpus: Annotated[
        float | None,
        typer.Option(help="With --ray: CPU cores to set aside for a replica; 1 by default."),
    ] = None,
    replica_gpus: Annotated[
        float | None,
        typer.Option(
            help="With --ray: GPUs of a replica, or the part of one; 0 by default.",
        ),
    ] = None,
    scale_at: Annotated[
        float | None,
        typer.Option(
            help="With --ray and FEWEST:MOST: requests a replica above which another one is "
            "started; by default twice the largest batch."
        ),
    ] = None,
) -> None:
    """Serve bundles over HTTP: OpenAI's images API, requests joined into batches, metrics.

    The models are the bundles, and their adaptors as BUNDLE:ADAPTOR. Requests of different users
    share a batch where that changes no image. Ctrl-C stops after the requests that were accepted.
    """
    from hipa_deploy.extras import require

    require("serve")
    if ray is not None:
        require("ray")
    from hipa_deploy.disk.reading import MIB
    from hipa_deploy.marks.content_credentials import ContentSigner
    from hipa_deploy.marks.own_checker import chosen_checker
    from hipa_deploy.serve.cluster.cluster_settings import ClusterSettings, replicas_from
    from hipa_deploy.serve.process.server import check_address, run_server
    from hipa_deploy.serve.served import check_start
    from hipa_deploy.serve.service import ImageService
    from hipa_deploy.serve.settings import Limits
    from hipa_deploy.serve.web.api_keys import read_keys
    from hipa_deploy.serve.web.guard import check_names

    check_names(allow_host or [], allow_origin or [])
    limits = Limits(
        queue=queue,
        images=images,
        prompt=prompt_limit,
        body=body_limit * MIB,
        pixels=pixel_limit * 1_000_000,
        steps=steps_limit,
        seconds=time_limit,
        wait=wait / 1000,
        batch=batch,
    )
    models = check_start(bundles, backend)
    given = {
        "--replicas": replicas,
        "--replica-cpus": replica_cpus,
        "--replica-gpus": replica_gpus,
        "--scale-at": scale_at,
    }
    unused = [option for option, value in given.items() if value is not None]
    if ray is None and unused:
        raise HipaError(f"{unused[0]} is for a Ray cluster. Give --ray too, or leave it out.")
    least, most = replicas_from("1" if replicas is None else replicas)
    settings = ClusterSettings(
        least=least,
        most=most,
        cpus=1.0 if replica_cpus is None else replica_cpus,
        gpus=0.0 if replica_gpus is None else replica_gpus,
        waiting=scale_at,
    )
    keys = read_keys(api_keys)
    signer = None if c2pa is None else ContentSigner.read(c2pa)
    # With --ray too, where each replica imports it anew: a mistake is said before the cluster.
    own_checker = chosen_checker(checker, allow_code)
    if ray is None:
        service = ImageService(models, limits, signer, own_checker)
    else:
        # Before the cluster, which takes a while to start.
        check_address(host, port)
        service = _cluster_service(
            models, limits, signer, c2pa, settings, backend, ray, checker, allow_code
        )
    run_server(
        service,
        backend,
        host=host,
        port=port,
        hosts=allow_host or [],
        origins=allow_origin or [],
        keys=keys,
        log_prompts=log_prompts,
    )


def _cluster_service(
    models: Models,
    limits: Limits,
    signer: ContentSigner | None,
    c2pa: Path | None,
    settings: ClusterSettings,
    backend: str,
    address: str,
    checker: str | None,
    allow_code: bool,
) -> ImageService:
    """A service whose replicas run on a Ray cluster; the cluster is joined when it is loaded."""
    from hipa_deploy.serve.cluster.cluster_service import ClusterService
    from hipa_deploy.serve.cluster.ray_replicas import join_ray, start_replicas
    from hipa_deploy.user_code import code_allowed

    settings.check_backend(backend)

    def start(models: Models, backend: str, limits: Limits) -> Mapping[str, Replicas]:
        # Here, because it is called when the service is loaded.
        with code_allowed(allow_code):
            return start_replicas(models, backend, limits, settings, c2pa, checker)

    service = ClusterService(models, limits, start, signer)
    # Here and not in the thread that loads: Ray sets handlers of signals.
    join_ray(address)
    return service

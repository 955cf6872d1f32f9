"""``hipa-serve``: an image service of one bundle or several."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
    c2pa: Annotated[
        Path | None,
        typer.Option(
            metavar="PEM",
            envvar="HIPA_C2PA",
            help="Sign content credentials (C2PA) into every image: a file with the private key "
            "and the certificates.",
        ),
    ] = None,
    log_prompts: Annotated[
        bool, typer.Option("--log-prompts", help="Write prompts to the log too.")
    ] = False,
) -> None:
    """Serve bundles over HTTP: OpenAI's images API, requests joined into batches, metrics.

    The models are the bundles, and their adaptors as BUNDLE:ADAPTOR. Requests of different users
    share a batch where that changes no image. Ctrl-C stops after the requests that were accepted.
    """
    from hipa_deploy.extras import require

    require("serve")
    from hipa_deploy.disk.reading import MIB
    from hipa_deploy.marks.content_credentials import ContentSigner
    from hipa_deploy.serve.process.api_keys import read_keys
    from hipa_deploy.serve.process.server import run_server
    from hipa_deploy.serve.served import check_start
    from hipa_deploy.serve.service import ImageService
    from hipa_deploy.serve.settings import Limits

    limits = Limits(
        queue=queue,
        images=images,
        prompt=prompt_limit,
        body=body_limit * MIB,
        pixels=pixel_limit * 1_000_000,
        seconds=time_limit,
        wait=wait / 1000,
        batch=batch,
    )
    keys = read_keys(api_keys)
    signer = None if c2pa is None else ContentSigner.read(c2pa)
    models = check_start(bundles, backend)
    run_server(
        ImageService(models, limits, signer),
        backend,
        host=host,
        port=port,
        hosts=allow_host or [],
        origins=allow_origin or [],
        keys=keys,
        log_prompts=log_prompts,
    )

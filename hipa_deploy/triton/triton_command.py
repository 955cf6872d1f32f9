"""``hipa-triton``: a bundle becomes a model repository of Triton."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def triton(
    bundle: Annotated[
        str, typer.Argument(help="Folder that hipa-export wrote, or 'emoji' for the included one.")
    ],
    out: Annotated[Path, typer.Option(help="Model repository to write, new or empty.")],
    name: Annotated[
        str | None,
        typer.Option(help="Name of the model; by default that of the bundle's folder."),
    ] = None,
    backend: Annotated[
        str,
        typer.Option(
            help="What runs the stages in Triton: onnxruntime (CPU) | onnxruntime-cuda | "
            "onnxruntime-tensorrt | tensorrt, which takes the engines that hipa-build made for "
            "this machine."
        ),
    ] = "onnxruntime",
    instances: Annotated[int, typer.Option(help="Copies of every model that run at once.")] = 1,
    join: Annotated[
        bool,
        typer.Option(
            "--join/--no-join",
            help="Let Triton join requests into batches, where the bundle has --dynamic batch=. "
            "Some kernels then round otherwise.",
        ),
    ] = True,
) -> None:
    """Write a bundle as a model repository of NVIDIA's Triton Inference Server.

    There is a model for each stage, and one that goes from a prompt to an image through them.
    """
    from hipa_deploy.bundle.folder import Bundle
    from hipa_deploy.disk.files import refuse_to_overwrite
    from hipa_deploy.embedded import bundle_name, resolve_bundle
    from hipa_deploy.triton.model_repository import check_repository_request, write_repository

    root = resolve_bundle(bundle)
    chosen = name or bundle_name(bundle)
    checked = check_repository_request(chosen, backend, instances)
    opened = Bundle.open(root)
    refuse_to_overwrite(out)
    models = write_repository(
        opened, out, name=chosen, backend=checked, instances=instances, joined=join
    )
    typer.echo(f"{out}: {', '.join(models)}")

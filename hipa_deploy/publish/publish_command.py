"""``hipa-publish``: an adaptor or a bundle becomes a repository of the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def publish(
    source: Annotated[
        str,
        typer.Argument(
            metavar="ADAPTOR_OR_BUNDLE",
            help="Folder that hipa-train or hipa-export wrote. emoji is the included adaptor, "
            "emoji-bundle the included bundle.",
        ),
    ],
    repo: Annotated[
        str, typer.Option(metavar="USER/NAME", help="Repository on the Hugging Face hub.")
    ],
    model: Annotated[
        str | None,
        typer.Option(
            help="Base model of the adaptor or bundle: a diffusers folder, a .safetensors or .ckpt "
            "file, a hub id, or 'emoji'. Its card says the licence. Not needed for the included "
            "adaptors, nor for a bundle."
        ),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(
            help="For a model in one file, the model it is of: sd15 | sd21-base | sd21-v | "
            "sd15-inpainting | sd2-inpainting | sdxl | ssd-1b | vega | sdxl-inpainting | a "
            "diffusers folder of the same architecture. Needed only if its weights do not show it."
        ),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(
            metavar="USER/NAME",
            help="The base model's id on the hub, where --model is a folder. By default what the "
            "folder's name or the bundle says.",
        ),
    ] = None,
    licence: Annotated[
        str | None,
        typer.Option(
            "--license",
            help="The base model's licence as the hub calls it, such as openrail++; by default "
            "what the model folder's README.md says.",
        ),
    ] = None,
    report: Annotated[
        list[Path] | None,
        typer.Option(
            help="Report folder that hipa-evaluate --out wrote, of COCO too: the measured quality "
            "and the sample images. Repeat it for more."
        ),
    ] = None,
    dry_run: Annotated[
        Path | None,
        typer.Option(help="Write what would be uploaded to this new folder, and upload nothing."),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository private.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a README.md that the repository has.")
    ] = False,
) -> None:
    """Publish an adaptor or a bundle on the Hugging Face hub, with a model card.

    The card says the base model, recipe, cost, measured quality, limits and licence, and how to
    load the files in diffusers, peft and here. An adaptor gets the files that peft reads. Files
    that name a folder of this machine are refused.
    """
    from importlib.util import find_spec

    from hipa_deploy.disk.files import new_folder, refuse_to_overwrite, temporary_folder
    from hipa_deploy.errors import MissingDependencyError
    from hipa_deploy.publish.base_model import check_hub_id, check_licence

    check_hub_id("--repo", repo)
    if base_model is not None:
        check_hub_id("--base-model", base_model)
    if licence is not None:
        check_licence(licence)
    for module in ("huggingface_hub", "safetensors"):
        if find_spec(module) is None:
            raise MissingDependencyError(module, "publish")

    from hipa_deploy.publish.folders import Wishes, check_paths, open_publication
    from hipa_deploy.publish.hub import check_token, upload

    # A path that is wrong is named even where the token is missing too.
    wishes = Wishes(repo, model, base_model, licence, tuple(report or ()), config)
    check_paths(source, wishes)
    if dry_run is None:
        check_token()
    else:
        refuse_to_overwrite(dry_run)
    publication = open_publication(source, wishes)
    if dry_run is not None:
        with new_folder(dry_run) as folder:
            publication.write(folder)
        typer.echo(dry_run)
        return
    with temporary_folder("hipa-publish") as folder:
        publication.write(folder)
        typer.echo(upload(folder, repo, private=private, force=force))

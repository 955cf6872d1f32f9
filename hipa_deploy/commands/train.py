"""``hipa-train``: train an adaptor, or a tiny decoder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from hipa_deploy.commands.options import (
    ConfigOption,
    ModelOption,
    console,
)
from hipa_deploy.errors import HipaError
from hipa_deploy.extras import require

if TYPE_CHECKING:
    from hipa_deploy.train.recipes.recipe import Recipe


def train(
    out: Annotated[Path, typer.Option(help="Adaptor folder (or decoder folder) to write.")],
    recipe: Annotated[
        str,
        typer.Option(help="A TOML file, or: emoji | emoji-decoder | sd15 | sd21-base | sd21-v."),
    ] = "emoji",
    model: ModelOption = "emoji",
    config: ConfigOption = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Text file or table of captions, in place of the recipe's.")
    ] = None,
    start: Annotated[
        str | None, typer.Option("--from", help="Adaptor to continue from, or 'emoji'.")
    ] = None,
    adaptor: Annotated[
        str | None, typer.Option(help="For a decoder: the adaptor of its latents, or 'emoji'.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Optimiser steps, in place of the recipe's.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the recipe and what it takes, and stop.")
    ] = False,
) -> None:
    """Train a HiPA adaptor, or a tiny decoder by a recipe of that kind. To resume, run the same command again."""
    require("train")
    from hipa_deploy.embedded import resolve_adaptor
    from hipa_deploy.models.locate import model_folder
    from hipa_deploy.train.loop.processes import is_main, leaving_process_group
    from hipa_deploy.train.recipes.recipe import Recipe, load_any_recipe
    from hipa_deploy.train.train_adaptor import train_adaptor
    from hipa_deploy.train.train_decoder import train_decoder

    given = {"steps": steps, "prompts": prompts and str(prompts.absolute())}
    chosen = load_any_recipe(
        recipe, {key: value for key, value in given.items() if value is not None}
    )
    initial, active = (resolve_adaptor(name) if name else None for name in (start, adaptor))
    if isinstance(chosen, Recipe):
        if active:
            raise HipaError(
                f"--adaptor is for a decoder; recipe {recipe} trains an adaptor. See --from."
            )
        if dry_run:
            _dry_run_training(chosen, model_folder(model, config))
            return
        with leaving_process_group():
            path = train_adaptor(
                chosen, model_folder(model, config), out, initial_adaptor=initial, console=console
            )
    else:
        if initial:
            raise HipaError(
                f"--from is for an adaptor; recipe {recipe} trains a decoder. Leave it out."
            )
        if dry_run:
            raise HipaError(
                f"--dry-run is for an adaptor; recipe {recipe} trains a decoder. Leave it out."
            )
        with leaving_process_group():
            path = train_decoder(
                chosen, model_folder(model, config), out, adaptor=active, console=console
            )
    if is_main():
        typer.echo(path)


def _dry_run_training(recipe: Recipe, model_dir: Path) -> None:
    from hipa_deploy.engines.targets.target import load_target_profile, target_names
    from hipa_deploy.train.prediction.dry_run import dry_run

    gpus = [
        profile for profile in map(load_target_profile, target_names()) if not profile.memory_shared
    ]
    with console.status("predicting"):
        shown, problem = dry_run(recipe, model_dir, gpus)
    Console().print(*shown, sep="\n", markup=False, highlight=False)
    if problem:
        raise problem

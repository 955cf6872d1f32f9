"""``hipa-demo``: the whole chain on the embedded model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from hipa_deploy.commands.options import console
from hipa_deploy.errors import HipaError
from hipa_deploy.extras import require


def demo(
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder to write: adaptor, bundle, engines, contact sheet. By default demo, or "
            "the next free name if that is something else."
        ),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="Train for a few steps only, starting from the included adaptor."
        ),
    ] = False,
    task: Annotated[
        Literal["generate", "edit", "inpaint", "upscale"],
        typer.Option(
            help="generate trains an adaptor; edit, inpaint and upscale use the included ones."
        ),
    ] = "generate",
) -> None:
    """Run everything on the small included model: train, export, compile, generate, measure.

    Needs no GPU. It ends with contact_sheet.png, a picture that compares the images.
    """
    if out is not None:
        from hipa_deploy.demo.steps import check_folder

        check_folder(out)
    require("train", "export")
    if task != "generate":
        if quick:
            raise HipaError(
                f"--quick shortens the training, but the {task} demo trains nothing. "
                "Leave --quick out."
            )
        from hipa_deploy.demo.task_demo import run_task_demo

        run_task_demo(task, out, console=console)
        return

    from hipa_deploy.demo.training_demo import run_demo

    run_demo(out, quick=quick, console=console)

"""``hipa-demo``: the whole chain on the embedded model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hipa_deploy.commands.options import (
    Task,
    console,
)
from hipa_deploy.errors import HipaError
from hipa_deploy.extras import require

if TYPE_CHECKING:
    pass


def demo(
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("demo"),
    quick: Annotated[
        bool, typer.Option("--quick", help="Continue from the shipped adaptor, few steps.")
    ] = False,
    task: Annotated[
        Task, typer.Option(help="generate trains; the others take their shipped adaptor.")
    ] = Task.generate,
) -> None:
    """Run the whole chain on the embedded model: train, merge, export, compile, generate, profile."""
    require("train", "export")
    if task is not Task.generate:
        if quick:
            raise HipaError(
                f"--quick shortens a training, and {task.value} trains nothing. Leave it away."
            )
        from hipa_deploy.demo.task_demo import run_task_demo

        run_task_demo(task.value, out, console=console)
        return
    from hipa_deploy.demo.training_demo import run_demo

    run_demo(out, quick=quick, console=console)

"""``hipa-doctor``: what this machine can do, and whether a bundle or an engine is right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from hipa_deploy.commands.options import (
    BackendOption,
    console,
)
from hipa_deploy.errors import HipaError

if TYPE_CHECKING:
    pass


def doctor(
    subject: Annotated[
        str | None, typer.Argument(help="A bundle (or 'emoji'), which is run, or an engine.")
    ] = None,
    backend: BackendOption = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    self_test: Annotated[
        bool, typer.Option("--self-test", help="Build, run and time the embedded bundle.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Write the self-test's report here, for an issue.")
    ] = None,
) -> None:
    """Say what this machine can do and lacks; rerun a bundle's reference prompt and compare with its export."""
    if self_test:
        _self_test(subject, out, as_json)
    elif out:
        raise HipaError("--out is for --self-test. Add it, or leave --out away.")
    else:
        _examine(subject, backend, as_json)


def _examine(subject: str | None, backend: str, as_json: bool) -> None:
    from hipa_deploy.doctor.examine import examine, render

    with console.status("examining"):
        report = examine(subject, backend)
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        Console().print(render(report))
    if report["problems"]:
        raise typer.Exit(1)


def _self_test(subject: str | None, out: Path | None, as_json: bool) -> None:
    from hipa_deploy.doctor.self_test import render_text, self_test
    from hipa_deploy.files import write_file

    if subject:
        raise HipaError("--self-test runs the embedded bundle. Leave SUBJECT out, or the option.")
    report = self_test(console)
    text = render_text(report)
    if out:
        write_file(out, text.encode())
    typer.echo(report.model_dump_json(indent=2) if as_json else text)
    if report.failed:
        raise typer.Exit(1)

"""``hipa-doctor``: what this machine can do, and whether a bundle or an engine is right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from hipa_deploy.commands.files.outputs import check_outputs, write_output
from hipa_deploy.commands.options import BackendOption, ForceOption, console
from hipa_deploy.errors import HipaError


def doctor(
    subject: Annotated[
        str | None,
        typer.Argument(
            help="What to check: a bundle folder (or 'emoji'), which is run; an .engine file; or "
            "an image, whose parameters, provenance and watermark are read."
        ),
    ] = None,
    backend: BackendOption = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, not a table.")] = False,
    self_test: Annotated[
        bool,
        typer.Option(
            "--self-test",
            help="Build, run, check and time the included model on every backend of this machine.",
        ),
    ] = False,
    bisect: Annotated[
        bool,
        typer.Option(
            "--bisect",
            help="With an engine: find the first layer that departs from ONNX Runtime. Each of "
            "some ten steps builds the engine again.",
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="With --self-test: also write its report to this file, to attach to an issue."
        ),
    ] = None,
    force: ForceOption = False,
) -> None:
    """Show what this machine can run, what is missing, and the command that fixes it.

    With a bundle, its reference prompt is run and compared with the outputs stored by the export.
    With an image, everything is shown that it says about itself. Exit code 1: a problem was found.
    """
    _check_subject(subject, backend)
    if self_test:
        if bisect:
            raise HipaError("--bisect is for an engine. Leave --self-test out.")
        _self_test(subject, out, as_json, force)
    elif out:
        raise HipaError("--out is for --self-test. Add --self-test, or leave --out out.")
    elif bisect:
        _bisect(subject, as_json)
    else:
        _examine(subject, backend, as_json)


def _check_subject(subject: str | None, backend: str) -> None:
    """What does not exist is named first, even where the options do not fit it either."""
    from hipa_deploy.doctor.examine import check_request

    check_request(subject, backend)


def _bisect(subject: str | None, as_json: bool) -> None:
    """Print where an engine goes wrong; exit with 1 if it does."""
    from hipa_deploy.engines.build.suspects import bisect_stage
    from hipa_deploy.engines.faults.bisect import render_bisection
    from hipa_deploy.engines.store.diagnose import engine_stage, is_engine

    if subject is None or not is_engine(Path(subject)):
        raise HipaError(
            f"--bisect takes an engine, not {subject or 'nothing'}. "
            "Name an .engine or .rejected file in BUNDLE/engines."
        )
    bundle, stage, key = engine_stage(Path(subject))
    with console.status("building the engine with one tensor after the other as an output"):
        found = bisect_stage(bundle, stage, key)
    if as_json:
        typer.echo(found.model_dump_json(indent=2))
    else:
        Console().print(render_bisection(found))
    if found.verdict != "right":
        raise typer.Exit(1)


def _examine(subject: str | None, backend: str, as_json: bool) -> None:
    """Print the report on this machine and on ``subject``; exit with 1 on a problem."""
    from hipa_deploy.doctor.examine import examine, render
    from hipa_deploy.doctor.image_report import examine_image, render_image
    from hipa_deploy.marks.read_marks import is_image_file

    if subject and is_image_file(Path(subject)):
        with console.status("reading"):
            image_report = examine_image(Path(subject))
        if as_json:
            typer.echo(json.dumps(image_report, indent=2))
        else:
            Console().print(render_image(image_report))
        if image_report["problems"]:
            raise typer.Exit(1)
        return
    with console.status("examining"):
        report = examine(subject, backend)
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        Console().print(render(report))
    if report["problems"]:
        raise typer.Exit(1)


def _self_test(subject: str | None, out: Path | None, as_json: bool, force: bool) -> None:
    """Print the self-test's report, write it to ``out``; exit with 1 if a step failed."""
    from hipa_deploy.doctor.self_test import self_test
    from hipa_deploy.doctor.self_test_report import render_terminal, render_text

    if subject:
        raise HipaError(
            f"--self-test runs the embedded bundle, not {subject}. "
            "Leave SUBJECT out, or leave --self-test out."
        )
    if out:
        check_outputs([out], force=force)
    report = self_test(console)
    if out:
        write_output(out, render_text(report).encode(), force=force)
    if as_json:
        typer.echo(report.model_dump_json(indent=2))
    else:
        Console().print(render_terminal(report))
    if report.failed:
        raise typer.Exit(1)

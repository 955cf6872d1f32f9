"""The commands that measure latency: ``hipa-profile``, ``hipa profile compare``, ``hipa profile table``."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from hipa_deploy.commands.options import BackendOption, BundleArgument, console


class Metric(str, Enum):
    """What two latency reports are compared by."""

    p50 = "p50"
    p90 = "p90"
    p95 = "p95"
    p99 = "p99"
    mean = "mean"


def profile(
    bundle: BundleArgument,
    runs: Annotated[int, typer.Option(help="Timed runs after warm-up.")] = 50,
    warmup: Annotated[
        int, typer.Option(help="Runs before them that do not count, after the very first.")
    ] = 5,
    backend: BackendOption = "auto",
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the report here.")] = None,
    html_path: Annotated[
        Path | None, typer.Option("--html", help="Write a page with plots here.")
    ] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print a Markdown row to publish, not a table.")
    ] = False,
    layers: Annotated[
        bool, typer.Option("--layers", help="Profile the layers too, in a pass of its own.")
    ] = False,
    roofline: Annotated[
        str | None, typer.Option(help="Predict lower bounds on: orin-nano, rtx4090, …")
    ] = None,
) -> None:
    """Measure latency: a table a stage and end to end, with the conditions. See profile compare, profile table."""
    from hipa_deploy.bundle.folder import Bundle
    from hipa_deploy.embedded import resolve_bundle
    from hipa_deploy.engines.latency.html_page import render_page
    from hipa_deploy.engines.latency.layer_times import render_layers
    from hipa_deploy.engines.latency.measure import profile_pipeline
    from hipa_deploy.engines.latency.roofline import predict_roofline, render_roofline
    from hipa_deploy.engines.latency.table import markdown_table, render_table
    from hipa_deploy.engines.latency.with_roofline import with_own_roofline, with_roofline
    from hipa_deploy.files import write_file
    from hipa_deploy.generate.pipeline import OneStepPipeline

    # before minutes of profiling, not after
    prediction = (
        predict_roofline(Bundle.open(resolve_bundle(bundle)), roofline)
        if roofline is not None
        else None
    )
    with OneStepPipeline.load(bundle, backend) as pipe:
        report = profile_pipeline(pipe, runs=runs, warmup=warmup, layers=layers, console=console)
        report = (
            with_roofline(report, prediction)
            if prediction
            else with_own_roofline(report, pipe.bundle)
        )
    if json_path:
        write_file(json_path, (report.model_dump_json(indent=2) + "\n").encode())
    if html_path:
        write_file(html_path, render_page(report).encode())
    if markdown:
        typer.echo(markdown_table([report]), nl=False)
        return
    Console().print(render_table(report))
    for stage, times in report.layers.items():
        Console().print(render_layers(stage, times))
    if report.roofline:
        Console().print(render_roofline(report.roofline))


def profile_compare(
    first: Annotated[
        Path, typer.Argument(help="The report to compare with, from hipa-profile --json.")
    ],
    second: Annotated[Path, typer.Argument(help="The report that may be slower.")],
    metric: Annotated[Metric, typer.Option(help="Which number of the runs.")] = Metric.p50,
    threshold: Annotated[
        str, typer.Option(help="How much slower end to end is a regression.")
    ] = "5%",
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write the comparison here.")
    ] = None,
) -> None:
    """Compare two latency reports: ratio, confidence interval, conditions. Exit code 1: a regression."""
    from hipa_deploy.engines.latency.compare import (
        compare_reports,
        parse_percent,
        render_comparison,
    )
    from hipa_deploy.engines.latency.report import read_report
    from hipa_deploy.files import write_file

    percent, pair = parse_percent(threshold), [read_report(path) for path in (first, second)]
    comparison = compare_reports(*pair, metric=metric.value, threshold_percent=percent)
    if json_path:
        write_file(json_path, (comparison.model_dump_json(indent=2) + "\n").encode())
    Console().print(render_comparison(comparison))
    if comparison.regression:
        raise typer.Exit(1)


def profile_table(
    reports: Annotated[
        list[Path], typer.Argument(metavar="REPORT...", help="Reports from hipa-profile --json.")
    ],
) -> None:
    """Print latency reports as one Markdown table to publish: a row a report, with its conditions."""
    from hipa_deploy.engines.latency.report import read_report
    from hipa_deploy.engines.latency.table import markdown_table

    typer.echo(markdown_table([read_report(path) for path in reports]), nl=False)

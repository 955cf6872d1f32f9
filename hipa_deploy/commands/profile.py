"""The commands that measure latency: ``hipa-profile``, ``profile compare``, ``profile table``."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from hipa_deploy.commands.files.outputs import check_outputs, write_output
from hipa_deploy.commands.make_images import load_pipeline
from hipa_deploy.commands.options import (
    BackendOption,
    BundleArgument,
    CacheOption,
    ForceOption,
    LowMemoryOption,
    VerifyOption,
    console,
)

if TYPE_CHECKING:
    from hipa_deploy.bundle.folder import Bundle

_UNMARKED = "the bundle's watermark is not in the times: it does not fit into an image of this size"


class Metric(str, Enum):
    """What two latency reports are compared by."""

    p50 = "p50"
    p90 = "p90"
    p95 = "p95"
    p99 = "p99"
    mean = "mean"


def profile(
    bundle: BundleArgument,
    runs: Annotated[int, typer.Option(help="How many timed runs, after the warm-up.")] = 50,
    seconds: Annotated[
        float,
        typer.Option(
            help="Go on beyond --runs until the timed runs took so many seconds. A figure is valid "
            "from 100 runs and 10 seconds on."
        ),
    ] = 0.0,
    warmup: Annotated[
        int,
        typer.Option(
            help="Runs before the timed ones that do not count; the very first is reported apart."
        ),
    ] = 5,
    backend: BackendOption = "auto",
    json_path: Annotated[
        Path | None,
        typer.Option(
            "--json", help="Also write the report to this JSON file, for profile compare or table."
        ),
    ] = None,
    html_path: Annotated[
        Path | None,
        typer.Option("--html", help="Also write the report to this HTML page, with plots."),
    ] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print one Markdown table row, to publish.")
    ] = False,
    layers: Annotated[
        bool,
        typer.Option("--layers", help="Also time the layers inside each model, in extra runs."),
    ] = False,
    roofline: Annotated[
        str | None,
        typer.Option(
            help="Also predict the shortest possible time on another device, such as orin-nano "
            "or rtx4090."
        ),
    ] = None,
    verify: VerifyOption = False,
    cache: CacheOption = True,
    low_memory: LowMemoryOption = False,
    force: ForceOption = False,
) -> None:
    """Measure how long one image takes: in each model and from prompt to image.

    The report includes the conditions (device, versions, clocks). See also: hipa-profile compare,
    hipa-profile table.
    """
    from hipa_deploy.bundle.folder import Bundle
    from hipa_deploy.embedded import resolve_bundle
    from hipa_deploy.engines.latency.html_page import render_page
    from hipa_deploy.engines.latency.layer_times import render_layers
    from hipa_deploy.engines.latency.measure import check_runs, profile_pipeline
    from hipa_deploy.engines.latency.roofline import predict_roofline, render_roofline
    from hipa_deploy.engines.latency.table import markdown_table, render_table
    from hipa_deploy.engines.latency.with_roofline import with_own_roofline, with_roofline
    from hipa_deploy.generate.runner import check_backend

    # Before minutes of profiling: a wrong output or an unknown device is reported at once.
    check_runs(runs, warmup, seconds)
    check_backend(backend)
    root = resolve_bundle(bundle)
    opened = Bundle.open(root)
    outputs = [path for path in (json_path, html_path) if path is not None]
    check_outputs(outputs, inputs=[root], force=force)
    prediction = None
    if roofline is not None:
        prediction = predict_roofline(opened, roofline)

    too_small = _is_too_small_for_watermark(opened)
    with load_pipeline(
        bundle, backend, None, low_memory, False if too_small else None, verify=verify, cache=cache
    ) as pipe:
        report = profile_pipeline(
            pipe, runs=runs, seconds=seconds, warmup=warmup, layers=layers, console=console
        )
        if too_small:
            report = report.model_copy(update={"warnings": (*report.warnings, _UNMARKED)})
        if prediction:
            report = with_roofline(report, prediction)
        else:
            report = with_own_roofline(report, pipe.bundle)

    # Files first: a long measurement is not lost to a terminal that closes.
    if json_path:
        write_output(json_path, (report.model_dump_json(indent=2) + "\n").encode(), force=force)
    if html_path:
        write_output(html_path, render_page(report).encode(), force=force)

    if markdown:
        typer.echo(markdown_table([report]), nl=False)
        return
    Console().print(render_table(report))
    for stage, times in report.layers.items():
        Console().print(render_layers(stage, times))
    if report.roofline:
        Console().print(render_roofline(report.roofline))


def _is_too_small_for_watermark(bundle: Bundle) -> bool:
    """Whether the bundle wants a watermark, and its own size has no room for it.

    Of one that enlarges images, the size is that of a tile. The whole image carries the watermark.
    """
    from hipa_deploy.marks.watermark import LEAST_SIDE

    step = bundle.manifest.one_step
    return bundle.manifest.marks.watermark and min(step.height, step.width) < LEAST_SIDE


def profile_compare(
    first: Annotated[
        Path, typer.Argument(help="The report to compare with, from hipa-profile --json.")
    ],
    second: Annotated[
        Path, typer.Argument(help="The report that may be slower, from hipa-profile --json.")
    ],
    metric: Annotated[
        Metric, typer.Option(help="Which number to compare: a percentile of the runs, or the mean.")
    ] = Metric.p50,
    threshold: Annotated[
        str, typer.Option(help="How much slower, from prompt to image, counts as a regression.")
    ] = "5%",
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Also write the comparison to this JSON file.")
    ] = None,
    force: ForceOption = False,
) -> None:
    """Compare two latency reports: is the second slower, by more than chance?

    Shows ratios with confidence intervals, and conditions that differ. Exit code 1: a regression.
    """
    from hipa_deploy.disk.reading import check_regular
    from hipa_deploy.engines.latency.compare import (
        compare_reports,
        parse_percent,
        render_comparison,
    )
    from hipa_deploy.engines.latency.report import WRITTEN, read_report

    threshold_percent = parse_percent(threshold)
    for report in (first, second):
        check_regular(report, WRITTEN)
    if json_path:
        check_outputs([json_path], inputs=[first, second], force=force)
    first_report = read_report(first)
    second_report = read_report(second)
    comparison = compare_reports(
        first_report, second_report, metric=metric.value, threshold_percent=threshold_percent
    )

    if json_path:
        content = comparison.model_dump_json(indent=2) + "\n"
        write_output(json_path, content.encode(), force=force)
    Console().print(render_comparison(comparison))
    if comparison.regression:
        raise typer.Exit(1)


def profile_table(
    reports: Annotated[
        list[Path],
        typer.Argument(metavar="REPORT...", help="Reports, from hipa-profile --json."),
    ],
) -> None:
    """Print latency reports as one Markdown table to publish, a row for each.

    Each row includes the conditions of its measurement.
    """
    from hipa_deploy.engines.latency.report import read_report
    from hipa_deploy.engines.latency.table import markdown_table

    typer.echo(markdown_table([read_report(path) for path in reports]), nl=False)

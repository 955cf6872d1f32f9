"""A latency report as one HTML page, in one file.

The page has no script, and loads no style sheet, font or image.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape

from hipa_deploy.engines.latency.layer_times import ROWS, RUNS, LayerTime, layer_cells, op_text
from hipa_deploy.engines.latency.plots import GREY, colours_of, line_plot, share_bar, strip_plot
from hipa_deploy.engines.latency.report import LatencyReport, LatencyStats
from hipa_deploy.engines.latency.roofline import MEASURED, Roofline, percent_cell
from hipa_deploy.engines.latency.stage_timer import END_TO_END
from hipa_deploy.engines.latency.table import (
    HEADINGS,
    UNKNOWN,
    device_name,
    memory_text,
    model_name,
    stat_cells,
    state_facts,
)

# The time of a run that belongs to no stage, such as tokenizing and drawing noise.
OUTSIDE = "outside the stages"

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --soft: #5b6474; --line: #d9dde5;
  --paper: #fff; --tint: #f5f7fa }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ef; --soft: #a2abba; --line: #363d4a; --paper: #14181f; --tint: #1c222c }
}
body { margin: 0 auto; padding: 2.5rem 1.5rem 4rem; max-width: 58rem;
  color: var(--ink); background: var(--paper);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif }
h1 { font-size: 1.6rem; margin: 0 0 .2rem } h2 { font-size: 1.1rem; margin: 2.6rem 0 .4rem }
p { margin: .3rem 0 } .soft { color: var(--soft) }
figure { margin: .8rem 0 } svg { width: 100%; height: auto }
.cards { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.4rem 0 }
.cards div { flex: 1 1 8rem; padding: .7rem 1rem; background: var(--tint); border-radius: .5rem }
.cards b { display: block; font-size: 1.5rem; font-weight: 600 }
.warn { border-left: 4px solid #d9822b; background: var(--tint);
  padding: .6rem 1rem; margin: 1rem 0 }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { padding: .35rem .6rem; border-bottom: 1px solid var(--line);
  text-align: right; vertical-align: top }
th:first-child, td:first-child { text-align: left } th { color: var(--soft); font-weight: 500 }
.facts td { text-align: left }
.facts td:first-child { color: var(--soft); width: 13rem } tr.last td { font-weight: 600 }
.wide { overflow-x: auto } td.name { overflow-wrap: anywhere }
"""


def render_page(report: LatencyReport) -> str:
    """Make the page: key figures, plots, statistics, roofline, conditions and layers.

    Plots need samples. A report of schema 1 has none, and its page says so. Every text from the
    report is escaped, so a name in it can never become markup.

    Returns:
        A whole HTML document.

    """
    conditions = report.conditions
    title = f"Latency on {device_name(report)}"
    facts = (
        f"{model_name(report)}, {conditions.width}x{conditions.height}, batch {conditions.batch}, "
        f"{conditions.precision}, {conditions.backend}"
    )
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">{escape(facts)}; measured {escape(report.created)}</p>',
    ]

    # Warnings come first, so that nobody reads the figures without them.
    body += [*_warnings(report), *_cards(report), *_plots(report), *_statistics(report)]
    if report.roofline:
        body += _roofline(report.roofline)
    body += _conditions(report)
    for stage, layers in report.layers.items():
        body += _layers(stage, layers)

    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title>"
    )
    page = [
        "<!doctype html>",
        f'<html lang="en"><head>{head}<style>{_STYLE}</style></head><body>',
        *body,
    ]
    return "\n".join([*page, "</body></html>", ""])


def _warnings(report: LatencyReport) -> Iterator[str]:
    texts = list(report.warnings)
    if report.validity and not report.validity.valid:
        texts.insert(0, str(report.validity))
    if texts:
        paragraphs = "".join(f"<p>{escape(text)}</p>" for text in texts)
        yield f'<div class="warn">{paragraphs}</div>'


def _cards(report: LatencyReport) -> Iterator[str]:
    whole = report.end_to_end
    first = "-" if whole.first_ms is None else f"{whole.first_ms:.1f} ms"
    cards = [
        (f"{whole.p50_ms:.2f} ms", "p50, prompt to image"),
        (f"{whole.p99_ms:.2f} ms", "p99"),
        (first, "the first run, apart"),
        (f"{report.throughput_images_per_second:.2f}", "images a second: throughput"),
    ]
    yield '<div class="cards">'
    for value, label in cards:
        yield f"<div><b>{escape(value)}</b><span class=soft>{escape(label)}</span></div>"
    yield "</div>"


def _plots(report: LatencyReport) -> Iterator[str]:
    if not report.end_to_end.samples_ms:
        yield '<p class="soft">No plots: a report of schema 1 keeps no samples.</p>'
        return
    everything = {**report.stages, END_TO_END: report.end_to_end}
    rows = {name: stats.samples_ms for name, stats in everything.items()}

    # One colour for each stage in all three plots. The last has the device's stages too.
    names = dict.fromkeys((*rows, *report.device))
    colours = {**colours_of(list(names)), OUTSIDE: GREY}
    yield from _figure(
        "Distribution",
        f"A dot a run, {report.end_to_end.runs} after {report.warmup} of warm-up; "
        "box 25 to 75 %, strokes p50 and p99; each stage on its own scale.",
        strip_plot(rows, colours, "ms"),
    )
    yield from _figure(
        "Over time",
        "A line that climbs is a machine that slows down.",
        line_plot(rows, colours, "ms"),
    )
    yield from _figure(
        "Where the time goes", "Means, which add up.", share_bar(_shares(report), colours, "ms")
    )


def _figure(title: str, caption: str, svg: str) -> Iterator[str]:
    yield f'<h2>{escape(title)}</h2><p class="soft">{escape(caption)}</p><figure>{svg}</figure>'


def _shares(report: LatencyReport) -> dict[str, dict[str, float]]:
    """Mean milliseconds by stage, as the host waits for them and as the device measures them.

    The host's have an entry for the time outside the stages.
    """
    # Means, not percentiles: only means of the stages add up to the mean of the whole.
    host = {name: stats.mean_ms for name, stats in report.stages.items()}
    host[OUTSIDE] = max(0.0, report.end_to_end.mean_ms - sum(host.values()))
    device = {name: stats.mean_ms for name, stats in report.device.items()}
    device.pop(END_TO_END, None)
    return {"host": host, "device": device} if device else {"host": host}


def _statistics(report: LatencyReport) -> Iterator[str]:
    yield "<h2>Statistics, ms of one batch</h2>"
    yield from _stats_table({**report.stages, END_TO_END: report.end_to_end})
    if report.device:
        yield "<h2>Device time, ms</h2>"
        yield "<p class=soft>CUDA events around the execution, without copies.</p>"
        yield from _stats_table(report.device)


def _stats_table(stats_by_name: Mapping[str, LatencyStats]) -> Iterator[str]:
    rows = [(name, *stat_cells(stats)) for name, stats in stats_by_name.items()]
    yield from _table(("stage", *HEADINGS), rows, last=True)


def _roofline(roofline: Roofline) -> Iterator[str]:
    yield f"<h2>Prediction: lower bound on {escape(roofline.title)}, not measured</h2>"
    rows: list[tuple[str, ...]] = []
    for name, stage in roofline.stages.items():
        milliseconds = (stage.compute_ms, stage.memory_ms, stage.bound_ms)
        cells = [f"{value:.3f}" for value in milliseconds]
        reachable = "-" if stage.reachable_ms is None else f"{stage.reachable_ms:.3f}"
        measured = percent_cell(stage.measured_percent)
        rows.append((name, *cells, stage.bound_by, reachable, measured))

    # Stages run one after another, so their bounds add up; their arithmetic and traffic do not.
    whole = f"{roofline.end_to_end_ms:.3f}"
    reachable = "-" if roofline.reachable_ms is None else f"{roofline.reachable_ms:.3f}"
    measured = percent_cell(roofline.measured_percent)
    rows.append((END_TO_END, "", "", whole, "", reachable, measured))
    headings = (
        "stage", "compute ms", "memory ms", "bound ms", "bound by", "reachable ms", MEASURED
    )  # fmt: skip
    yield from _table(headings, rows, last=True)


def _layers(stage: str, layers: Sequence[LayerTime]) -> Iterator[str]:
    yield f"<h2>Layers of {escape(stage)}</h2>"
    note = f"A pass of its own, {RUNS} runs: profiling slows a stage. {op_text(layers)}"
    yield f'<p class="soft">{escape(note)}</p>'
    rows = [layer_cells(layer) for layer in layers]

    # A UNet has hundreds of layers: the slowest are shown, and the others can be unfolded.
    yield from _table(("layer", "op", "ms", "%"), rows[:ROWS])
    if rows[ROWS:]:
        yield f"<details><summary>{len(rows) - ROWS} more</summary>"
        yield from _table(("layer", "op", "ms", "%"), rows[ROWS:])
        yield "</details>"


def _conditions(report: LatencyReport) -> Iterator[str]:
    conditions = report.conditions
    device = conditions.device
    gpu = device.gpu
    l4t = f", L4T {device.l4t}" if device.l4t else ""
    jetpack = conditions.state.jetpack if conditions.state else None
    facts = [
        ("device", device_name(report)),
        ("processor", f"{device.cpu}, {conditions.threads} threads usable"),
        ("GPU", gpu.name if gpu else "none"),
        ("driver", gpu.driver if gpu and gpu.driver else UNKNOWN),
        ("CUDA", gpu.cuda if gpu and gpu.cuda else UNKNOWN),
        ("system", f"{device.os}, {device.arch}{l4t}"),
        ("JetPack", jetpack or UNKNOWN),
        ("prompts", conditions.prompts),
        ("memory", memory_text(report)),
        ("load", f"{report.load_seconds:.2f} s"),
    ]
    facts += state_facts(conditions)
    facts += [(f"version of {name}", version) for name, version in conditions.versions.items()]

    yield '<h2>Conditions</h2><table class="facts">'
    for name, value in facts:
        yield f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>"
    yield "</table>"


def _table(
    headings: Sequence[str], rows: Sequence[Sequence[str]], *, last: bool = False
) -> Iterator[str]:
    """A table whose first column has the names; with ``last`` the last row is a total, in bold."""
    heads = "".join(f"<th>{escape(text)}</th>" for text in headings)
    yield f'<div class="wide"><table><tr>{heads}</tr>'
    for index, (name, *cells) in enumerate(rows):
        mark = ' class="last"' if last and index == len(rows) - 1 else ""
        values = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        yield f"<tr{mark}><td class=name>{escape(name)}</td>{values}</tr>"
    yield "</table></div>"

"""Tables of GPU figures, for a report and for the documentation.

The pages of docs/ hold no figure of a GPU that a person typed. A page names a data file of
docs/latency between two marks, and this script writes the tables there::

    <!-- figures: NAME -->
    <!-- end of figures -->

    python -m benchmarks.gpu.tables          # says which pages are out of date
    python -m benchmarks.gpu.tables --write  # brings them up to date

tests/benchmarks/gpu/test_tables.py fails where a page departs from its data file.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from benchmarks.gpu.figures import Figure, PartResult, Report, read_figures

ROOT = Path(__file__).absolute().parents[2]
DATA = ROOT / "docs/latency"
BLOCK = re.compile(
    r"(<!-- figures: (?P<name>[\w.-]+) -->\n).*?(<!-- end of figures -->)", flags=re.DOTALL
)
TITLES = {
    "tests": "Tests on the GPU",
    "bundles": "Preparation",
    "rates": "The card's own rates",
    "torch": "One-step images with PyTorch",
    "backends": "One-step images with this project",
    "training": "Training steps",
}
# Fact -> heading of its column; a column appears where a figure of the part has the fact.
COLUMNS = {
    "share_percent": "% of the card's rates",
    "peak_device_mib": "peak memory, MiB",
    "predicted_fp32_mib": "predicted (FP32), MiB",
    "peak_percent_of_predicted": "% of predicted",
    "cuda_graph": "CUDA graph",
    "build_seconds": "engines built in, s",
}


def render(report: Report) -> str:
    """The whole report as Markdown."""
    lines = [f"# GPU figures: {report.device_name}", "", *_conditions(report), ""]
    lines.append(body(report))
    return "\n".join(lines)


def body(report: Report) -> str:
    """The tables of a report, and what it left out."""
    lines: list[str] = []
    notes: list[str] = []
    if report.conditions.note:
        lines += [f"**{report.conditions.note}**", ""]
    for name, part in report.parts.items():
        lines += [f"**{TITLES[name]}**", ""]
        lines += _part_lines(part, notes)
    if notes:
        lines += ["Not valid, because:", ""]
        lines += [f"- ({number}) {note}" for number, note in enumerate(notes, start=1)]
        lines.append("")
    return "\n".join(lines)


def _conditions(report: Report) -> Iterable[str]:
    conditions = report.conditions
    device = conditions.device
    versions = ", ".join(f"{name} {version}" for name, version in conditions.versions.items())
    yield f"- {conditions.producer}"
    yield f"- {device.cpu}, {device.cores} cores, {device.memory_mib} MiB, {device.os}"
    if device.gpu is None:
        yield "- no NVIDIA GPU: none was tested"
    else:
        gpu = device.gpu
        yield f"- {gpu.name}, SM {gpu.sm}, {gpu.memory_mib} MiB, driver {gpu.driver}"
    yield f"- {versions}"


def _part_lines(part: PartResult, notes: list[str]) -> list[str]:
    lines: list[str] = []
    if part.figures:
        lines += _table(part.figures, notes)
        lines.append("")
    facts = [f"{name} {value}" for name, value in part.facts.items()]
    if facts:
        lines += [f"{'; '.join(facts)}.", ""]
    if part.left_out:
        lines += ["Left out:", ""]
        lines += [f"- {name}: {reason}" for name, reason in part.left_out.items()]
        lines.append("")
    return lines


def _table(figures: Iterable[Figure], notes: list[str]) -> list[str]:
    figures = list(figures)
    columns = []
    for fact in COLUMNS:
        if any(fact in figure.facts for figure in figures):
            columns.append(fact)
    headings = ["", "model", "precision", "batch", "rate", "p50, ms", "p99 estimate, ms"]
    headings += [COLUMNS[fact] for fact in columns]
    headings.append("valid")
    lines = [_row(headings), _row(["---"] * len(headings))]
    for figure in figures:
        lines.append(_row(_cells(figure, columns, notes)))
    return lines


def _cells(figure: Figure, columns: list[str], notes: list[str]) -> list[str]:
    estimate = figure.validity.p99_estimate_ms
    cells = [
        f"{figure.workload}, {figure.engine}",
        figure.model,
        figure.precision,
        str(figure.batch),
        f"{figure.per_second:.4g} {figure.unit}",
        f"{figure.stats.p50_ms:.4g}",
        "-" if estimate is None else f"{estimate:.4g}",
    ]
    for fact in columns:
        value = figure.facts.get(fact, "-")
        cells.append(f"{value:g}" if isinstance(value, float | int) else value)
    cells.append(_valid(figure, notes))
    return cells


def _valid(figure: Figure, notes: list[str]) -> str:
    """'yes', or the numbers of the reasons below the tables."""
    if figure.validity.valid:
        return "yes"
    numbers = []
    for reason in figure.validity.reasons:
        if reason not in notes:
            notes.append(reason)
        numbers.append(f"({notes.index(reason) + 1})")
    return f"no {' '.join(numbers)}"


def _row(cells: Iterable[str]) -> str:
    escaped = [cell.replace("|", "\\|") for cell in cells]
    return f"| {' | '.join(escaped)} |"


def updated(page: str, data: Path = DATA) -> str:
    """A page with the tables of the data files that it names.

    Args:
        page: the text of a page.
        data: the folder of the data files.

    Raises:
        HipaError: a data file is missing or is not one of these.

    """

    def fill(match: re.Match[str]) -> str:
        report = read_figures(data / f"{match['name']}.json")
        return f"{match[1]}\n{body(report).strip()}\n\n{match[3]}"

    return BLOCK.sub(fill, page)


def main() -> int:
    """Compare the pages with their data files, or bring them up to date; the exit code."""
    parser = argparse.ArgumentParser(description="Tables of docs/ from the files of docs/latency.")
    parser.add_argument("--write", action="store_true", help="write the pages")
    request = parser.parse_args()
    stale = 0
    for path in sorted((ROOT / "docs").rglob("*.md")):
        before = path.read_text(encoding="utf-8")
        after = updated(before)
        if before == after:
            continue
        stale += 1
        print(f"{path.relative_to(ROOT)}: {'written' if request.write else 'out of date'}")
        if request.write:
            path.write_text(after, encoding="utf-8")
    return 0 if request.write else min(stale, 1)


if __name__ == "__main__":
    sys.exit(main())

"""The report of a self-test: as text for a terminal, and as Markdown for an issue."""

from __future__ import annotations

import json
from collections.abc import Iterator

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from hipa_deploy.doctor.self_test import SelfTest, Step

COLOURS = {
    "passed": "green",
    "failed": "red",
    "invalid": "yellow",
    "skipped": "yellow",
    "noted": "yellow",
}


def verdict(report: SelfTest) -> str:
    """The outcome in one line: how many checks passed, and what was skipped.

    Example:
        >>> verdict(report)
        'passed: 5 of 5 checks passed; 6 steps skipped'

    """
    checks = [check for step in report.steps for check in step.checks]
    judged = [check for check in checks if check.outcome in ("passed", "failed")]
    passed = [check for check in judged if check.outcome == "passed"]
    invalid = [check for check in checks if check.outcome == "invalid"]
    skipped = [step for step in report.steps if step.outcome == "skipped"]
    failed = [step.name for step in report.steps if step.outcome == "failed"]

    parts = [f"{len(passed)} of {len(judged)} checks passed"]
    if failed:
        parts.insert(0, f"failed steps: {', '.join(failed)}")
    if invalid:
        parts.append(f"{len(invalid)} times do not count")
    parts.append(f"{len(skipped)} steps skipped")
    return f"{'FAILED' if report.failed else 'passed'}: {'; '.join(parts)}"


def render_terminal(report: SelfTest) -> Group:
    """The report as tables for a terminal: the machine, then a row for each check."""
    facts = Table("", "", show_header=False, title="hipa-deploy self-test")
    for fact in _fact_lines(report):
        name, _, value = fact.partition(": ")
        facts.add_row(escape(name), escape(value))

    table = Table()
    for heading in ("", "measured", "bound", "outcome"):
        # Commands and names are there whole, on several lines where the terminal is narrow.
        table.add_column(heading, overflow="fold")
    for step in report.steps:
        table.add_section()
        what = "" if step.checks else escape("; ".join((step.detail, *step.notes)))
        table.add_row(f"[bold]{escape(step.name)}[/]", what, "", _coloured(step.outcome))
        for check in step.checks:
            cells = (f"  {check.name}", check.measured, check.bound)
            table.add_row(*(escape(cell) for cell in cells), _coloured(check.outcome))
        if step.checks and step.outcome == "failed":
            table.add_row("", escape(step.detail), "", "")
    return Group(facts, table, f"GPU: {escape(report.gpu)}.", f"{escape(verdict(report))}.")


def render_text(report: SelfTest) -> str:
    """The report as Markdown, its JSON at the end: readable in an issue, and by a program."""
    body = json.dumps(report.model_dump(mode="json"), indent=2)
    lines = [
        "# hipa-deploy self-test",
        "",
        f"**{verdict(report)}.**",
        "",
        *(f"- {fact}" for fact in _fact_lines(report)),
        "",
        _row("step", "outcome", "time", "what"),
        _row("---", "---", "---", "---"),
        *(_step_row(step) for step in report.steps),
        "",
        _row("step", "check", "measured", "bound", "outcome"),
        _row("---", "---", "---", "---", "---"),
        *_check_rows(report),
        "",
        "```json",
        body,
        "```",
    ]
    return "\n".join(lines) + "\n"


def _coloured(outcome: str) -> str:
    return f"[{COLOURS[outcome]}]{outcome}[/]"


def _fact_lines(report: SelfTest) -> list[str]:
    """Producer, machine, GPU and versions, a line each."""
    device = report.device
    machine = (
        f"machine: {device['jetson'] or device['cpu']}, {device['cores']} cores, "
        f"{device['memory_mib']} MiB, {device['os']}, {device['arch']}, "
        f"Python {device['python']}, L4T {device['l4t'] or '-'}"
    )
    gpu = "GPU: none answers"
    if device["gpu"]:
        facts = device["gpu"]
        gpu = (
            f"GPU: {facts['name']}, SM {facts['sm']}, {facts['memory_mib']} MiB, "
            f"driver {facts['driver']}, CUDA {facts['cuda']}"
        )
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    lines = [f"producer: {report.producer}, {report.created}", machine, gpu]
    if report.gpu:
        lines.append(f"tested: {report.gpu}")
    lines.append(f"versions: {versions}")
    return lines


def _step_row(step: Step) -> str:
    text = "; ".join((step.detail, *step.notes))
    return _row(step.name, step.outcome, f"{step.seconds:.1f} s", text)


def _check_rows(report: SelfTest) -> Iterator[str]:
    for step in report.steps:
        for check in step.checks:
            yield _row(step.name, check.name, check.measured, check.bound, check.outcome)


def _row(*cells: str) -> str:
    """A row of a Markdown table."""
    # A bar in a message would begin another cell of the table.
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"

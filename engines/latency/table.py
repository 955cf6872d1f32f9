"""Latency reports as tables: one for a terminal, many as one Markdown table to publish."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from rich.table import Table

from hipa_deploy.engines.device.sysfs import Clock
from hipa_deploy.engines.latency.machine_state import MachineState
from hipa_deploy.engines.latency.report import Conditions, LatencyReport, LatencyStats
from hipa_deploy.engines.latency.stage_timer import END_TO_END
from hipa_deploy.generate.runner import CPU_BACKENDS

HEADINGS = ("first", "p50", "p90", "p95", "p99", "mean", "std", "min")
UNKNOWN = "unknown"


def render_table(report: LatencyReport) -> Table:
    """The report for a terminal: a row a stage, in milliseconds.

    Conditions and warnings are in the caption.
    """
    conditions = report.conditions
    size = f"{conditions.width}x{conditions.height}"
    title = (
        f"Latency of a batch of {conditions.batch}, {size}, {conditions.precision}, "
        f"{conditions.backend}, in ms"
    )
    table = Table(title=title, caption=_caption(report), caption_justify="left")
    table.add_column("stage", no_wrap=True)
    for heading in HEADINGS:
        table.add_column(heading, justify="right")
    if report.device:
        table.add_column("device p50", justify="right")

    for name, stats in {**report.stages, END_TO_END: report.end_to_end}.items():
        cells = stat_cells(stats)
        if report.device:
            on_device = report.device.get(name)
            cells.append(_ms(on_device.p50_ms if on_device else None))
        table.add_row(name, *cells, style="bold" if name == END_TO_END else None)
    return table


def stat_cells(stats: LatencyStats) -> list[str]:
    """``HEADINGS``' values, milliseconds."""
    values = (
        stats.first_ms, stats.p50_ms, stats.p90_ms, stats.p95_ms, stats.p99_ms,
        stats.mean_ms, stats.std_ms, stats.min_ms,
    )  # fmt: skip
    return [_ms(value) for value in values]


def _ms(value: float | None) -> str:
    """Four digits or so: eight of them and a stage's name fill the 80 columns of a terminal."""
    return "-" if value is None else f"{value:.{2 if value < 100 else 1}f}"


def _caption(report: LatencyReport) -> str:
    conditions = report.conditions
    runs = report.end_to_end.runs
    few = "; p99 of fewer than 100 runs is close to the slowest" if runs < 100 else ""
    state = "; ".join(
        f"{name} {value}" for name, value in state_facts(conditions) if value != UNKNOWN
    )
    lines = [
        f"{runs} runs after {report.warmup} of warm-up{few}; {conditions.prompts}; "
        f"{device_name(report)}, {conditions.threads} threads; load {report.load_seconds:.2f} s; "
        f"throughput {report.throughput_images_per_second:.2f} images/s; {memory_text(report)}.",
        *([f"{state}."] if state else []),
        *(f"warning: {warning}." for warning in report.warnings),
    ]
    return "\n".join(lines)


def device_name(report: LatencyReport) -> str:
    """What computed: Jetson's module, the GPU, or the processor."""
    device = report.conditions.device
    if report.conditions.backend in CPU_BACKENDS or device.gpu is None:
        return f"{device.jetson} (CPU)" if device.jetson else device.cpu
    return device.jetson or device.gpu.name


def model_name(report: LatencyReport) -> str:
    """The base model, and the adaptor that was merged into it."""
    facts = report.conditions.bundle
    if facts is None:
        return UNKNOWN
    return f"{facts.base_model} + {facts.adaptor}" if facts.adaptor else facts.base_model


def memory_text(report: LatencyReport) -> str:
    """Peak host memory, and the device's where the runners tell."""
    host = "unknown" if report.peak_rss_mib is None else f"{report.peak_rss_mib} MiB"
    if report.peak_device_mib is None:
        return f"peak host memory {host}"
    return f"peak host memory {host}, device memory {report.peak_device_mib:.0f} MiB"


def state_facts(conditions: Conditions) -> list[tuple[str, str]]:
    """(what, value) of the machine's state, 'unknown' where the machine does not say.

    Clocks and temperatures are those after the runs.
    """
    state = conditions.state
    if state is None:
        return []
    clocks = [(f"{name} clock", _clock(clock)) for name, clock in state.after.clocks.items()]
    return [
        ("power mode", state.power_mode or UNKNOWN),
        *(clocks or [("clocks", UNKNOWN)]),
        ("cpu governor", state.cpu_governor or UNKNOWN),
        ("gpu governor", state.gpu_governor or UNKNOWN),
        ("hottest", _hottest(state)),
        ("throttling", _throttling(state)),
        ("power", UNKNOWN if state.after.power_w is None else f"{state.after.power_w:.1f} W"),
        ("power limit", UNKNOWN if state.power_limit_w is None else f"{state.power_limit_w:.0f} W"),
        ("fan", UNKNOWN if state.after.fan_rpm is None else f"{state.after.fan_rpm} rpm"),
        (
            "other processes",
            UNKNOWN if state.others_cores is None else f"{state.others_cores:.1f} cores",
        ),
    ]


def _clock(clock: Clock) -> str:
    if clock.now_mhz is None or clock.max_mhz is None:
        return UNKNOWN if clock.now_mhz is None else f"{clock.now_mhz:.0f} MHz"
    return f"{clock.now_mhz:.0f} of {clock.max_mhz:.0f} MHz{' (locked)' if clock.locked else ''}"


def _hottest(state: MachineState) -> str:
    zones = state.after.temperatures_c
    name = max(zones, key=lambda zone: zones[zone], default=None)
    return UNKNOWN if name is None else f"{zones[name]:.0f} °C ({name})"


def _throttling(state: MachineState) -> str:
    lists = [reading.throttled_by for reading in (state.before, state.after)]
    active = sorted({name for found in lists if found for name in found})
    if active:
        return ", ".join(active)
    return UNKNOWN if None in lists else "none"


def markdown_table(reports: Sequence[LatencyReport]) -> str:
    """One row a report, ready to paste: what, where, under which conditions, and how long.

    Each stage has a column, its p50; a stage that a report does not have is '-'. All times are
    milliseconds of one batch. '% of bound' is the measured p50 over the roofline's lower bound,
    where the device's rates are known. Warnings are notes below the table.
    """
    stages = list(dict.fromkeys(name for report in reports for name in report.stages))
    headings = (
        "device", "power mode", "GPU clock, MHz", "L4T / JetPack", "backend", "model", "decoder",
        "size", "precision", "batch", *(f"{stage} p50" for stage in stages),
        "end to end p50", "p99", "% of bound", "runs", "notes",
    )  # fmt: skip
    notes = list(dict.fromkeys(warning for report in reports for warning in report.warnings))
    rows = [_row(report, stages, notes) for report in reports]
    lines = [_line(headings), _line("---" for _ in headings), *(_line(row) for row in rows)]
    numbered = [f"[{number}] {note}" for number, note in enumerate(notes, start=1)]
    return "\n".join([*lines, "", "Latency in ms of one batch.", *numbered]) + "\n"


def _line(cells: Iterable[str]) -> str:
    escaped = [cell.replace("|", "\\|") for cell in cells]
    return "| " + " | ".join(escaped) + " |"


def _row(report: LatencyReport, stages: Sequence[str], notes: Sequence[str]) -> list[str]:
    conditions = report.conditions
    facts = conditions.bundle
    state = conditions.state
    times = [_ms(report.stages[name].p50_ms) if name in report.stages else "-" for name in stages]
    percent = report.roofline.measured_percent if report.roofline else None
    return [
        device_name(report),
        _or_dash(state.power_mode if state else None),
        _gpu_clock(conditions, state),
        _release(conditions, state),
        f"{conditions.backend} {_version(conditions)}".strip(),
        model_name(report),
        _or_dash(facts.decoder if facts else None),
        f"{conditions.width}x{conditions.height}",
        conditions.precision,
        str(conditions.batch),
        *times,
        _ms(report.end_to_end.p50_ms),
        _ms(report.end_to_end.p99_ms),
        "-" if percent is None else f"{percent:.0f}",
        str(report.end_to_end.runs),
        " ".join(f"[{notes.index(warning) + 1}]" for warning in report.warnings),
    ]


def _or_dash(text: str | None) -> str:
    return text or "-"


def _gpu_clock(conditions: Conditions, state: MachineState | None) -> str:
    clock = (
        state.after.clocks.get("gpu") if state and conditions.backend not in CPU_BACKENDS else None
    )
    return "-" if clock is None else _clock(clock).replace(" MHz", "")


def _release(conditions: Conditions, state: MachineState | None) -> str:
    parts = [conditions.device.l4t, state.jetpack if state else None]
    return " / ".join(part for part in parts if part) or "-"


def _version(conditions: Conditions) -> str:
    """The version of the package that computed."""
    packages = {"tensorrt": "tensorrt", "rtx": "tensorrt-rtx", "onnxruntime": "onnxruntime"}
    package = packages.get(conditions.backend)
    for name in (package,) if package else ("onnxruntime-gpu", "onnxruntime"):
        if name in conditions.versions:
            return _short(conditions.versions[name])
    return ""


def _short(version: str) -> str:
    """'10.3.0.30' of '10.3.0.30', '1.23.0' of '1.23.0+cu12'."""
    return re.split(r"[+]", version)[0]

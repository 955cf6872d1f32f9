"""Latency reports as tables: one for a terminal, many as one Markdown table to publish."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.table import Table

from hipa_deploy.engines.device.sysfs import Clock
from hipa_deploy.engines.latency.machine_state import MachineState
from hipa_deploy.engines.latency.report import (
    Conditions,
    LatencyReport,
    LatencyStats,
    stage_stats,
)
from hipa_deploy.engines.latency.stage_timer import END_TO_END
from hipa_deploy.generate.runner import CPU_BACKENDS

HEADINGS = ("first", "p50", "p90", "p95", "p99", "mean", "std", "min")
UNKNOWN = "unknown"

# ONNX Runtime on a GPU has a package of its own.
_ONNXRUNTIME_GPU = ("onnxruntime-gpu", "onnxruntime")
# The packages that may compute for a backend, the most likely first.
_PACKAGES = {
    "tensorrt": ("tensorrt",),
    "rtx": ("tensorrt-rtx",),
    "openvino": ("openvino",),
    "openvino-bf16": ("openvino",),
    "onnxruntime": ("onnxruntime",),
    "onnxruntime-cuda": _ONNXRUNTIME_GPU,
    "onnxruntime-tensorrt": _ONNXRUNTIME_GPU,
    "onnxruntime-rtx": (
        "onnxruntime-ep-nv-tensorrt-rtx-cu13",
        "onnxruntime-ep-nv-tensorrt-rtx-cu12",
    ),
}


def render_table(report: LatencyReport) -> Table:
    """Make the table of a report for a terminal: a row for each stage, in milliseconds.

    Conditions and warnings are in the caption.
    """
    conditions = report.conditions
    size = f"{conditions.width}x{conditions.height}"
    title = (
        f"Latency of a batch of {conditions.batch}, {size}, {conditions.precision}, "
        f"{conditions.backend}{_memory_mode(conditions)}, in ms"
    )
    table = Table(title=title, caption=_caption(report), caption_justify="left")
    table.add_column("stage", no_wrap=True)
    for heading in HEADINGS:
        table.add_column(heading, justify="right")
    if report.device:
        table.add_column("device p50", justify="right")

    for name in (*stage_stats(report), END_TO_END):
        stats = report.end_to_end if name == END_TO_END else report.stages.get(name)
        cells = ["-"] * len(HEADINGS) if stats is None else stat_cells(stats)
        if report.device:
            on_device = report.device.get(name)
            cells.append(_ms(on_device.p50_ms if on_device else None))
        table.add_row(name, *cells, style="bold" if name == END_TO_END else None)
    return table


def stat_cells(stats: LatencyStats) -> list[str]:
    """The values of ``HEADINGS`` as text, in milliseconds."""
    values = (
        stats.first_ms, stats.p50_ms, stats.p90_ms, stats.p95_ms, stats.p99_ms,
        stats.mean_ms, stats.std_ms, stats.min_ms,
    )  # fmt: skip
    return [_ms(value) for value in values]


def _ms(value: float | None) -> str:
    """Milliseconds with about four digits; '-' for None.

    Eight such numbers and the name of a stage fill the 80 columns of a terminal.
    """
    if value is None:
        return "-"
    return f"{value:.2f}" if value < 100 else f"{value:.1f}"


def _caption(report: LatencyReport) -> str:
    conditions = report.conditions
    runs = report.end_to_end.runs
    few = "; p99 of fewer than 100 runs is close to the slowest" if runs < 100 else ""
    if report.validity and report.validity.p99_estimate_ms:
        few = f"; p99 is below {_ms(report.validity.p99_estimate_ms)} with 99 % confidence"
    lines = [
        f"{runs} runs after {report.warmup} of warm-up{few}; {conditions.prompts}; "
        f"{device_name(report)}, {conditions.threads} threads; load {report.load_seconds:.2f} s; "
        f"throughput {report.throughput_images_per_second:.2f} images/s; {memory_text(report)}."
    ]

    if conditions.low_memory:
        lines.append("Low memory: end to end contains the loading of stages, the stages do not.")

    # A terminal is small: what is not known is left out here. The HTML page has it.
    known = []
    for name, value in state_facts(conditions):
        if value != UNKNOWN:
            known.append(f"{name} {value}")
    if known:
        lines.append(f"{'; '.join(known)}.")
    if report.validity:
        lines.append(f"{report.validity}.")
    lines += [f"warning: {warning}." for warning in report.warnings]
    return "\n".join(lines)


def device_name(report: LatencyReport) -> str:
    """The name of the device that computed the images: a Jetson, a GPU or a processor."""
    device = report.conditions.device
    if report.conditions.backend in CPU_BACKENDS or device.gpu is None:
        return f"{device.jetson} (CPU)" if device.jetson else device.cpu
    return device.jetson or device.gpu.name


def model_name(report: LatencyReport) -> str:
    """The name of the base model, with the adaptor that was merged into it."""
    facts = report.conditions.bundle
    if facts is None:
        return UNKNOWN
    return f"{facts.base_model} + {facts.adaptor}" if facts.adaptor else facts.base_model


def memory_text(report: LatencyReport) -> str:
    """Peak host memory, and device memory if the runners measure it."""
    host = UNKNOWN if report.peak_rss_mib is None else f"{report.peak_rss_mib} MiB"
    if report.peak_device_mib is None:
        return f"peak host memory {host}"
    return f"peak host memory {host}, device memory {report.peak_device_mib:.0f} MiB"


def state_facts(conditions: Conditions) -> list[tuple[str, str]]:
    """The machine's state as pairs of name and value; 'unknown' if the machine does not report it.

    Clocks, temperatures, power and fan are those after the runs. Empty for reports of schema 1.
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
        ("power", _quantity(state.after.power_w, 1, "W")),
        ("power limit", _quantity(state.power_limit_w, 0, "W")),
        ("fan", _quantity(state.after.fan_rpm, 0, "rpm")),
        ("other processes", _quantity(state.others_cores, 1, "cores")),
    ]


def _quantity(value: float | None, digits: int, unit: str) -> str:
    return UNKNOWN if value is None else f"{value:.{digits}f} {unit}"


def _clock(clock: Clock) -> str:
    if clock.now_mhz is None:
        return UNKNOWN
    if clock.max_mhz is None:
        return f"{clock.now_mhz:.0f} MHz"
    locked = " (locked)" if clock.locked else ""
    return f"{clock.now_mhz:.0f} of {clock.max_mhz:.0f} MHz{locked}"


def _hottest(state: MachineState) -> str:
    zones = state.after.temperatures_c
    name = max(zones, key=lambda zone: zones[zone], default=None)
    return UNKNOWN if name is None else f"{zones[name]:.0f} °C ({name})"


def _throttling(state: MachineState) -> str:
    before = state.before.throttled_by
    after = state.after.throttled_by
    active = sorted({*(before or ()), *(after or ())})
    if active:
        return ", ".join(active)
    # 'none' only if both readings say so.
    return UNKNOWN if before is None or after is None else "none"


def markdown_table(reports: Sequence[LatencyReport]) -> str:
    """Make a Markdown table to publish, with a row for each report.

    Each stage has a column with its p50, which is '-' if a report does not have that stage. Stages
    of engines are as the device measures them. All times are milliseconds of one batch. '% of
    bound' is the measured p50 over the lower bound of the roofline, if the rates of the device are
    known. Warnings are notes below the table.
    """
    # Dictionaries keep the order of first appearance and drop duplicates.
    stage_names: dict[str, None] = {}
    warnings: dict[str, None] = {}
    for report in reports:
        stage_names |= dict.fromkeys(stage_stats(report))
        warnings |= dict.fromkeys(_notes(report))
    stages = list(stage_names)
    notes = list(warnings)

    headings = (
        "device", "power mode", "GPU clock, MHz", "L4T / JetPack", "backend", "model", "decoder",
        "size", "precision", "batch", *(f"{stage} p50" for stage in stages),
        "end to end p50", "p99", "% of bound", "runs", "notes",
    )  # fmt: skip
    lines = [_line(headings), _line(["---"] * len(headings))]
    lines += [_line(_row(report, stages, notes)) for report in reports]
    lines += ["", f"Latency in ms of one batch.{_on_device(reports)}"]
    lines += [f"[{number}] {note}" for number, note in enumerate(notes, start=1)]
    return "\n".join(lines) + "\n"


def _on_device(reports: Sequence[LatencyReport]) -> str:
    """What has to be said of stages that only the device measured; empty where there are none."""
    for report in reports:
        if stage_stats(report).keys() > report.stages.keys():
            return " Stages that run in one call, 'pipeline': as the device measures them."
    return ""


def _line(cells: Iterable[str]) -> str:
    # A bar would end the cell.
    escaped = [cell.replace("|", "\\|") for cell in cells]
    return "| " + " | ".join(escaped) + " |"


def _row(report: LatencyReport, stages: Sequence[str], notes: Sequence[str]) -> list[str]:
    conditions = report.conditions
    facts = conditions.bundle
    state = conditions.state
    measured = stage_stats(report)
    times = []
    for name in stages:
        stats = measured.get(name)
        times.append(_ms(stats.p50_ms if stats else None))
    percent = report.roofline.measured_percent if report.roofline else None
    references = [f"[{notes.index(note) + 1}]" for note in _notes(report)]
    return [
        device_name(report),
        _or_dash(state.power_mode if state else None),
        _gpu_clock(conditions, state),
        _release(conditions, state),
        f"{conditions.backend} {_version(conditions)}".strip() + _memory_mode(conditions),
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
        " ".join(references),
    ]


def _notes(report: LatencyReport) -> list[str]:
    """What a reader of the row must know: that it is invalid and why, and its warnings."""
    validity = report.validity
    invalid = [str(validity)] if validity and not validity.valid else []
    return [*invalid, *report.warnings]


def _or_dash(text: str | None) -> str:
    return text or "-"


def _gpu_clock(conditions: Conditions, state: MachineState | None) -> str:
    # The clock of a GPU that took no part would mislead.
    if state is None or conditions.backend in CPU_BACKENDS:
        return "-"
    clock = state.after.clocks.get("gpu")
    return "-" if clock is None else _clock(clock).replace(" MHz", "")


def _release(conditions: Conditions, state: MachineState | None) -> str:
    parts = [conditions.device.l4t, state.jetpack if state else None]
    return " / ".join(part for part in parts if part) or "-"


def _memory_mode(conditions: Conditions) -> str:
    return ", low memory" if conditions.low_memory else ""


def _version(conditions: Conditions) -> str:
    """The version of the package that computed; empty if the report does not have it."""
    for name in _PACKAGES.get(conditions.backend, ()):
        if name in conditions.versions:
            return _short(conditions.versions[name])
    return ""


def _short(version: str) -> str:
    """The version without its local part: '1.23.0' for '1.23.0+cu12'."""
    return version.split("+")[0]

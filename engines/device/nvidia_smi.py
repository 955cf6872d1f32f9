"""What nvidia-smi says of one GPU: clocks, temperature, power and what holds the clocks down."""

from __future__ import annotations

import subprocess

FIELDS = (
    "name", "clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem", "temperature.gpu",
    "power.draw", "power.limit", "pstate", "persistence_mode",
)  # fmt: skip
REASONS = "reasons"
# One name since driver 535, another before. A query with a name that the driver does not know fails
# as a whole.
_REASONS_FIELDS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
# NVML's bits that are throttling. Idle, application clocks, display clocks and sync boost are
# settings, and no throttling.
# https://docs.nvidia.com/deploy/nvml-api/group__nvmlClocksEventReasons.html
_THROTTLES = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
}


def ask_smi(gpu_name: str | None) -> dict[str, str]:
    """``FIELDS`` and ``REASONS`` with nvidia-smi's words for the GPU of that name.

    The answer is empty without nvidia-smi. It is empty too where several GPUs answer and not
    exactly one has the name: CUDA and nvidia-smi count them in different orders.
    """
    for reasons in _REASONS_FIELDS:
        rows = _query((*FIELDS, reasons))
        if not rows:
            continue
        if len(rows) > 1:
            rows = [row for row in rows if row["name"] == gpu_name]
        if len(rows) != 1:
            return {}
        return {**rows[0], REASONS: rows[0][reasons]}
    return {}


def _query(fields: tuple[str, ...]) -> list[dict[str, str]]:
    command = ("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits")
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, timeout=10, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.splitlines()]
    return [dict(zip(fields, row, strict=True)) for row in rows if len(row) == len(fields)]


def smi_number(answer: dict[str, str], field: str) -> float | None:
    """A field as a number; None where it is '[N/A]' or missing."""
    try:
        return float(answer.get(field, ""))
    except ValueError:
        return None


def smi_text(answer: dict[str, str], field: str) -> str | None:
    """A field's word; None where it is '[N/A]' or missing."""
    word = answer.get(field, "")
    return None if not word or word.startswith("[") else word


def smi_throttles(answer: dict[str, str]) -> tuple[str, ...] | None:
    """What holds the clocks down: power, temperature or a slowdown.

    None where the driver does not say.
    """
    try:
        mask = int(answer.get(REASONS, ""), 16)
    except ValueError:
        return None
    return tuple(name for bit, name in _THROTTLES.items() if mask & bit)

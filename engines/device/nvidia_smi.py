"""One GPU according to nvidia-smi: clocks, temperature, power, and what throttles the clocks."""

from __future__ import annotations

import os
import subprocess

FIELDS = (
    "name", "clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem", "temperature.gpu",
    "power.draw", "power.limit", "pstate", "persistence_mode",
)  # fmt: skip
REASONS = "reasons"
# The field has one name since driver 535 and had another before. A query with a name that the
# driver does not know fails as a whole, so each name needs a query of its own.
_REASONS_FIELDS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
# The bits of NVML that mean throttling. Its other bits (idle, application clocks, display clocks,
# sync boost) are settings.
# https://docs.nvidia.com/deploy/nvml-api/group__nvmlClocksEventReasons.html
_THROTTLES = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
}


def ask_smi(gpu_name: str | None, address: str | None = None) -> dict[str, str]:
    """Query ``FIELDS`` and ``REASONS`` of one GPU, as text by field.

    The answer is empty without nvidia-smi. Without an address it is also empty if there are several
    GPUs and not exactly one has the name: their numbers do not help, because CUDA and nvidia-smi
    count GPUs in different orders. They count alike with CUDA_DEVICE_ORDER=PCI_BUS_ID in the
    environment, and then the first GPU that CUDA_VISIBLE_DEVICES names is asked.

    Args:
        gpu_name: its name; None where it is not known.
        address: its PCI address, '00000000:3b:00.0'; None where it is not known.

    """
    if address is not None:
        found = _ask(gpu_name, address)
        # The GPU of a Jetson has no such address.
        if found:
            return found
    return _ask(gpu_name, first_visible())


def _ask(gpu_name: str | None, chosen: str | None) -> dict[str, str]:
    for reasons in _REASONS_FIELDS:
        rows = _query((*FIELDS, reasons), chosen)
        if not rows:
            continue
        if len(rows) > 1:
            rows = [row for row in rows if row["name"] == gpu_name]
        if len(rows) != 1:
            return {}
        return {**rows[0], REASONS: rows[0][reasons]}
    return {}


def _query(fields: tuple[str, ...], chosen: str | None) -> list[dict[str, str]]:
    """The rows of nvidia-smi's table: of the GPU that it calls ``chosen``, or of all for None."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    if chosen is not None:
        command.append(f"--id={chosen}")
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=10, check=True, encoding="utf-8"
        )
    except (OSError, subprocess.SubprocessError):
        return []
    rows = []
    for line in done.stdout.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        # Other lines are messages, not a GPU.
        if len(cells) == len(fields):
            rows.append(dict(zip(fields, cells, strict=True)))
    return rows


def _first_entry() -> str:
    """What CUDA_VISIBLE_DEVICES names first; empty where it is empty or not set."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip()


def hides_all_gpus() -> bool:
    """Whether CUDA_VISIBLE_DEVICES leaves CUDA no GPU, however many nvidia-smi shows.

    CUDA takes the variable's entries up to the first that names no GPU. So an empty one hides all,
    and so does one that begins with -1 or, as in a job of Slurm without a GPU, with NoDevFiles.
    """
    if "CUDA_VISIBLE_DEVICES" not in os.environ:
        return False
    first = _first_entry()
    return not (first.isdecimal() or first.startswith(("GPU-", "MIG-")))


def first_visible_number() -> int:
    """The number of CUDA's first GPU as CUDA counts; 0 where the environment gives no number."""
    first = _first_entry()
    return int(first) if first.isdecimal() else 0


def first_visible() -> str | None:
    """What nvidia-smi calls CUDA's first GPU; None where the environment does not tell."""
    first = _first_entry()
    if first.startswith("GPU-"):  # a UUID is the same for both
        return first
    if os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID":
        return first or "0"
    return None


def smi_number(answer: dict[str, str], field: str) -> float | None:
    """A field as a number; None if it is '[N/A]' or missing."""
    try:
        return float(answer.get(field, ""))
    except ValueError:
        return None


def smi_text(answer: dict[str, str], field: str) -> str | None:
    """A field as text; None if it is '[N/A]' or missing."""
    text = answer.get(field, "")
    return None if not text or text.startswith("[") else text


def smi_throttles(answer: dict[str, str]) -> tuple[str, ...] | None:
    """What throttles the clocks: power, temperature or a slowdown; None if it is not reported."""
    try:
        mask = int(answer.get(REASONS, ""), 16)
    except ValueError:
        return None
    return tuple(name for bit, name in _THROTTLES.items() if mask & bit)

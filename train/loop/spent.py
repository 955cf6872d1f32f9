"""How long a run has trained, and on what: summed over all its sessions."""

from __future__ import annotations

import platform
import re
import time
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from hipa_deploy.models.adaptor_folder import TrainingTime
from hipa_deploy.train.loop.checkpoint import damaged

_LIST = TypeAdapter(tuple[TrainingTime, ...])


class Spent:
    """The clock of a run: from its making, or from ``load``, on top of what a checkpoint says.

    Args:
        device: That the run trains on.
        processes: How many train together.

    Example:
        >>> spent = Spent(torch.device("cpu"), processes=1)
        >>> spent.until(step=10)[0].steps
        10

    """

    def __init__(self, device: torch.device, processes: int) -> None:
        self.device = device
        self.processes = processes
        self.before: tuple[TrainingTime, ...] = ()
        self.first_step = 0
        self.started = time.monotonic()

    def load(self, stored: Any, step: int, path: Path) -> None:
        """Go on from a checkpoint; one of an older version has None.

        Raises:
            HipaError: the checkpoint is damaged.

        """
        try:
            self.before = _LIST.validate_python(stored or ())
        except ValidationError:
            raise damaged(path, "its training time cannot be read") from None
        self.first_step = step
        self.started = time.monotonic()

    def until(self, step: int) -> tuple[TrainingTime, ...]:
        """The time on each device up to a step, in the order in which the devices came."""
        now = TrainingTime(
            device=self.device.type,
            card=card_name(self.device),
            processes=self.processes,
            hours=(time.monotonic() - self.started) / 3600,
            steps=step - self.first_step,
        )
        return summed([*self.before, now])


def summed(times: list[TrainingTime]) -> tuple[TrainingTime, ...]:
    """One entry for each device, card and number of processes."""
    found: dict[tuple[str, str, int], TrainingTime] = {}
    for entry in times:
        key = (entry.device, entry.card, entry.processes)
        if key in found:
            more = {
                "hours": found[key].hours + entry.hours,
                "steps": found[key].steps + entry.steps,
            }
            entry = entry.model_copy(update=more)
        found[key] = entry
    return tuple(found.values())


def card_name(device: torch.device) -> str:
    """The GPU's name as its driver says it, or the CPU's as the system does.

    Example:
        >>> card_name(torch.device("cpu"))
        'Intel(R) Xeon(R) CPU @ 2.20GHz'

    """
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    name = model[1].strip() if model else platform.processor() or platform.machine()
    return name[:200] or "unknown"

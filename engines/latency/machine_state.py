"""The state of the machine around a measurement.

It is clocks, temperatures, throttling, the power mode and what other processes took.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from hipa_deploy.engines.device import sysfs
from hipa_deploy.engines.device.nvidia_smi import ask_smi, smi_number, smi_text, smi_throttles
from hipa_deploy.engines.device.sysfs import Clock
from hipa_deploy.record import Record

_NEAR = 0.95  # of its maximum, and a clock counts as at it


class Reading(Record):
    """One moment. A value of None, or a name that is missing, means that this machine does not say.

    ``overcurrent_events`` are counted since boot. ``busy_seconds`` is the processor time of
    everything since boot, ``own_seconds`` that of this process.
    """

    clocks: dict[str, Clock]
    temperatures_c: dict[str, float]
    throttled_by: tuple[str, ...] | None
    overcurrent_events: int | None
    power_w: float | None
    fan_rpm: int | None
    load_average: float | None
    busy_seconds: float | None
    own_seconds: float
    at_seconds: float


class MachineState(Record):
    """Settings, and a reading right before and right after the timed runs.

    ``power_mode`` and ``jetpack`` are Jetson's. ``power_limit_w``, ``performance_state`` and
    ``persistence`` are nvidia-smi's. ``others_cores`` is how many cores' time other processes took
    during the runs.
    """

    power_mode: str | None
    jetpack: str | None
    cpu_governor: str | None
    gpu_governor: str | None
    power_limit_w: float | None
    performance_state: str | None
    persistence: str | None
    others_cores: float | None
    before: Reading
    after: Reading


class Machine:
    """Reads the state of this machine.

    Args:
        root: stands for '/'; tests give another.
        gpu_name: the GPU to ask nvidia-smi for.

    """

    def __init__(self, root: Path = Path("/"), gpu_name: str | None = None) -> None:
        self._root = root
        self._gpu_name = gpu_name

    def read(self) -> Reading:
        """The state of this moment.

        Clocks come first: an idle GPU lowers its own within milliseconds.
        """
        clocks = sysfs.clocks(self._root)
        throttles = sysfs.throttled_by(self._root)
        smi = ask_smi(self._gpu_name)

        # Where both say the same thing, the files win: on a Jetson they are the module's own.
        temperatures = sysfs.temperatures(self._root)
        celsius = smi_number(smi, "temperature.gpu")
        if celsius is not None:
            temperatures = {"gpu": celsius, **temperatures}
        watts = sysfs.module_watts(self._root)
        return Reading(
            clocks={**_smi_clocks(smi), **clocks},
            temperatures_c=temperatures,
            throttled_by=_joined(throttles, smi_throttles(smi)),
            overcurrent_events=sysfs.overcurrent_events(self._root),
            power_w=smi_number(smi, "power.draw") if watts is None else watts,
            fan_rpm=sysfs.fan_rpm(self._root),
            load_average=sysfs.load_average(self._root),
            busy_seconds=sysfs.busy_seconds(self._root),
            own_seconds=sum(os.times()[:2]),
            at_seconds=time.monotonic(),
        )

    def state(self, before: Reading, after: Reading) -> MachineState:
        """The settings now, with two readings."""
        smi = ask_smi(self._gpu_name)
        return MachineState(
            power_mode=sysfs.power_mode(self._root),
            jetpack=sysfs.jetpack(self._root),
            cpu_governor=sysfs.cpu_governor(self._root),
            gpu_governor=sysfs.gpu_governor(self._root),
            power_limit_w=smi_number(smi, "power.limit"),
            performance_state=smi_text(smi, "pstate"),
            persistence=smi_text(smi, "persistence_mode"),
            others_cores=_others_cores(before, after),
            before=before,
            after=after,
        )


def _smi_clocks(smi: dict[str, str]) -> dict[str, Clock]:
    clocks = {}
    for name, field in (("gpu", "sm"), ("memory", "mem")):
        now = smi_number(smi, f"clocks.{field}")
        if now is not None:
            highest = smi_number(smi, f"clocks.max.{field}")
            clocks[name] = Clock(now_mhz=now, max_mhz=highest)
    return clocks


def _joined(
    first: tuple[str, ...] | None, second: tuple[str, ...] | None
) -> tuple[str, ...] | None:
    return None if first is None and second is None else (first or ()) + (second or ())


def _others_cores(before: Reading, after: Reading) -> float | None:
    elapsed = after.at_seconds - before.at_seconds
    # /proc/stat counts in 10 ms: in a shorter time its figure is mostly rounding.
    if before.busy_seconds is None or after.busy_seconds is None or elapsed < 0.1:
        return None
    others = (after.busy_seconds - before.busy_seconds) - (after.own_seconds - before.own_seconds)
    return round(max(0.0, others / elapsed), 2)


def state_warnings(state: MachineState, *, cores: int, on_gpu: bool) -> tuple[str, ...]:
    """What makes the numbers doubtful, a sentence each: throttling, low clocks, other processes.

    ``cores`` is what this process may use; ``on_gpu`` says whether the GPU's clocks matter.
    """
    return (*_throttling(state), *_low_clocks(state, on_gpu), *_company(state, cores))


def _throttling(state: MachineState) -> list[str]:
    found = []
    for when, reading in (("before", state.before), ("after", state.after)):
        if reading.throttled_by:
            found.append(f"throttled {when} the runs: {', '.join(reading.throttled_by)}")
    first = state.before.overcurrent_events
    last = state.after.overcurrent_events
    if first is not None and last is not None and last > first:
        found.append(
            f"{last - first} throttling events by over-current or under-voltage during the runs"
        )
    return found


def _low_clocks(state: MachineState, on_gpu: bool) -> list[str]:
    found = []
    for name in ("gpu", "memory", "cpu") if on_gpu else ("cpu",):
        readings = [state.before, state.after]
        pair = [reading.clocks[name] for reading in readings if name in reading.clocks]
        low = min(pair, key=lambda clock: clock.now_mhz or 0, default=None)
        if low and low.now_mhz is not None and low.max_mhz and low.now_mhz < _NEAR * low.max_mhz:
            found.append(f"the {name} clock was {low.now_mhz:.0f} of {low.max_mhz:.0f} MHz")
    return found


def _company(state: MachineState, cores: int) -> list[str]:
    if state.others_cores is None or state.others_cores < 0.1 * cores:
        return []
    return [f"other processes took {state.others_cores:.1f} cores' time during the runs"]

"""The state of the machine around a measurement, and the warnings that follow from it.

The state is clocks, temperatures, throttling, the power mode, and the processor time that other
processes took.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from hipa_deploy.engines.device import sysfs
from hipa_deploy.engines.device.nvidia_smi import ask_smi, smi_number, smi_text, smi_throttles
from hipa_deploy.engines.device.sysfs import Clock
from hipa_deploy.record import Record

if TYPE_CHECKING:
    from typing_extensions import Self

# A clock above this share of its maximum counts as at its maximum.
_NEAR = 0.95
# Readings closer together than this, in seconds, say nothing of other processes: /proc/stat counts
# in steps of 10 ms.
_LEAST_SECONDS = 0.1
# Between two readings of a ``Watch``: often enough for several in the shortest valid measurement,
# seldom enough that nvidia-smi does not disturb it.
WATCH_SECONDS = 1.0
# Other processes matter if they took this share of the cores that this process may use.
_OTHERS_SHARE = 0.1


class Reading(Record):
    """The state of the machine at one time.

    A value of None, or a name that is missing, means that this machine does not report it.

    Attributes:
        clocks: by name: 'gpu', 'memory' and 'cpu'.
        temperatures_c: degrees Celsius by thermal zone.
        throttled_by: what throttles the clocks; empty if nothing does.
        overcurrent_events: throttling by over-current or under-voltage since boot.
        power_w: watts that the GPU, or the Jetson module, draws.
        fan_rpm: turns of the fan a minute.
        load_average: processes that ran or waited, averaged over the last minute.
        busy_seconds: processor time of all processes since boot.
        own_seconds: processor time of this process.
        at_seconds: the time of the reading, from an arbitrary start.

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
    """The settings of the machine, and a reading right before and right after the timed runs.

    Attributes:
        power_mode: of a Jetson, such as 'MAXN_SUPER (mode 2)'.
        jetpack: the version of JetPack on a Jetson.
        cpu_governor: the frequency governors of the cores.
        gpu_governor: the frequency governor of a Jetson's GPU.
        power_limit_w: watts, from nvidia-smi.
        performance_state: such as 'P2', from nvidia-smi.
        persistence: the persistence mode, from nvidia-smi.
        others_cores: processor time that other processes took during the runs, as a number of
            cores.
        before: the reading before the timed runs.
        after: the reading after them.

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
        root: the folder that stands for '/'; for tests.
        gpu_name: the GPU that nvidia-smi is queried for.
        gpu_address: its PCI address, which tells GPUs of one name apart; None where it is not
            known.

    """

    def __init__(
        self,
        root: Path = Path("/"),
        gpu_name: str | None = None,
        gpu_address: str | None = None,
    ) -> None:
        self._root = root
        self._gpu_name = gpu_name
        self._gpu_address = gpu_address

    def read(self) -> Reading:
        """Read the state as it is now."""
        # Clocks come first: a GPU that has become idle lowers its own within milliseconds.
        clocks = sysfs.clocks(self._root)
        throttles = sysfs.throttled_by(self._root)
        smi = ask_smi(self._gpu_name, self._gpu_address)

        # If both report a value, that of the files is used: on a Jetson it is the module's own.
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
        """Read the settings, and put two readings beside them."""
        smi = ask_smi(self._gpu_name, self._gpu_address)
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


class Watch:
    """Reads the state of a machine again and again, in a thread, while something runs.

    Readings right before and after a measurement do not show what lies between them: a GPU that is
    idle lowers its clock within milliseconds.

    Args:
        machine: what to read; None reads nothing.
        interval: seconds between two readings; None is ``WATCH_SECONDS``.

    Attributes:
        readings: those so far, in order.

    Example:
        >>> with Watch(Machine(Path("/"), "NVIDIA H100 PCIe")) as watch:
        ...     work()
        >>> watch.readings[0].clocks["gpu"].now_mhz
        1755.0

    """

    def __init__(self, machine: Machine | None, interval: float | None = None) -> None:
        self.readings: list[Reading] = []
        self._machine = machine
        self._interval = WATCH_SECONDS if interval is None else interval
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._read_on, name="hipa-watch", daemon=True)

    def _read_on(self) -> None:
        assert self._machine is not None
        # The first reading comes after an interval: the GPU is at work by then.
        while not self._ended.wait(self._interval):
            self.readings.append(self._machine.read())

    def start(self) -> None:
        """Begin to read."""
        if self._machine is not None:
            self._thread.start()

    def stop(self) -> None:
        """Read no more. Calling it twice, or without ``start``, is harmless."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


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
    """Both lists in one; None only if neither is known."""
    if first is None and second is None:
        return None
    return (first or ()) + (second or ())


def _others_cores(before: Reading, after: Reading) -> float | None:
    """Processor time of other processes between two readings, as a number of cores."""
    elapsed = after.at_seconds - before.at_seconds
    if before.busy_seconds is None or after.busy_seconds is None or elapsed < _LEAST_SECONDS:
        return None
    busy = after.busy_seconds - before.busy_seconds
    own = after.own_seconds - before.own_seconds
    return round(max(0.0, (busy - own) / elapsed), 2)


def state_warnings(state: MachineState, *, cores: int, on_gpu: bool) -> tuple[str, ...]:
    """Warn of what makes the numbers doubtful: throttling, low clocks, other processes.

    Args:
        state: the machine's state around the runs.
        cores: processor cores that this process may use.
        on_gpu: the runs used the GPU, so its clocks matter too.

    Returns:
        A sentence for each reason, without a full stop.

    """
    return (*_throttling(state), *_low_clocks(state, on_gpu), *others_warnings(state, cores=cores))


def _throttling(state: MachineState) -> list[str]:
    found = []
    for when, reading in (("before", state.before), ("after", state.after)):
        if reading.throttled_by:
            found.append(f"throttled {when} the runs: {', '.join(reading.throttled_by)}")

    # The events are counted since boot; only those of the runs matter here.
    first = state.before.overcurrent_events
    last = state.after.overcurrent_events
    if first is not None and last is not None and last > first:
        found.append(
            f"{last - first} throttling events by over-current or under-voltage during the runs"
        )
    return found


def _low_clocks(state: MachineState, on_gpu: bool) -> list[str]:
    found = []
    names = ("gpu", "memory", "cpu") if on_gpu else ("cpu",)
    for name in names:
        clocks = []
        for reading in (state.before, state.after):
            if name in reading.clocks:
                clocks.append(reading.clocks[name])

        # The lower of the two: a clock that was low at either time may have been low in the runs.
        low = min(clocks, key=lambda clock: clock.now_mhz or 0, default=None)
        if low is None or low.now_mhz is None or not low.max_mhz:
            continue
        if low.now_mhz < _NEAR * low.max_mhz:
            found.append(f"the {name} clock was {low.now_mhz:.0f} of {low.max_mhz:.0f} MHz")
    return found


def others_warnings(state: MachineState, *, cores: int) -> tuple[str, ...]:
    """Warn of other processes that took a tenth or more of this process's cores."""
    if state.others_cores is None or state.others_cores < _OTHERS_SHARE * cores:
        return ()
    return (f"other processes took {state.others_cores:.1f} cores' time during the runs",)

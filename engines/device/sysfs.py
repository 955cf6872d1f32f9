"""Files of Linux and Jetson Linux: clocks, temperatures, throttling, power mode.

Every function takes ``root``, the folder that stands for '/', so that tests can pass a tree of
their own. What a machine does not report is None or empty, never guessed.

Sources: the kernel's ABI (https://docs.kernel.org/admin-guide/pm/cpufreq.html and
https://www.kernel.org/doc/Documentation/ABI/testing/sysfs-class-thermal), and the chapter "Platform
Power and Performance" of NVIDIA's Jetson Linux guide, release 36.4.3
(https://docs.nvidia.com/jetson/archives/r36.4.3/DeveloperGuide/).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from hipa_deploy.engines.device.machine import read_text
from hipa_deploy.record import Record

# 17000000.gpu on JetPack 6, 17000000.ga10b on 5; gpu-gpc-0 on Thor, which has no name in its device
# tree (https://github.com/rbonghi/jetson_stats/issues/885).
_GPU = re.compile(r"(\.(gpu|ga10b|gb10b|gv11b|gp10b|gm20b)|^gpu-gpc-\d+)$")
# A state above 0 is throttling at work. Not 'pwm-fan', whose state above 0 is a fan that turns.
_THROTTLES = re.compile(r"-throttle-alert$|^hot-surface-alert$|^(thermal-)?(devfreq|cpufreq)-")


class Clock(Record):
    """A clock.

    Attributes:
        now_mhz: MHz at this moment.
        max_mhz: MHz that the power mode allows at most.
        locked: whether the lowest allowed clock is the highest allowed one.

    """

    now_mhz: float | None
    max_mhz: float | None
    locked: bool | None = None


def read_number(path: Path) -> float | None:
    """A file's number; None if the file cannot be read or holds no number."""
    try:
        return float(read_text(path) or "")
    except ValueError:
        return None


def clocks(root: Path) -> dict[str, Clock]:
    """The clocks 'gpu', 'memory' and 'cpu', each where it can be read.

    The first two are Jetson's alone, and the memory's can often be read as root only. 'cpu' is the
    fastest core: the others idle while one feeds a GPU.
    """
    readers: dict[str, Callable[[Path], Clock | None]] = {
        "gpu": _gpu,
        "memory": _memory,
        "cpu": _cpu,
    }
    found = {}
    for name, reader in readers.items():
        clock = reader(root)
        if clock:
            found[name] = clock
    return found


def _gpu(root: Path) -> Clock | None:
    folder = _gpu_folder(root)
    return _devfreq(folder) if folder else None


def _gpu_folder(root: Path) -> Path | None:
    for path in _list(root, "sys/class/devfreq", "*"):
        if _GPU.search(path.name):
            return path
    return None


def _devfreq(folder: Path) -> Clock | None:
    now = _scaled(folder / "cur_freq", 1e6)
    low = _scaled(folder / "min_freq", 1e6)
    high = _scaled(folder / "max_freq", 1e6)
    return None if now is None else Clock(now_mhz=now, max_mhz=high, locked=_same(low, high))


def _memory(root: Path) -> Clock | None:
    """The external memory controller.

    On Thor it is in devfreq (https://github.com/rbonghi/jetson_stats/pull/825), elsewhere in
    debugfs, which only root may read.
    """
    clock = _devfreq(root / "sys/class/devfreq/bwmgr")
    if clock:
        return clock
    emc = root / "sys/kernel/debug/bpmp/debug/clk/emc"
    now = _scaled(emc / "rate", 1e6)
    high = _scaled(emc / "max_rate", 1e6)
    return None if now is None else Clock(now_mhz=now, max_mhz=high)


def _cpu(root: Path) -> Clock | None:
    cores = []
    for folder in _list(root, "sys/devices/system/cpu", "cpu[0-9]*/cpufreq"):
        core = _core(folder)
        if core:
            cores.append(core)
    return max(cores, key=lambda core: core.now_mhz or 0, default=None)


def _core(folder: Path) -> Clock | None:
    now = _scaled(folder / "scaling_cur_freq", 1e3)
    low = _scaled(folder / "scaling_min_freq", 1e3)
    high = _scaled(folder / "scaling_max_freq", 1e3)
    return None if now is None else Clock(now_mhz=now, max_mhz=high, locked=_same(low, high))


def cpu_governor(root: Path) -> str | None:
    """The cores' frequency governors, 'performance' or 'performance, schedutil'."""
    files = _list(root, "sys/devices/system/cpu", "cpu[0-9]*/cpufreq/scaling_governor")
    governors = set()
    for path in files:
        governor = read_text(path)
        if governor:
            governors.add(governor)
    return ", ".join(sorted(governors)) or None


def gpu_governor(root: Path) -> str | None:
    """The frequency governor of a Jetson's GPU."""
    folder = _gpu_folder(root)
    return read_text(folder / "governor") if folder else None


def temperatures(root: Path) -> dict[str, float]:
    """Degrees Celsius by thermal zone.

    Of zones with one name it is the hottest. Zones without power are left out.
    """
    found: dict[str, float] = {}
    for zone in _list(root, "sys/class/thermal", "thermal_zone*"):
        name = read_text(zone / "type")
        celsius = _scaled(zone / "temp", 1e3)
        # Tegra reports -256 for a zone without power.
        if name and celsius is not None and -50 < celsius < 200:
            found[name] = max(celsius, found.get(name, celsius))
    return found


def throttled_by(root: Path) -> tuple[str, ...] | None:
    """Cooling devices that hold clocks down now; None where there are none that could."""
    devices = _list(root, "sys/class/thermal", "cooling_device*")
    states: dict[str, float | None] = {}
    for path in devices:
        # Of devices with one name the last one counts.
        states[read_text(path / "type") or ""] = read_number(path / "cur_state")
    active = []
    is_known = False
    for name, state in states.items():
        if _THROTTLES.search(name) and state is not None:
            is_known = True
            if state > 0:
                active.append(name)
    return tuple(sorted(active)) if is_known else None


def overcurrent_events(root: Path) -> int | None:
    """Throttling by under-voltage and over-current: events since boot.

    Orin and Thor count them; elsewhere it is None.
    """
    counts = []
    for path in _list(root, "sys/class/hwmon", "hwmon*/oc*_event_cnt"):
        count = read_number(path)
        if count is not None:
            counts.append(int(count))
    return sum(counts) if counts else None


def module_watts(root: Path) -> float | None:
    """Watts that a Jetson Orin Nano or NX module draws; None on other modules.

    They are its INA3221's, of the rail VDD_IN.
    """
    for label in _list(root, "sys/class/hwmon", "hwmon*/in*_label"):
        if read_text(label) == "VDD_IN":
            number = label.name.removeprefix("in").removesuffix("_label")
            volts = _scaled(label.with_name(f"in{number}_input"), 1e3)
            amperes = _scaled(label.with_name(f"curr{number}_input"), 1e3)
            return None if volts is None or amperes is None else round(volts * amperes, 2)
    return None


def fan_rpm(root: Path) -> int | None:
    """The first fan's turns a minute."""
    files = [
        *_list(root, "sys/class/hwmon", "hwmon*/rpm"),
        *_list(root, "sys/class/hwmon", "hwmon*/fan*_input"),
    ]
    for path in files:
        turns = read_number(path)
        if turns is not None:
            return int(turns)
    return None


def power_mode(root: Path) -> str | None:
    """Jetson's power mode, 'MAXN_SUPER (mode 2)', as nvpmodel last set it.

    The number is in /var/lib/nvpmodel/status ('pmode:0002 fmode:quiet'), its name in
    /etc/nvpmodel.conf ('< POWER_MODEL ID=2 NAME=MAXN_SUPER >'). If the service failed at boot, the
    clocks are an older mode's.
    """
    match = re.search(r"pmode:0*(\d+)", read_text(root / "var/lib/nvpmodel/status") or "")
    if not match:
        return None
    mode = match[1]
    names = read_text(root / "etc/nvpmodel.conf") or ""
    named = re.search(rf"^\s*<\s*POWER_MODEL\s+ID={mode}\s+NAME=(\S+)", names, re.MULTILINE)
    return f"{named[1]} (mode {mode})" if named else f"mode {mode}"


def jetpack(root: Path) -> str | None:
    """The version of the package nvidia-jetpack, '6.2+b77'; None where it is not installed."""
    # The list of packages is long, and only a Jetson has this one.
    if not (root / "etc/nv_tegra_release").exists():
        return None
    packages = read_text(root / "var/lib/dpkg/status") or ""
    pattern = r"^Package: nvidia-jetpack\n(?:.+\n)*?Version: (.+)$"
    match = re.search(pattern, packages, re.MULTILINE)
    return match[1] if match else None


def load_average(root: Path) -> float | None:
    """Processes that ran or waited, averaged over the last minute."""
    words = (read_text(root / "proc/loadavg") or "").split()
    return float(words[0]) if words else None


def busy_seconds(root: Path) -> float | None:
    """Processor seconds since boot that were not idle, of all cores and processes.

    None where /proc/stat does not say.
    """
    match = re.search(r"^cpu +(.+)$", read_text(root / "proc/stat") or "", re.MULTILINE)
    ticks = [int(word) for word in match[1].split()] if match else []
    # user nice system idle iowait irq softirq steal; the guests after them are counted in user
    busy = sum(ticks[:3]) + sum(ticks[5:8])
    return busy / os.sysconf("SC_CLK_TCK") if busy else None


def _list(root: Path, folder: str, pattern: str) -> Iterator[Path]:
    yield from sorted((root / folder).glob(pattern))


def _scaled(path: Path, unit: float) -> float | None:
    value = read_number(path)
    return None if value is None else value / unit


def _same(low: float | None, high: float | None) -> bool | None:
    return None if low is None or high is None else low == high

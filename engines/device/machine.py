"""The host: its processor, memory and operating system, as /proc and cgroups describe them."""

from __future__ import annotations

import contextlib
import os
import platform
import re
from pathlib import Path


def peak_rss_mib() -> int | None:
    """The most memory that this process has held, in MiB; None where /proc is absent.

    ``getrusage`` is not used, because its maximum includes the parent's memory at the fork.
    """
    return field_mib("/proc/self/status", "VmHWM")


def available_memory_mib() -> int | None:
    """Host memory that can be allocated without swapping, in MiB; None where /proc is absent.

    It is the kernel's own estimate, or what the memory limit of a container leaves, if that is
    less.
    """
    free = field_mib("/proc/meminfo", "MemAvailable")
    limit = read_text("/sys/fs/cgroup/memory.max")
    used = read_text("/sys/fs/cgroup/memory.current")
    # A group without a limit says 'max' in place of a number.
    if free is None or limit is None or not limit.isdigit() or used is None:
        return free

    # The kernel drops cached files that are not in use before it refuses memory, so they count as
    # free.
    stat = read_text("/sys/fs/cgroup/memory.stat") or ""
    cached = re.search(r"^inactive_file (\d+)$", stat, re.MULTILINE)
    held = int(used)
    if cached:
        held -= int(cached[1])
    left = (int(limit) - held) >> 20
    return max(min(free, left), 0)


def free_swap_mib() -> int:
    """Free swap space in MiB; 0 where /proc is absent."""
    return field_mib("/proc/meminfo", "SwapFree") or 0


def usable_cores() -> int:
    """Processor cores that this process may use."""
    # Not cpu_count alone: a container or taskset may allow fewer cores than the machine has.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def read_text(path: str | Path) -> str | None:
    """A file's text, stripped; None if the file cannot be read or is empty.

    NUL bytes are stripped too: strings in /proc/device-tree end with one.
    """
    try:
        return Path(path).read_text(errors="replace", encoding="utf-8").strip("\0\n ") or None
    except OSError:
        return None


def field_mib(path: str, field: str) -> int | None:
    """A field written as 'Field:  1234 kB' in a /proc file, in MiB; None if it is missing."""
    match = re.search(rf"^{field}:\s*(\d+) kB", read_text(path) or "", re.MULTILINE)
    return int(match[1]) >> 10 if match else None


def cpu_name() -> str:
    """The processor's name as the kernel gives it; 'unknown' if it gives none."""
    match = re.search(r"^model name\s*:\s*(.+)$", read_text("/proc/cpuinfo") or "", re.MULTILINE)
    if match:
        return match[1]
    # On ARM the kernel often gives no name.
    return platform.processor() or "unknown"


def cpu_features() -> str | None:
    """The processor's instruction sets, sorted, as the kernel names them; None if it names none.

    Two machines whose processors have one name may differ in them, as virtual machines do.
    """
    # x86 has 'flags', ARM has 'Features', once for each core.
    text = read_text("/proc/cpuinfo") or ""
    found = set(re.findall(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE))
    if not found:
        return None
    # Cores may differ; what is compiled for one may run on another.
    return " | ".join(sorted(" ".join(sorted(features.split())) for features in found))


def os_name() -> str:
    """The operating system's name and version."""
    with contextlib.suppress(OSError):
        return platform.freedesktop_os_release().get("PRETTY_NAME", platform.platform())
    return platform.platform()

"""The host: its processor, its memory, and what /proc says of both."""

from __future__ import annotations

import contextlib
import os
import platform
import re
from pathlib import Path


def peak_rss_mib() -> int | None:
    """The most memory this process has held, in MiB; None where /proc is absent.

    Not ``getrusage``: its maximum includes the parent's memory at the fork.
    """
    return field_mib("/proc/self/status", "VmHWM")


def available_memory_mib() -> int | None:
    """Host memory that can be allocated without swapping, in MiB; None where /proc is absent.

    The kernel's own estimate, or what a container's limit leaves of it.
    """
    free, limit = field_mib("/proc/meminfo", "MemAvailable"), read_text("/sys/fs/cgroup/memory.max")
    used = read_text("/sys/fs/cgroup/memory.current")
    if free is None or not (limit and limit.isdigit() and used):
        return free
    droppable = re.search(
        r"^inactive_file (\d+)$", read_text("/sys/fs/cgroup/memory.stat") or "", re.MULTILINE
    )
    held = int(used) - (int(droppable[1]) if droppable else 0)
    return max(min(free, (int(limit) - held) >> 20), 0)


def free_swap_mib() -> int:
    """Free swap space in MiB; 0 where /proc is absent."""
    return field_mib("/proc/meminfo", "SwapFree") or 0


def usable_cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def read_text(path: str) -> str | None:
    """A file's text without its ends; None where it cannot be read or is empty."""
    try:
        return Path(path).read_text(errors="replace").strip("\0\n ") or None
    except OSError:
        return None


def field_mib(path: str, field: str) -> int | None:
    """The field of a /proc file that is written as 'Field:  1234 kB'."""
    match = re.search(rf"^{field}:\s*(\d+) kB", read_text(path) or "", re.MULTILINE)
    return int(match[1]) >> 10 if match else None


def cpu_name() -> str:
    """The processor's name, as the kernel has it."""
    match = re.search(r"^model name\s*:\s*(.+)$", read_text("/proc/cpuinfo") or "", re.MULTILINE)
    return match[1] if match else platform.processor() or "unknown"


def os_name() -> str:
    """The operating system's name and version."""
    with contextlib.suppress(OSError):
        return platform.freedesktop_os_release().get("PRETTY_NAME", platform.platform())
    return platform.platform()

"""The host's memory and processor, from files that imitate /proc and cgroups."""

from __future__ import annotations

import pytest

from hipa_deploy.engines.device import machine

MEMINFO = "MemTotal:       8000000 kB\nMemAvailable:   4096000 kB\nSwapFree:       1024000 kB"
MAX = "/sys/fs/cgroup/memory.max"
CURRENT = "/sys/fs/cgroup/memory.current"
STAT = "/sys/fs/cgroup/memory.stat"
MIB = 1 << 20


def imitate(monkeypatch, files: dict[str, str]) -> None:
    monkeypatch.setattr(machine, "read_text", files.get)


@pytest.mark.parametrize("group", [{}, {MAX: "max", CURRENT: "1"}, {MAX: str(MIB)}])
def test_without_a_limit_the_kernels_estimate_counts(monkeypatch, group):
    imitate(monkeypatch, {"/proc/meminfo": MEMINFO, **group})
    assert machine.available_memory_mib() == 4000
    assert machine.free_swap_mib() == 1000


@pytest.mark.parametrize(
    ("limit_mib", "stat", "expected"),
    [
        (1000, None, 700),
        (1000, "anon 5\ninactive_file 104857600\n", 800),  # 100 MiB of files can be dropped
        (100, None, 0),  # never below 0
        (9000, None, 4000),  # the machine has less than the limit leaves
    ],
)
def test_a_containers_limit_leaves_less(monkeypatch, limit_mib, stat, expected):
    files = {"/proc/meminfo": MEMINFO, MAX: str(limit_mib * MIB), CURRENT: str(300 * MIB)}
    if stat is not None:
        files[STAT] = stat
    imitate(monkeypatch, files)
    assert machine.available_memory_mib() == expected


def test_without_proc_nothing_is_known(monkeypatch):
    imitate(monkeypatch, {})
    assert machine.available_memory_mib() is None
    assert machine.peak_rss_mib() is None
    assert machine.free_swap_mib() == 0


def test_text_is_stripped_and_a_file_without_text_is_none(tmp_path):
    path = tmp_path / "model"
    path.write_bytes(b"NVIDIA Jetson\0\n")
    assert machine.read_text(path) == machine.read_text(str(path)) == "NVIDIA Jetson"
    path.write_bytes(b"\0\n")
    assert machine.read_text(path) is None
    assert machine.read_text(tmp_path / "missing") is None
    assert machine.read_text(tmp_path) is None


def test_the_processor_has_a_name(monkeypatch):
    imitate(monkeypatch, {"/proc/cpuinfo": "processor : 0\nmodel name\t: A CPU\n"})
    assert machine.cpu_name() == "A CPU"
    imitate(monkeypatch, {})
    monkeypatch.setattr("platform.processor", lambda: "")
    assert machine.cpu_name() == "unknown"

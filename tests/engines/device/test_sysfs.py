"""Files of Linux and Jetson Linux, in trees that imitate them."""

from __future__ import annotations

import pytest

from hipa_deploy.engines.device import sysfs
from hipa_deploy.engines.device.sysfs import Clock
from tests.engines.machine_samples import ORIN, THOR, plant


def test_orin(tmp_path):
    root = plant(tmp_path, ORIN)
    assert sysfs.power_mode(root) == "MAXN_SUPER (mode 2)"
    assert sysfs.jetpack(root) == "6.2+b77"
    assert sysfs.clocks(root) == {
        "gpu": Clock(now_mhz=1020, max_mhz=1020, locked=False),
        "memory": Clock(now_mhz=3199, max_mhz=3199),
        "cpu": Clock(now_mhz=1728, max_mhz=1728, locked=True),  # the fastest core
    }
    assert sysfs.cpu_governor(root) == "performance, schedutil"
    assert sysfs.gpu_governor(root) == "nvhost_podgov"
    # The zone of cv0 has no power.
    assert sysfs.temperatures(root) == {"cpu-thermal": 51.0, "gpu-thermal": 54.5}
    # The state of the fan is above 0 too, but a fan that turns is no throttling.
    assert sysfs.throttled_by(root) == ("gpu-throttle-alert",)
    assert sysfs.overcurrent_events(root) == 37
    assert sysfs.module_watts(root) == 10.0
    assert sysfs.fan_rpm(root) == 2140
    assert sysfs.load_average(root) == 1.25


def test_thor_has_no_device_tree_names_and_its_memory_in_devfreq(tmp_path):
    clocks = sysfs.clocks(plant(tmp_path, THOR))
    assert clocks == {
        "gpu": Clock(now_mhz=1575, max_mhz=1575),
        "memory": Clock(now_mhz=665.6, max_mhz=4266),
    }


@pytest.mark.parametrize("read", [sysfs.clocks, sysfs.temperatures])
def test_a_machine_without_the_files_has_no_entries(tmp_path, read):
    assert read(tmp_path) == {}


@pytest.mark.parametrize(
    "read",
    [
        sysfs.power_mode,
        sysfs.jetpack,
        sysfs.cpu_governor,
        sysfs.gpu_governor,
        sysfs.throttled_by,
        sysfs.overcurrent_events,
        sysfs.module_watts,
        sysfs.fan_rpm,
        sysfs.load_average,
        sysfs.busy_seconds,
    ],
)
def test_what_a_machine_does_not_report_is_none(tmp_path, read):
    assert read(tmp_path) is None


def test_a_power_mode_without_a_name_has_its_number(tmp_path):
    files = {
        "var/lib/nvpmodel/status": "pmode:0012",
        "etc/nvpmodel.conf": "< POWER_MODEL ID=1 NAME=A >",
    }
    root = plant(tmp_path, files)
    assert sysfs.power_mode(root) == "mode 12"


@pytest.mark.parametrize("text", ["", "ondemand"])
def test_a_file_without_a_number_is_unknown(tmp_path, text):
    assert sysfs.clocks(plant(tmp_path, {"sys/class/devfreq/17000000.ga10b/cur_freq": text})) == {}


def test_busy_seconds_have_no_idle_time_and_count_guests_once(tmp_path, monkeypatch):
    monkeypatch.setattr("os.sysconf", lambda name: 100)
    # Neither idle time nor waiting for disks counts, and guests are already counted in user.
    assert sysfs.busy_seconds(plant(tmp_path, ORIN)) == 1.8

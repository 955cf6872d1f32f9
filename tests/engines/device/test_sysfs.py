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
    assert (sysfs.cpu_governor(root), sysfs.gpu_governor(root)) == (
        "performance, schedutil",
        "nvhost_podgov",
    )
    assert sysfs.temperatures(root) == {
        "cpu-thermal": 51.0,
        "gpu-thermal": 54.5,
    }  # cv0 is switched off
    assert sysfs.throttled_by(root) == ("gpu-throttle-alert",)  # a fan that turns is no throttling
    assert sysfs.overcurrent_events(root) == 37
    assert (sysfs.module_watts(root), sysfs.fan_rpm(root), sysfs.load_average(root)) == (
        10.0,
        2140,
        1.25,
    )


def test_thor_has_no_device_tree_names_and_its_memory_in_devfreq(tmp_path):
    clocks = sysfs.clocks(plant(tmp_path, THOR))
    assert clocks == {
        "gpu": Clock(now_mhz=1575, max_mhz=1575),
        "memory": Clock(now_mhz=665.6, max_mhz=4266),
    }


def test_a_machine_that_says_nothing_is_not_guessed_at(tmp_path):
    assert sysfs.clocks(tmp_path) == sysfs.temperatures(tmp_path) == {}
    for ask in (sysfs.power_mode, sysfs.jetpack, sysfs.cpu_governor, sysfs.gpu_governor,
                sysfs.throttled_by,
                sysfs.overcurrent_events, sysfs.module_watts, sysfs.fan_rpm, sysfs.load_average,
                sysfs.busy_seconds):  # fmt: skip
        assert ask(tmp_path) is None, ask.__name__


def test_a_mode_without_a_name_and_a_name_of_another_mode(tmp_path):
    root = plant(
        tmp_path,
        {
            "var/lib/nvpmodel/status": "pmode:0012",
            "etc/nvpmodel.conf": "< POWER_MODEL ID=1 NAME=A >",
        },
    )
    assert sysfs.power_mode(root) == "mode 12"


@pytest.mark.parametrize("text", ["", "ondemand"])
def test_a_file_without_a_number_is_unknown(tmp_path, text):
    assert sysfs.clocks(plant(tmp_path, {"sys/class/devfreq/17000000.ga10b/cur_freq": text})) == {}


def test_busy_is_neither_idle_nor_counted_twice(tmp_path, monkeypatch):
    monkeypatch.setattr("os.sysconf", lambda name: 100)
    assert (
        sysfs.busy_seconds(plant(tmp_path, ORIN)) == 1.8
    )  # no idle, no waiting for disks, guests are in user

"""Trees of files that imitate Jetson's, after the sources that engines/device/sysfs.py names.

None of them was read on a Jetson.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from hipa_deploy.engines.backends import available
from hipa_deploy.engines.device import jetson, machine
from hipa_deploy.engines.tensorrt import gpu

ORIN = {
    "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3",
    "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=15W >\n< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n",
    "var/lib/nvpmodel/status": "pmode:0002 fmode:quiet",
    "var/lib/dpkg/status": (
        "Package: nvidia-jetpack-dev\nStatus: install ok installed\nVersion: 9\n\n"
        "Package: nvidia-jetpack\nStatus: install ok installed\nVersion: 6.2+b77\n\n"
        "Package: zlib\nVersion: 1\n"
    ),
    "sys/class/devfreq/15340000.vic/cur_freq": "115200000",
    "sys/class/devfreq/17000000.gpu/cur_freq": "1020000000\n",
    "sys/class/devfreq/17000000.gpu/min_freq": "306000000\n",
    "sys/class/devfreq/17000000.gpu/max_freq": "1020000000\n",
    "sys/class/devfreq/17000000.gpu/governor": "nvhost_podgov\n",
    "sys/kernel/debug/bpmp/debug/clk/emc/rate": "3199000000",
    "sys/kernel/debug/bpmp/debug/clk/emc/max_rate": "3199000000",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "729600",
    "sys/devices/system/cpu/cpu1/cpufreq/scaling_cur_freq": "1728000",
    "sys/devices/system/cpu/cpu1/cpufreq/scaling_min_freq": "1728000",
    "sys/devices/system/cpu/cpu1/cpufreq/scaling_max_freq": "1728000",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "schedutil",
    "sys/devices/system/cpu/cpu1/cpufreq/scaling_governor": "performance",
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal",
    "sys/class/thermal/thermal_zone0/temp": "51000",
    "sys/class/thermal/thermal_zone1/type": "gpu-thermal",
    "sys/class/thermal/thermal_zone1/temp": "54500",
    "sys/class/thermal/thermal_zone2/type": "cv0-thermal",
    "sys/class/thermal/thermal_zone2/temp": "-256000",
    "sys/class/thermal/cooling_device0/type": "pwm-fan",
    "sys/class/thermal/cooling_device0/cur_state": "3",
    "sys/class/thermal/cooling_device1/type": "gpu-throttle-alert",
    "sys/class/thermal/cooling_device1/cur_state": "1",
    "sys/class/thermal/cooling_device2/type": "cpu-throttle-alert",
    "sys/class/thermal/cooling_device2/cur_state": "0",
    "sys/class/hwmon/hwmon1/in1_label": "VDD_IN",
    "sys/class/hwmon/hwmon1/in1_input": "5000",
    "sys/class/hwmon/hwmon1/curr1_input": "2000",
    "sys/class/hwmon/hwmon2/rpm": "2140",
    "sys/class/hwmon/hwmon3/oc1_event_cnt": "0",
    "sys/class/hwmon/hwmon3/oc3_event_cnt": "37",
    "proc/loadavg": "1.25 0.9 0.5 2/300 4711",
    "proc/stat": "cpu  100 0 50 9000 70 10 20 0 30 0\ncpu0 1 2 3\n",
}
THOR = {
    "sys/class/devfreq/gpu-nvd-0/cur_freq": "1",
    "sys/class/devfreq/gpu-gpc-0/cur_freq": "1575000000",
    "sys/class/devfreq/gpu-gpc-0/max_freq": "1575000000",
    "sys/class/devfreq/bwmgr/cur_freq": "665600000",
    "sys/class/devfreq/bwmgr/max_freq": "4266000000",
}


def plant(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def imitate_files(monkeypatch: pytest.MonkeyPatch, read: Callable[[str], str | None]) -> None:
    """Replace this machine's files by what ``read`` returns for a path."""
    for module in (machine, jetson, gpu, available):
        monkeypatch.setattr(module, "read_text", read)

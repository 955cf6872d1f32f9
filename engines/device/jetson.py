"""Jetson: the module's model, and its release of Jetson Linux."""

from __future__ import annotations

import re

from hipa_deploy.engines.device.machine import read_text

# Docker masks /sys/firmware, where /proc/device-tree leads to, and mounts nothing in its place.
# Here a container may have the model's name: run.sh of jetson-containers mounts it as this too.
_MOUNTED_MODEL = "/tmp/nv_jetson_model"
# Containers show it, and NVIDIA's k8s-device-plugin knows a Tegra by it.
_SOC_FAMILY = "/sys/devices/soc0/family"
_HIDDEN_MODEL = "NVIDIA Jetson, model hidden by the container"


def jetson_model() -> str | None:
    """The model, such as 'NVIDIA Jetson Orin Nano Developer Kit'; None on other machines.

    A container hides the model, unless it is mounted (docker/jetson.Dockerfile). Then the text says
    no more than that it is a Jetson.
    """
    # Every board with a device tree has this file, a Raspberry Pi too: only NVIDIA's count.
    model = read_text("/proc/device-tree/model") or read_text(_MOUNTED_MODEL)
    if model is not None:
        is_jetson = "jetson" in model.lower() or "nvidia" in model.lower()
        return model if is_jetson else None
    family = read_text(_SOC_FAMILY) or ""
    return _HIDDEN_MODEL if family.lower().startswith("tegra") else None


def l4t_release(text: str | None = None) -> str | None:
    """The release of Jetson Linux, such as '36.4.3'; None on other machines.

    Args:
        text: the content of /etc/nv_tegra_release; by default the file is read.

    Example:
        >>> l4t_release("# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic")
        '36.4.3'

    """
    if text is None:
        text = read_text("/etc/nv_tegra_release")
    match = re.search(r"R(\d+)[^,]*,\s*REVISION:\s*([\d.]+)", text or "")
    return f"{match[1]}.{match[2]}" if match else None

"""Jetson: the module's model, and its release of Jetson Linux."""

from __future__ import annotations

import re

from hipa_deploy.engines.device.machine import read_text


def jetson_model() -> str | None:
    """The model, such as 'NVIDIA Jetson Orin Nano Developer Kit'; None on other machines."""
    # Every board with a device tree has this file, a Raspberry Pi too: only NVIDIA's count.
    model = read_text("/proc/device-tree/model") or ""
    is_jetson = "jetson" in model.lower() or "nvidia" in model.lower()
    return model if is_jetson else None


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

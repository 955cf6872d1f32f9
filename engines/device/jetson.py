"""Jetson: its model, and its release of Jetson Linux."""

from __future__ import annotations

import re

from hipa_deploy.engines.device.machine import read_text


def jetson_model() -> str | None:
    """'NVIDIA Jetson Orin Nano Developer Kit', or None elsewhere."""
    model = read_text("/proc/device-tree/model")
    return model if model and ("jetson" in model.lower() or "nvidia" in model.lower()) else None


def l4t_release(text: str | None = None) -> str | None:
    """The Jetson Linux release, '36.4.3'; None elsewhere.

    It is in /etc/nv_tegra_release; ``text`` is that file's content.
    """
    text = text if text is not None else read_text("/etc/nv_tegra_release")
    match = re.search(r"R(\d+)[^,]*,\s*REVISION:\s*([\d.]+)", text or "")
    return f"{match[1]}.{match[2]}" if match else None

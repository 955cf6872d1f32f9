"""A Jetson's model, also in a container, and its release of Jetson Linux."""

from __future__ import annotations

import pytest

from hipa_deploy.engines.device import jetson
from hipa_deploy.engines.device.jetson import jetson_model, l4t_release

NANO = "NVIDIA Jetson Orin Nano Developer Kit"


@pytest.mark.parametrize(
    ("text", "release"),
    [
        ("# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64", "36.4.3"),
        ("# R35 (release), REVISION: 3.1, GCID: 32827747, BOARD: t186ref, EABI: aarch64", "35.3.1"),
        ("", None),
        ("nonsense", None),
    ],
)
def test_the_jetson_release(text, release):
    assert l4t_release(text) == release


@pytest.mark.parametrize(
    ("files", "model"),
    [
        ({"/proc/device-tree/model": NANO, "/sys/devices/soc0/family": "Tegra"}, NANO),
        ({"/proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0"}, None),
        # Docker masks the device tree.
        ({"/tmp/nv_jetson_model": NANO, "/sys/devices/soc0/family": "Tegra"}, NANO),
        (
            {"/sys/devices/soc0/family": "Tegra"},
            "NVIDIA Jetson, model hidden by the container",
        ),
        ({"/sys/devices/soc0/family": "Freescale i.MX"}, None),
        ({}, None),
    ],
)
def test_the_model_in_a_container_and_outside(files, model, monkeypatch):
    monkeypatch.setattr(jetson, "read_text", files.get)
    assert jetson_model() == model

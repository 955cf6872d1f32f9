"""Seconds by stage, on the host and on the device."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

from hipa_deploy.engines.latency.stage_timer import StageTimer


def test_a_stage_that_runs_twice_adds_up():
    timer = StageTimer()
    for _ in range(2):
        with timer("unet"):
            time.sleep(0.002)
    assert timer.seconds["unet"] >= 0.004


def test_runners_that_share_a_device_know_only_the_latest_call():
    """A fake of stages on one device: after the decoder's call the time of the UNet is gone."""
    unet = SimpleNamespace(device_ms=None)
    decoder = SimpleNamespace(device_ms=None)
    timer = StageTimer({"unet": unet, "vae_decoder": decoder})
    with timer("unet"):
        unet.device_ms = 3.0
    with timer("vae_decoder"):
        decoder.device_ms = 1.0
        unet.device_ms = None
    assert timer.device_seconds == pytest.approx({"unet": 3e-3, "vae_decoder": 1e-3})

    # One block that no runner measured makes the sums too small, so there are none.
    with timer("unet"):
        unet.device_ms = None
    assert timer.device_seconds == {}


def test_a_block_of_several_runners_adds_up_all_of_them():
    unet = SimpleNamespace(device_ms=2.0)
    decoder = SimpleNamespace(device_ms=2.0)
    timer = StageTimer({"unet": unet, "vae_decoder": decoder})
    with timer("all stages"):
        pass
    assert timer.device_seconds == pytest.approx({"unet": 2e-3, "vae_decoder": 2e-3})

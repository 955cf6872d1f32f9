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


def test_runners_that_share_a_device_know_of_the_latest_call_alone():
    """A fake of stages on one device: after the decoder's call the UNet's time is gone."""
    timer = StageTimer(
        runners := {name: SimpleNamespace(device_ms=None) for name in ("unet", "vae_decoder")}
    )
    for stage, other, ms in (("unet", "vae_decoder", 3.0), ("vae_decoder", "unet", 1.0)):
        with timer(stage):
            runners[stage].device_ms, runners[other].device_ms = ms, None
    assert timer.device_seconds == pytest.approx({"unet": 3e-3, "vae_decoder": 1e-3})
    with timer("unet"):
        runners["unet"].device_ms = None
    assert timer.device_seconds == {}


def test_a_block_of_several_runners_asks_them_all():
    timer = StageTimer({name: SimpleNamespace(device_ms=2.0) for name in ("unet", "vae_decoder")})
    with timer("all stages"):
        pass
    assert timer.device_seconds == pytest.approx({"unet": 2e-3, "vae_decoder": 2e-3})

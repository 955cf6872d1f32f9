"""Latency reports made up for tests: the numbers were not measured."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hipa_deploy.engines.backends.available import Device
from hipa_deploy.engines.device.sysfs import Clock
from hipa_deploy.engines.latency.machine_state import MachineState, Reading
from hipa_deploy.engines.latency.measure import summarise
from hipa_deploy.engines.latency.report import BundleFacts, Conditions, LatencyReport
from hipa_deploy.engines.latency.stage_timer import END_TO_END
from tests.engines.engine_samples import ORIN

READING = Reading(
    clocks={"gpu": Clock(now_mhz=1020, max_mhz=1020, locked=True)},
    temperatures_c={"gpu-thermal": 54.5},
    throttled_by=(),
    overcurrent_events=0,
    power_w=14.2,
    fan_rpm=2140,
    load_average=0.5,
    busy_seconds=None,
    own_seconds=1.0,
    at_seconds=1.0,
)
STATE = MachineState(
    power_mode="MAXN_SUPER (mode 2)",
    jetpack="6.2",
    cpu_governor="performance",
    gpu_governor="nvhost_podgov",
    power_limit_w=None,
    performance_state=None,
    persistence=None,
    others_cores=0.0,
    before=READING,
    after=READING,
)
DEVICE = Device(
    cpu="ARMv8 Processor",
    cores=6,
    memory_mib=7620,
    os="Ubuntu 22.04",
    arch="aarch64",
    python="3.10.12",
    gpu=ORIN,
    jetson="NVIDIA Jetson Orin Nano Developer Kit Super",
    l4t="36.4.3",
    backends=(),
)
CONDITIONS = Conditions(
    backend="tensorrt",
    precision="fp16",
    batch=1,
    height=512,
    width=512,
    threads=6,
    prompts="a new prompt every run",
    versions={"tensorrt": "10.3.0.30", "numpy": "2.0"},
    device=DEVICE,
    bundle=BundleFacts(
        producer="tests",
        layout="onestep",
        base_model="sd15",
        base_model_sha256="0" * 64,
        adaptor="hipa",
        decoder="tiny: taesd",
        graphs={"unet": "1" * 64},
    ),
    state=STATE,
)


def a_report(unet_ms: Sequence[float] = (), *, device: bool = False, **fields) -> LatencyReport:
    """A report whose UNet took ``unet_ms`` and whose decoder 2 ms, 0.5 ms outside the stages."""
    unet = np.asarray(unet_ms or np.random.default_rng(0).normal(10, 0.2, 50)) / 1e3
    host = {"unet": unet, "vae_decoder": np.full(len(unet), 2e-3)}
    whole = sum(host.values()) + 5e-4
    stages = {name: summarise(seconds, 0.1) for name, seconds in host.items()}
    on_device = {name: summarise(seconds * 0.9, 0.1) for name, seconds in host.items()}
    on_device[END_TO_END] = summarise(whole * 0.9, 0.1)
    values = {
        "created": "2030-01-01T00:00:00+00:00",
        "warmup": 5,
        "load_seconds": 1.0,
        "stages": stages,
        "end_to_end": summarise(whole, 0.3),
        "device": on_device if device else {},
        "throughput_images_per_second": 80.0,
        "peak_rss_mib": 900,
        "conditions": CONDITIONS,
    }
    return LatencyReport(**{**values, **fields})

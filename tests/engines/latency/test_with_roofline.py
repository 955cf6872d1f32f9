"""Reports beside the roofline: compared on that very device, a bare prediction on any other."""

from __future__ import annotations

import pytest

from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.engines.backends.available import Device
from hipa_deploy.engines.latency.report import Conditions, LatencyReport, LatencyStats
from hipa_deploy.engines.latency.roofline import predict_roofline
from hipa_deploy.engines.latency.with_roofline import (
    percent_of_bound,
    with_own_roofline,
    with_roofline,
)
from hipa_deploy.engines.tensorrt.gpu import Gpu
from tests.engines.engine_samples import ORIN, RTX_4090
from tests.engines.roofline_samples import shown, with_costs

A100 = Gpu(
    name="NVIDIA A100-SXM4-80GB", sm=80, memory_mib=81920, integrated=False, driver=None, cuda=None
)
RTX_4090_LAPTOP = RTX_4090.model_copy(update={"name": "NVIDIA GeForce RTX 4090 Laptop GPU"})
ORIN_4_GB = ORIN.model_copy(update={"memory_mib": 3810})
NANO = "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super"


@pytest.fixture
def bundle(make_bundle) -> Bundle:
    return with_costs(make_bundle())


def a_report(
    gpu: Gpu | None,
    backend: str = "rtx",
    jetson: str | None = None,
    stages: tuple[str, ...] = ("unet", "vae_decoder"),
) -> LatencyReport:
    """Each stage takes 8 ms, and the whole run 20 ms."""
    stats = LatencyStats(
        runs=1, first_ms=None, mean_ms=8, std_ms=0, min_ms=8, p50_ms=8, p90_ms=8, p99_ms=8
    )
    device = Device(
        cpu="",
        cores=1,
        memory_mib=None,
        os="",
        arch="",
        python="",
        gpu=gpu,
        jetson=jetson,
        l4t=None,
        backends=(),
    )
    conditions = Conditions(
        backend=backend,
        precision="fp16",
        batch=1,
        height=8,
        width=8,
        threads=1,
        prompts="a new prompt every run",
        versions={},
        device=device,
    )
    return LatencyReport(
        created="",
        warmup=0,
        load_seconds=0,
        end_to_end=stats.model_copy(update={"p50_ms": 20.0}),
        stages=dict.fromkeys(stages, stats),
        throughput_images_per_second=1,
        peak_rss_mib=None,
        conditions=conditions,
    )


@pytest.mark.parametrize(
    ("target", "report"),
    [
        ("rtx4090", a_report(RTX_4090)),
        ("a100", a_report(A100, "onnxruntime-cuda")),
        ("orin-nano", a_report(ORIN, "tensorrt", NANO)),
    ],
)
def test_measured_on_that_very_device_it_is_compared(bundle, target, report):
    prediction = predict_roofline(bundle, target)
    compared = with_roofline(report, prediction)
    assert LatencyReport.model_validate_json(compared.model_dump_json()) == compared

    for name, stage in compared.roofline.stages.items():
        bound_ms = prediction.stages[name].bound_ms
        assert stage.measured_percent == pytest.approx(100 * 8 / bound_ms)
    whole_ms = prediction.end_to_end_ms
    assert compared.roofline.measured_percent == pytest.approx(100 * 20 / whole_ms)
    assert "measured p50, % of bound" in shown(compared.roofline)


@pytest.mark.parametrize(
    ("target", "report"),
    [
        ("rtx4090", a_report(None)),
        ("rtx4090", a_report(RTX_4090, "onnxruntime")),  # on the processor
        ("rtx4090", a_report(RTX_4090_LAPTOP)),
        ("rtx4090", a_report(A100)),
        ("orin-nano", a_report(ORIN_4_GB, "tensorrt", NANO)),
        ("agx-orin", a_report(ORIN, "tensorrt", NANO)),
    ],
)
def test_measured_elsewhere_it_stays_a_prediction(bundle, target, report):
    prediction = predict_roofline(bundle, target)
    assert with_roofline(report, prediction).roofline == prediction


def test_a_report_from_a_known_device_gets_its_own_bound(bundle):
    report = a_report(ORIN, "tensorrt", NANO)
    expected = with_roofline(report, predict_roofline(bundle, "orin-nano"))
    assert with_own_roofline(report, bundle) == expected


@pytest.mark.parametrize(
    "report",
    [
        a_report(None),
        a_report(RTX_4090, "onnxruntime"),
        a_report(ORIN_4_GB),
    ],
)
def test_a_report_from_an_unknown_device_is_unchanged(bundle, report):
    assert with_own_roofline(report, bundle) == report


def test_a_report_of_a_bundle_without_costs_is_unchanged(make_bundle):
    report = a_report(RTX_4090)
    assert with_own_roofline(report, make_bundle()) == report


def test_a_stage_that_did_not_run_is_not_compared(bundle):
    report = a_report(RTX_4090, stages=("unet",))
    roofline = with_roofline(report, predict_roofline(bundle, "rtx4090")).roofline
    assert roofline.stages["unet"].measured_percent is not None
    assert roofline.stages["vae_decoder"].measured_percent is None
    assert roofline.measured_percent is None


def test_percent_of_bound():
    assert percent_of_bound(8.0, 2.0) == 400
    assert percent_of_bound(None, 2.0) is None
    assert percent_of_bound(8.0, 0.0) is None

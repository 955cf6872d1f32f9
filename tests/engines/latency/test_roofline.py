from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from hipa_deploy.bundle.folder import MANIFEST, Bundle
from hipa_deploy.bundle.manifest import Cost
from hipa_deploy.commands.app import main
from hipa_deploy.embedded import BUNDLE
from hipa_deploy.engines.backends.available import Device
from hipa_deploy.engines.latency.report import Conditions, LatencyReport, LatencyStats
from hipa_deploy.engines.latency.roofline import peak_of, predict_roofline, render_roofline
from hipa_deploy.engines.latency.with_roofline import with_own_roofline, with_roofline
from hipa_deploy.engines.targets.target import load_target_profile, target_names
from hipa_deploy.engines.tensorrt.gpu import Gpu
from hipa_deploy.errors import HipaError
from tests.engines.engine_samples import ORIN, RTX_4090

COSTS = {
    "unet": Cost(flops=34_000_000_000, weight_bytes=40_000_000, io_bytes=800_000),
    "vae_decoder": Cost(flops=1_000_000, weight_bytes=100_000_000, io_bytes=2_000_000),
}
A100 = Gpu(
    name="NVIDIA A100-SXM4-80GB", sm=80, memory_mib=81920, integrated=False, driver=None, cuda=None
)
NANO = "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super"


@pytest.fixture
def bundle(make_bundle) -> Bundle:
    return with_costs(make_bundle())


def with_costs(bundle: Bundle) -> Bundle:
    stages = tuple(
        s.model_copy(update={"cost": COSTS[s.spec.name]}) for s in bundle.manifest.stages
    )
    text = bundle.manifest.model_copy(update={"stages": stages}).model_dump_json()
    (bundle.root / MANIFEST).write_text(text)
    return Bundle.open(bundle.root)


def a_report(
    gpu: Gpu | None, backend: str = "rtx", jetson: str | None = None, stages=("unet", "vae_decoder")
):
    """Every stage takes 8 ms, all of it 20 ms."""
    stats = LatencyStats(
        runs=1, first_ms=None, mean_ms=8, std_ms=0, min_ms=8, p50_ms=8, p90_ms=8, p99_ms=8
    )  # fmt: skip
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
        backend=backend, precision="fp16", batch=1, height=8, width=8, threads=1, prompts="a new prompt every run",
        versions={}, device=device,
    )  # fmt: skip
    return LatencyReport(
        created="", warmup=0, load_seconds=0, end_to_end=stats.model_copy(update={"p50_ms": 20.0}),
        stages=dict.fromkeys(stages, stats), throughput_images_per_second=1, peak_rss_mib=None, conditions=conditions,
    )  # fmt: skip


def shown(roofline) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(render_roofline(roofline))
    return console.file.getvalue()


def test_the_bound_is_the_larger_of_arithmetic_and_traffic(bundle):
    roofline = predict_roofline(bundle, "orin-nano")  # 17 TFLOPS, 102 GB/s
    unet, decoder = roofline.stages["unet"], roofline.stages["vae_decoder"]
    assert (unet.compute_ms, unet.memory_ms) == pytest.approx((2.0, 0.4))
    assert (unet.bound_ms, unet.bound_by) == (unet.compute_ms, "compute")
    assert (decoder.bound_ms, decoder.bound_by) == (pytest.approx(1.0), "memory")
    assert roofline.end_to_end_ms == pytest.approx(3.0)
    assert "not measured" in roofline.kind


def test_the_table_says_it_is_a_prediction(bundle):
    text = shown(predict_roofline(bundle, "orin-nano"))
    for part in ("prediction: lower bound on Jetson Orin Nano 8 GB, not measured", "34.00", "3.000", "compute",
                 "17 TFLOPS FP16, dense", "102 GB/s"):  # fmt: skip
        assert part in text
    assert "p50" not in text
    assert "330.3 TFLOPS FP16, fp16 accumulation" in shown(predict_roofline(bundle, "rtx4090"))


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
        assert stage.measured_percent == pytest.approx(100 * 8 / prediction.stages[name].bound_ms)
    assert compared.roofline.measured_percent == pytest.approx(100 * 20 / prediction.end_to_end_ms)
    assert "measured p50, % of bound" in shown(compared.roofline)


@pytest.mark.parametrize(
    ("target", "report"),
    [
        ("rtx4090", a_report(None)),
        ("rtx4090", a_report(RTX_4090, "onnxruntime")),  # on the processor
        (
            "rtx4090",
            a_report(RTX_4090.model_copy(update={"name": "NVIDIA GeForce RTX 4090 Laptop GPU"})),
        ),
        ("rtx4090", a_report(A100)),
        (
            "orin-nano",
            a_report(ORIN.model_copy(update={"memory_mib": 3810}), "tensorrt", NANO),
        ),  # the 4 GB module
        ("agx-orin", a_report(ORIN, "tensorrt", NANO)),
    ],
)
def test_measured_elsewhere_it_stays_a_prediction(bundle, target, report):
    prediction = predict_roofline(bundle, target)
    assert with_roofline(report, prediction).roofline == prediction


def test_on_a_known_device_its_own_bound_is_found(bundle):
    report = a_report(ORIN, "tensorrt", NANO)
    assert with_own_roofline(report, bundle) == with_roofline(
        report, predict_roofline(bundle, "orin-nano")
    )


@pytest.mark.parametrize(
    "report",
    [
        a_report(None),
        a_report(RTX_4090, "onnxruntime"),
        a_report(ORIN.model_copy(update={"memory_mib": 3810})),
    ],
)
def test_elsewhere_there_is_none(bundle, report):
    assert with_own_roofline(report, bundle) == report


def test_without_costs_there_is_none(make_bundle):
    report = a_report(RTX_4090)
    assert with_own_roofline(report, make_bundle()) == report


def test_a_stage_that_did_not_run_is_not_compared(bundle):
    roofline = with_roofline(
        a_report(RTX_4090, stages=("unet",)), predict_roofline(bundle, "rtx4090")
    ).roofline
    assert roofline.stages["unet"].measured_percent is not None
    assert roofline.stages["vae_decoder"].measured_percent is roofline.measured_percent is None


def test_fp32_graphs_run_in_tf32_where_it_is_faster(make_bundle):
    peaks = {
        name: peak_of(load_target_profile(name), "fp32") for name in ("a100", "rtx4090", "thor")
    }
    assert (peaks["a100"].number_format, peaks["a100"].tflops) == ("tf32", 156)
    assert (peaks["rtx4090"].number_format, peaks["thor"]) == ("fp32", None)


@pytest.mark.parametrize(
    ("precision", "target", "message"),
    [
        ("fp16", "rtx60", r"target 'rtx60' is unknown. Expected one of: a100"),
        ("fp16", "auto", r"target 'auto' is unknown"),
        (
            "fp16",
            "rtx40",
            r"target rtx40 has no known fp16 peak rate .* Expected one of: a100, .*rtx4090, thor\.$",
        ),
        (
            "fp32",
            "thor",
            r"target thor has no known fp32 peak rate .* Expected one of: a100, .*rtx4090\.$",
        ),
    ],
)
def test_targets_without_rates_are_refused(make_bundle, precision, target, message):
    with pytest.raises(HipaError, match=message):
        predict_roofline(with_costs(make_bundle(precision=precision)), target)


def test_a_bundle_without_costs_is_refused(make_bundle):
    with pytest.raises(
        HipaError, match=r"stage unet has no cost in hipa.json. Export the bundle again"
    ):
        predict_roofline(make_bundle(), "rtx4090")


def test_rates_are_plausible():
    """Dense, not sparse: FP16 is two to four times TF32 on every device, never more."""
    for name in target_names():
        profile = load_target_profile(name)
        assert (
            (profile.fp16_tflops is None)
            == (profile.fp16_accumulate is None)
            == (profile.gpu_name is None)
        )
        if profile.tf32_tflops:
            assert 1.9 < profile.fp16_tflops / profile.tf32_tflops < 4.1


def test_the_command_prints_and_writes_it(tmp_path: Path, capsys, monkeypatch):
    bundle, report = tmp_path / "bundle", tmp_path / "latency.json"
    shutil.copytree(
        BUNDLE, bundle, copy_function=os.symlink, ignore=lambda *_: {MANIFEST, "engines"}
    )
    manifest = json.loads((BUNDLE / MANIFEST).read_text())
    for stage in manifest["stages"]:
        stage["cost"] = COSTS["unet"].model_dump()
    (bundle / MANIFEST).write_text(json.dumps(manifest))
    monkeypatch.setenv("COLUMNS", "150")
    with pytest.raises(SystemExit) as stopped:
        main(["profile", str(bundle), "--runs", "1", "--backend", "onnxruntime", "--roofline", "thor",
              "--json", str(report)])  # fmt: skip
    assert stopped.value.code == 0
    latency, _, prediction = " ".join(capsys.readouterr().out.split()).partition(
        "prediction: lower bound on Jetson"
    )
    assert "p50" in latency
    assert prediction.startswith(" AGX Thor (T5000) 128 GB, not measured")
    assert LatencyReport.model_validate_json(report.read_text()).roofline.target == "thor"

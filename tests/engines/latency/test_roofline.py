"""The roofline: bounds from costs and peak rates, its table, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from hipa_deploy.bundle.folder import MANIFEST, Bundle
from hipa_deploy.commands.app import main
from hipa_deploy.embedded import BUNDLE
from hipa_deploy.engines.faults.products import Product
from hipa_deploy.engines.latency.report import LatencyReport
from hipa_deploy.engines.latency.roofline import (
    Peak,
    filled,
    layer_by_layer,
    peak_of,
    predict_roofline,
    utilisation,
)
from hipa_deploy.engines.targets.target import load_target_profile, target_names
from hipa_deploy.errors import HipaError
from tests.engines.roofline_samples import COSTS, shown, with_costs


@pytest.fixture
def bundle(make_bundle) -> Bundle:
    return with_costs(make_bundle())


def test_the_bound_is_the_larger_of_arithmetic_and_traffic(bundle):
    roofline = predict_roofline(bundle, "orin-nano")  # 17 TFLOPS, 102 GB/s
    unet = roofline.stages["unet"]
    assert unet.compute_ms == pytest.approx(2.0)
    assert unet.memory_ms == pytest.approx(0.4)
    assert unet.bound_ms == unet.compute_ms
    assert unet.bound_by == "compute"

    decoder = roofline.stages["vae_decoder"]
    assert decoder.bound_ms == pytest.approx(1.0)
    assert decoder.bound_by == "memory"
    assert roofline.end_to_end_ms == pytest.approx(3.0)
    assert "not measured" in roofline.kind


def test_the_table_says_it_is_a_prediction(bundle):
    text = shown(predict_roofline(bundle, "orin-nano"))
    assert "prediction: lower bound on Jetson Orin Nano 8 GB, not measured" in text
    for part in ("34.00", "3.000", "compute", "17 TFLOPS FP16, dense", "102 GB/s"):
        assert part in text
    assert "p50" not in text
    assert "330.3 TFLOPS FP16, fp16 accumulation" in shown(predict_roofline(bundle, "rtx4090"))


@pytest.mark.parametrize(
    ("product", "tile", "parts", "sm_count", "expected"),
    [
        # One tile on one multiprocessor; the same on two.
        (Product(1, 128, 128, 64), (128, 128), 1, 1, 1.0),
        (Product(1, 128, 128, 64), (128, 128), 1, 2, 0.5),
        # Tile quantisation: 129 rows take two tiles of 128, half of the second for nothing.
        (Product(1, 129, 128, 64), (128, 128), 1, 1, 129 / 256),
        # 7 x 14 tiles in one wave of an A100; one more row and column make two waves of 120.
        (Product(1, 1792, 1792, 64), (256, 128), 1, 108, 98 / 108),
        (Product(1, 1793, 1793, 64), (256, 128), 1, 108, 1793**2 / (216 * 256 * 128)),
        # 20 tiles leave most of 132 idle; in four parts they are 80, in eight 160 in two waves.
        (Product(1, 64, 1280, 11520), (64, 64), 1, 132, 20 / 132),
        (Product(1, 64, 1280, 11520), (64, 64), 4, 132, 80 / 132),
        (Product(1, 64, 1280, 11520), (64, 64), 8, 132, 160 / 264),
        # Eight heads of 40 numbers: 24 of a tile's 64 columns are for nothing.
        (Product(8, 4096, 40, 4096), (64, 64), 1, 128, 40 / 64),
    ],
)
def test_how_full_the_waves_of_tiles_are(product, tile, parts, sm_count, expected):
    assert filled(product, tile, parts, sm_count) == pytest.approx(expected)


def test_the_best_tile_and_split_count():
    # 64 x 64 gives 20 tiles; 1,280 may be split in two parts of 512 or more, not in four.
    assert utilisation(Product(1, 64, 1280, 1280), 132) == pytest.approx(40 / 132)
    # 11,520 may be split in 16: 320 tiles in three waves.
    assert utilisation(Product(1, 64, 1280, 11520), 132) == pytest.approx(320 / 396)
    # A large product fills any GPU.
    assert utilisation(Product(1, 65536, 4096, 4096), 132) > 0.99


def test_layers_take_their_waves_or_their_weights_one_after_another():
    peak = Peak(number_format="fp16", accumulate="fp32", tflops=1.0, bandwidth_gb_s=1.0)
    full = Product(1, 64, 64, 64, weight_bytes=0)  # 524,288 operations: 0.524288 us
    heavy = Product(1, 64, 64, 64, weight_bytes=8192)  # 8.192 us for its weights
    milliseconds, busy = layer_by_layer([full, heavy], peak, 1)
    assert milliseconds == pytest.approx(0.000524288 + 0.008192)
    assert busy == pytest.approx(100)
    milliseconds, busy = layer_by_layer([full], peak, 4)
    assert milliseconds == pytest.approx(4 * 0.000524288)
    assert busy == pytest.approx(25)


def test_a_large_gpu_reaches_less_of_its_roofline_than_a_small_one():
    bundle = Bundle.open(BUNDLE)
    small = predict_roofline(bundle, "orin-nano")
    large = predict_roofline(bundle, "h100")
    assert 0 < large.reachable_percent < small.reachable_percent < 100
    for stage in large.stages.values():
        assert stage.reachable_ms >= stage.bound_ms
        assert 0 < stage.busy_percent < 100
    assert large.reachable_ms == sum(stage.reachable_ms for stage in large.stages.values())
    assert large.reachable_percent == pytest.approx(100 * large.end_to_end_ms / large.reachable_ms)
    text = " ".join(shown(large).split())
    assert f"at best {large.reachable_percent:.0f} % of this roofline. A prediction too." in text
    assert "reachable ms" in text


def test_without_the_shapes_of_that_cost_small_grids_are_not_counted(bundle):
    roofline = predict_roofline(bundle, "h100")
    assert roofline.reachable_ms is None
    assert roofline.reachable_percent is None
    assert "reachable" not in shown(roofline)


def test_fp32_graphs_run_in_tf32_where_it_is_faster(make_bundle):
    a100 = peak_of(load_target_profile("a100"), "fp32")
    assert a100.number_format == "tf32"
    assert a100.tflops == 156

    assert peak_of(load_target_profile("rtx4090"), "fp32").number_format == "fp32"
    assert peak_of(load_target_profile("thor"), "fp32") is None


@pytest.mark.parametrize(
    ("precision", "target", "message"),
    [
        ("fp16", "rtx60", r"target 'rtx60' is unknown. Expected one of: a100"),
        ("fp16", "auto", r"target 'auto' is unknown"),
        (
            "fp16",
            "rtx40",
            r"target rtx40 has no known fp16 peak rate .* Expected one of: a100, .*rtx4090, "
            r"thor\.$",
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
    message = r"stage unet has no cost in hipa.json. Export the bundle again"
    with pytest.raises(HipaError, match=message):
        predict_roofline(make_bundle(), "rtx4090")


def test_rates_are_plausible():
    """Dense, not sparse: FP16 is two to four times TF32 on every device, never more."""
    for name in target_names():
        profile = load_target_profile(name)
        unknown = profile.fp16_tflops is None
        assert (profile.fp16_accumulate is None) == unknown
        assert (profile.gpu_name is None) == unknown
        assert (profile.sm_count is None) == unknown
        if profile.tf32_tflops:
            assert 1.9 < profile.fp16_tflops / profile.tf32_tflops < 4.1


def test_the_command_prints_and_writes_it(tmp_path: Path, capsys, monkeypatch):
    bundle = tmp_path / "bundle"
    report = tmp_path / "latency.json"
    ignored = shutil.ignore_patterns(MANIFEST, "engines")
    shutil.copytree(BUNDLE, bundle, ignore=ignored)
    manifest = json.loads((BUNDLE / MANIFEST).read_text())
    for stage in manifest["stages"]:
        stage["cost"] = COSTS["unet"].model_dump()
    (bundle / MANIFEST).write_text(json.dumps(manifest))
    monkeypatch.setenv("COLUMNS", "150")
    options = ["--runs", "1", "--backend", "onnxruntime", "--roofline", "thor"]
    with pytest.raises(SystemExit) as stopped:
        main(["profile", str(bundle), *options, "--json", str(report)])
    assert stopped.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    latency, _, prediction = printed.partition("prediction: lower bound on Jetson")
    assert "p50" in latency
    assert prediction.startswith(" AGX Thor (T5000) 128 GB, not measured")
    assert LatencyReport.model_validate_json(report.read_text()).roofline.target == "thor"

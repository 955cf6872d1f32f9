"""Two latency reports side by side: ratios, intervals, verdicts and differences."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from rich.console import Console

from hipa_deploy.commands.app import main
from hipa_deploy.engines.device.sysfs import Clock
from hipa_deploy.engines.latency.compare import (
    RESAMPLES,
    compare_reports,
    condition_differences,
    parse_percent,
    render_comparison,
    resampled,
)
from hipa_deploy.engines.latency.stage_timer import END_TO_END
from hipa_deploy.engines.latency.validity import judge
from hipa_deploy.errors import HipaError
from tests.engines.report_samples import CONDITIONS, READING, STATE, a_report


def noisy(centre: float, spread: float = 0.2, runs: int = 50, seed: int = 1) -> list[float]:
    return np.random.default_rng(seed).normal(centre, spread, runs).tolist()


def test_slower_past_the_threshold_and_beyond_chance_is_a_regression():
    compared = compare_reports(a_report(), a_report(noisy(12)))
    unet = compared.rows["unet"]
    whole = compared.rows[END_TO_END]
    assert unet.low < unet.ratio == pytest.approx(1.2, abs=0.02)
    assert 1 < whole.low < whole.ratio < whole.high
    assert unet.verdict == "slower"
    assert compared.rows["vae_decoder"].verdict == "same"
    assert compared.regression is True

    reverse = compare_reports(a_report(noisy(12)), a_report())
    assert reverse.rows["unet"].verdict == "faster"


@pytest.mark.parametrize(
    ("second", "threshold"),
    [
        (noisy(10.0), 5),  # the same
        (noisy(12), 30),  # slower, but not past the threshold
        ([9.0] * 6 + [13.0] * 6, 5),  # past the threshold, but it may be chance
    ],
)
def test_a_small_or_uncertain_change_is_no_regression(second, threshold):
    compared = compare_reports(a_report(), a_report(second), threshold_percent=threshold)
    assert not compared.regression


def test_the_metric_is_what_is_compared():
    tail = [*noisy(10, runs=45), *noisy(30, runs=5)]
    assert not compare_reports(a_report(), a_report(tail), metric="p50").regression
    p95 = compare_reports(a_report(), a_report(tail), metric="p95").rows["unet"]
    assert p95.ratio == pytest.approx(3, abs=0.2)
    mean = compare_reports(a_report(), a_report(tail), metric="mean").rows["unet"]
    assert mean.second_ms == pytest.approx(np.mean(tail), abs=1e-3)


def test_the_interval_misses_the_true_ratio_seldom():
    """Of 60 pairs of samples from one distribution about 5 % of the 95 % intervals miss 1.

    If more than 15 % miss it, the bootstrap is broken.
    """
    missed = 0
    for pair in range(60):
        seed = 1000 + 2 * pair
        first = np.asarray(noisy(10, 1, 60, seed=seed))
        second = np.asarray(noisy(10, 1, 60, seed=seed + 1))
        ratio = resampled(second, "p50", 1) / resampled(first, "p50", 0)
        low, high = np.percentile(ratio, [2.5, 97.5])
        missed += not low <= 1 <= high
    assert missed <= 9


def test_runs_that_resemble_their_neighbours_widen_the_interval():
    drifting = np.cumsum(np.random.default_rng(0).normal(0, 0.05, 200)) + 10
    mixed = np.random.default_rng(1).permutation(drifting)
    drifting_spread = np.std(resampled(drifting, "mean", 0))
    mixed_spread = np.std(resampled(mixed, "mean", 0))
    assert drifting_spread > 1.5 * mixed_spread
    assert len(resampled(mixed, "mean", 0)) == RESAMPLES


def test_a_comparison_is_the_same_every_time():
    first = compare_reports(a_report(), a_report(noisy(12)))
    second = compare_reports(a_report(), a_report(noisy(12)))
    assert first == second


def test_device_time_is_compared_if_both_reports_have_it():
    both = compare_reports(a_report(device=True), a_report(noisy(12), device=True))
    assert both.rows["unet, device"].ratio == pytest.approx(1.2, abs=0.02)
    one = compare_reports(a_report(device=True), a_report())
    assert one.only_in_one == ("end to end, device", "unet, device", "vae_decoder, device")


def test_a_report_that_does_not_count_is_told():
    steady = judge([100.0] * 200, readings=None)
    wandering = judge([100.0] * 200, readings=None, disturbances=["the GPU's clock went away"])
    compared = compare_reports(a_report(validity=steady), a_report(validity=wandering))
    assert compared.warnings == ("second: invalid: the GPU's clock went away",)
    text = io.StringIO()
    Console(file=text, width=200).print(render_comparison(compared))
    assert "warning: second: invalid: the GPU's clock went away." in text.getvalue()


def test_settings_that_differ_are_named_and_readings_are_not():
    clock = Clock(now_mhz=600, max_mhz=612, locked=True)
    slow = READING.model_copy(update={"clocks": {"gpu": clock}, "fan_rpm": 1})
    state = STATE.model_copy(update={"power_mode": "15W (mode 0)", "after": slow})
    versions = {"tensorrt": "10.13.3", "numpy": "2.0"}
    conditions = CONDITIONS.model_copy(update={"state": state, "versions": versions})
    other = a_report(conditions=conditions)
    differences = {}
    for difference in condition_differences(a_report(), other):
        differences[difference.field] = (difference.first, difference.second)
    assert differences == {
        "versions.tensorrt": ("10.3.0.30", "10.13.3"),
        "state.power_mode": ("MAXN_SUPER (mode 2)", "15W (mode 0)"),
        "state.clocks.gpu.max_mhz": ("1020.0", "612.0"),
    }
    assert list(condition_differences(other, other)) == []
    text = shown(compare_reports(a_report(), other))
    assert "the conditions differ" in text
    assert "state.power_mode: MAXN_SUPER (mode 2) -> 15W (mode 0)" in text


def test_another_version_of_openvino_is_another_condition():
    reports = []
    for version in ("2025.4.0", "2026.4.1"):
        update = {"backend": "openvino", "versions": {"openvino": version}}
        reports.append(a_report(conditions=CONDITIONS.model_copy(update=update)))
    (difference,) = condition_differences(*reports)
    assert (difference.field, difference.second) == ("versions.openvino", "2026.4.1")


def shown(comparison) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(render_comparison(comparison))
    return console.file.getvalue()


def test_a_comparison_has_the_warnings_of_the_reports():
    compared = compare_reports(a_report(), a_report(warnings=("throttled",)))
    assert compared.warnings == ("second: throttled",)
    assert "warning: second: throttled." in shown(compared)


def test_a_report_without_samples_or_with_few_is_refused():
    bare = a_report().end_to_end.model_copy(update={"samples_ms": ()})
    with pytest.raises(HipaError, match="the second report has no samples"):
        compare_reports(a_report(), a_report(end_to_end=bare))
    with pytest.raises(HipaError, match=r"the first report has 9 runs\. Expected 10 or more"):
        compare_reports(a_report(noisy(10, runs=9)), a_report())


@pytest.mark.parametrize("percent", [-1, float("nan"), float("inf")])
def test_a_threshold_below_0_or_not_finite_is_refused(percent):
    with pytest.raises(HipaError, match="Expected 0 or more"):
        compare_reports(a_report(), a_report(), threshold_percent=percent)


def test_percentages_are_read_with_and_without_the_sign():
    assert parse_percent("5%") == parse_percent(" 5 % ") == parse_percent("5") == 5
    with pytest.raises(HipaError, match="'x%' is not a percentage"):
        parse_percent("x%")


def test_the_command_ends_with_1_only_on_a_regression(tmp_path, capsys):
    for name, report in (("a", a_report()), ("b", a_report(noisy(12)))):
        (tmp_path / f"{name}.json").write_text(report.model_dump_json())

    def code(first: str, second: str, *more: str) -> int:
        with pytest.raises(SystemExit) as stopped:
            main(["profile", "compare", str(tmp_path / first), str(tmp_path / second), *more])
        return stopped.value.code

    assert code("a.json", "b.json", "--json", str(tmp_path / "c.json")) == 1
    assert json.loads((tmp_path / "c.json").read_text())["regression"] is True
    assert code("b.json", "a.json") == code("a.json", "b.json", "--threshold", "50%") == 0
    assert "no regression" in capsys.readouterr().out

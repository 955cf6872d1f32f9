"""Measuring latency: which runs count, what the report says of them, and the statistics."""

from __future__ import annotations

import io
import itertools
import json
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from hipa_deploy import embedded
from hipa_deploy.bundle.folder import MANIFEST, Bundle
from hipa_deploy.bundle.manifest import ModelInfo
from hipa_deploy.bundle.reference import REFERENCE_PROMPTS
from hipa_deploy.disk.hashing import file_sha256
from hipa_deploy.engines.backends.available import Backend, describe_device
from hipa_deploy.engines.latency import measure
from hipa_deploy.engines.latency.html_page import render_page
from hipa_deploy.engines.latency.measure import (
    _run_prompts,
    drift_warnings,
    profile_pipeline,
    summarise,
)
from hipa_deploy.engines.latency.report import LatencyReport, stage_stats
from hipa_deploy.engines.latency.stage_timer import END_TO_END
from hipa_deploy.engines.latency.table import markdown_table, render_table
from hipa_deploy.engines.latency.with_roofline import with_own_roofline
from hipa_deploy.errors import HipaError
from hipa_deploy.generate.pipeline import OneStepPipeline
from hipa_deploy.generate.prompts import BAKED_PROMPTS
from tests.engines import engine_samples as samples
from tests.engines.bundle_gpu import BundleGpu
from tests.engines.machine_samples import ORIN, plant

QUIET = Console(file=io.StringIO())


class StubPipeline:
    """Sleeps where OneStepPipeline computes, and caches text contexts as it does."""

    backend = "onnxruntime"
    load_seconds = 0.5
    low_memory = False

    def __init__(self, root: Path, *, baked: bool = False) -> None:
        """A bundle of two images a batch; ``baked``: it has a closed set of prompts."""
        manifest = SimpleNamespace(
            batch=2,
            precision="fp16",
            one_step=SimpleNamespace(height=8, width=16),
            producer="tests",
            layout="onestep",
            base_model=ModelInfo(name="tiny", sha256="0" * 64),
            adaptor=None,
            decoder=None,
            files={BAKED_PROMPTS: "0" * 64} if baked else {},
            task="generate",
        )
        self.bundle = SimpleNamespace(
            root=root, manifest=manifest, stages={}, path=lambda name: root / name
        )
        self.runners: dict[str, SimpleNamespace] = {}
        self.prompts: list[str] = []

    def __call__(self, prompt, *, source, seed, count, truncate, timer):
        assert source is None
        assert truncate or not prompt[0].isdigit()
        assert count == self.bundle.manifest.batch
        if prompt not in self.prompts:
            with timer("text_encoder"):
                time.sleep(0.001)
        with timer("unet"):
            time.sleep(0.05 if not self.prompts else 0.002)
        self.prompts.append(prompt)


@pytest.fixture
def pipeline(tmp_path: Path) -> StubPipeline:
    """A stub whose bundle has the reference prompt 'a cat'."""
    path = tmp_path / REFERENCE_PROMPTS
    path.parent.mkdir()
    path.write_text('{"prompts": ["a cat"], "seeds": [0]}')
    return StubPipeline(tmp_path)


def test_the_first_run_is_apart_and_prompts_differ(pipeline):
    report = profile_pipeline(pipeline, runs=6, warmup=2, console=QUIET)
    assert pipeline.prompts == [f"{number} a cat" for number in range(9)]
    assert report.stages.keys() == {"text_encoder", "unet"}
    assert report.stages["unet"].first_ms >= 50 > report.stages["unet"].p50_ms >= 2
    assert report.end_to_end.runs == 6
    assert report.end_to_end.p50_ms >= report.stages["unet"].p50_ms
    assert report.throughput_images_per_second == pytest.approx(2e3 / report.end_to_end.mean_ms)
    assert report.conditions.prompts == "a new prompt every run"
    assert report.conditions.versions.keys() >= {"hipa-deploy", "numpy"}


def test_the_version_of_every_backend_is_recorded(pipeline, monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda package: "1.0")
    report = profile_pipeline(pipeline, runs=1, warmup=0, console=QUIET)
    assert {"onnxruntime", "openvino", "tensorrt"} <= report.conditions.versions.keys()


def test_it_goes_on_for_as_long_as_it_is_told_and_says_whether_the_figures_count(pipeline):
    report = profile_pipeline(pipeline, runs=3, warmup=0, seconds=0.1, console=QUIET)
    assert report.end_to_end.runs > 10
    assert 0.1 <= report.validity.seconds < 0.2
    assert pipeline.prompts[-1] == f"{report.end_to_end.runs} a cat"
    assert not report.validity.valid
    assert "at least 10 s are needed" in " ".join(report.validity.reasons)
    assert report.validity.steadiness is None  # no GPU took part


def test_the_gpu_is_watched_while_the_runs_go_on(pipeline, monkeypatch):
    from hipa_deploy.engines.latency import machine_state

    smi = {"clocks.sm": "1500", "temperature.gpu": "71", "reasons": "0x0"}
    monkeypatch.setattr(machine_state, "ask_smi", lambda name, address: smi)
    monkeypatch.setattr(machine_state, "WATCH_SECONDS", 0.02)
    pipeline.backend = "onnxruntime-cuda"
    report = profile_pipeline(pipeline, runs=2, warmup=0, seconds=0.3, console=QUIET)
    steadiness = report.validity.steadiness
    assert steadiness.readings >= 2
    assert (steadiness.clock_low_mhz, steadiness.celsius_high) == (1500, 71)


def test_seconds_out_of_range_are_refused(pipeline):
    with pytest.raises(HipaError, match="got -1 seconds"):
        profile_pipeline(pipeline, runs=2, warmup=0, seconds=-1, console=QUIET)


def test_the_new_prompts_of_the_embedded_bundle():
    prompts = _run_prompts(Bundle.open(embedded.BUNDLE), None)
    assert prompts.text(0) == "0 3d emoji of a red apple"
    assert prompts.text(57) == "57 3d emoji of a red apple"


def test_a_reference_prompt_that_fills_the_context(tmp_path):
    """With the number it is too long. It is cut, and still new in every run."""
    root = shutil.copytree(embedded.BUNDLE, tmp_path / "bundle")
    prompt = f"3d emoji of a red apple{68 * ' apple'}"
    content = json.dumps({"prompts": [prompt], "seeds": [0]})
    (root / REFERENCE_PROMPTS).write_text(content, encoding="utf-8")
    manifest = json.loads((root / MANIFEST).read_text(encoding="utf-8"))
    manifest["files"][REFERENCE_PROMPTS] = file_sha256(root / REFERENCE_PROMPTS)
    (root / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    with OneStepPipeline.load(root, "onnxruntime") as pipe:
        with pytest.raises(HipaError, match="the prompt has 78 tokens"):
            pipe(f"{prompt} 1")
        report = profile_pipeline(pipe, runs=11, warmup=0, layers=True, console=QUIET)
    # The text encoder ran in every run, so no two prompts were the same.
    assert report.stages["text_encoder"].runs == 11
    assert report.layers["text_encoder"]


def test_a_bundle_without_a_reference_has_no_prompt_to_measure(tmp_path):
    with pytest.raises(HipaError, match="reference cannot be read"):
        profile_pipeline(StubPipeline(tmp_path), runs=1, warmup=0, console=QUIET)


def test_with_one_prompt_the_report_says_the_text_is_cached(pipeline):
    report = profile_pipeline(pipeline, runs=2, warmup=0, prompt="a dog", console=QUIET)
    assert pipeline.prompts == ["a dog"] * 3
    assert report.stages.keys() == {"unet"}
    assert "cached" in report.conditions.prompts


def test_baked_prompts_are_taken_in_turn(tmp_path):
    path = tmp_path / BAKED_PROMPTS
    path.parent.mkdir()
    path.write_text("a cat\na dog\n")
    pipeline = StubPipeline(tmp_path, baked=True)
    report = profile_pipeline(pipeline, runs=3, warmup=1, console=QUIET)
    assert pipeline.prompts == ["a cat", "a dog", "a cat", "a dog", "a cat"]
    assert "baked" in report.conditions.prompts


def test_device_time_and_memory_where_every_runner_measures_them(pipeline):
    runners = {
        "text_encoder": SimpleNamespace(device_ms=0.25, device_memory_mib=100.0),
        "unet": SimpleNamespace(device_ms=1.5, device_memory_mib=100.0),
    }
    pipeline.runners = runners
    report = profile_pipeline(pipeline, runs=3, warmup=0, console=QUIET)
    p50_ms = {name: stats.p50_ms for name, stats in report.device.items()}
    assert p50_ms == pytest.approx({"text_encoder": 0.25, "unet": 1.5, END_TO_END: 1.75})
    assert report.peak_device_mib == 100  # the largest: each runner counts the whole device
    text = shown(report)
    assert "device p50" in text
    assert "device memory 100 MiB" in text

    for runner in runners.values():
        runner.device_ms = None
        runner.device_memory_mib = None
    unmeasured = profile_pipeline(pipeline, runs=1, warmup=0, console=QUIET)
    assert unmeasured.device == {}
    assert unmeasured.peak_device_mib is None
    assert "device p50" not in shown(unmeasured)


def test_the_machines_state_and_its_warnings(pipeline, tmp_path):
    root = plant(tmp_path / "machine", ORIN)
    report = profile_pipeline(pipeline, runs=1, warmup=0, console=QUIET, root=root)
    assert report.conditions.state.power_mode == "MAXN_SUPER (mode 2)"
    assert "throttled before the runs: gpu-throttle-alert" in report.warnings
    text = shown(report)
    for part in (
        "power mode MAXN_SUPER",
        "gpu clock 1020 of 1020 MHz",
        "hottest 54 °C",
        "warning: throttled before",
    ):
        assert part in text


def test_runs_that_slow_down_or_speed_up_give_a_warning():
    slower = drift_warnings([10.0] * 30 + [12.0] * 10)
    faster = drift_warnings([10.0] * 10 + [7.5] * 30)
    assert "the last quarter of the runs was 20% slower" in slower[0]
    assert "25% faster" in faster[0]


def test_steady_runs_and_too_few_runs_give_no_warning():
    assert drift_warnings([10.0] * 40) == ()
    assert drift_warnings([10.0, 99.0]) == ()


def test_samples_are_kept_in_order(pipeline):
    report = profile_pipeline(pipeline, runs=4, warmup=1, console=QUIET)
    for stats in (report.end_to_end, *report.stages.values()):
        assert len(stats.samples_ms) == 4
        assert stats.p50_ms == pytest.approx(float(np.median(stats.samples_ms)), abs=1e-3)
        assert stats.p90_ms <= stats.p95_ms <= stats.p99_ms <= stats.max_ms


def shown(report) -> str:
    console = Console(file=io.StringIO(), width=170)
    console.print(render_table(report))
    return " ".join(console.file.getvalue().split())  # captions wrap


def test_json_and_table(pipeline):
    report = profile_pipeline(pipeline, runs=1, warmup=0, console=QUIET)
    assert LatencyReport.model_validate_json(report.model_dump_json()) == report
    text = shown(report)
    for part in (
        "batch of 2, 16x8, fp16, onnxruntime",
        "unet",
        "end to end",
        "p95",
        "p99",
        "1 runs after 0",
        "close to the slowest",
        "images/s",
    ):
        assert part in text


@pytest.mark.parametrize(("runs", "warmup"), [(0, 0), (1, -1), (10**9, 0)])
def test_counts_out_of_range_are_refused(pipeline, runs, warmup):
    with pytest.raises(HipaError, match="Expected 1 to"):
        profile_pipeline(pipeline, runs=runs, warmup=warmup, console=QUIET)


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=200))
def test_statistics_are_ordered_and_within_the_data(seconds):
    stats = summarise(seconds, None)
    most_ms = max(seconds) * 1e3
    tolerance = 1e-6 + 1e-9 * most_ms
    percentiles = [stats.p50_ms, stats.p90_ms, stats.p95_ms, stats.p99_ms]
    for low, high in itertools.pairwise([stats.min_ms, *percentiles, most_ms]):
        assert low <= high + tolerance
    assert stats.min_ms - tolerance <= stats.mean_ms <= most_ms + tolerance
    assert stats.runs == len(seconds)
    assert stats.p50_ms == pytest.approx(float(np.median(seconds)) * 1e3)


def test_a_library_without_a_package_of_its_name_has_its_version(monkeypatch):
    """The packages for CUDA 12 have other names, and a system's TensorRT may have no package."""
    here = [Backend(name="rtx", version="1.7.1.116", usable=True, remedy=None)]
    here.append(Backend(name="tensorrt", version=None, usable=False, remedy=""))
    monkeypatch.setattr(measure, "_PACKAGES", ("numpy",))
    device = describe_device().model_copy(update={"backends": tuple(here)})
    assert measure._versions(device) == {"numpy": np.__version__, "tensorrt-rtx": "1.7.1.116"}


def test_stages_of_engines_are_in_every_view_of_the_report(tmp_path, monkeypatch):
    """They run in one call: the host sees that call, and only the device sees the stages."""
    bundle = Bundle(tmp_path, Bundle.open(embedded.BUNDLE).manifest)
    shutil.copytree(embedded.BUNDLE, tmp_path, dirs_exist_ok=True)
    BundleGpu(bundle).install(monkeypatch)
    nano = describe_device().model_copy(update={"gpu": samples.ORIN, "jetson": "Orin Nano"})
    monkeypatch.setattr(measure, "describe_device", lambda: nano)
    with OneStepPipeline.load(tmp_path, "tensorrt") as pipe:
        report = profile_pipeline(pipe, runs=3, warmup=1, console=QUIET)
    assert list(report.stages) == ["pipeline"]
    stages = ["text_encoder", "unet", "vae_decoder"]
    assert list(report.device) == [*stages, END_TO_END]
    assert list(stage_stats(report)) == ["pipeline", *stages]

    # The roofline, the page, the terminal, the table to publish.
    report = with_own_roofline(report, bundle)
    for name in stages:
        assert report.roofline.stages[name].measured_percent > 0
    assert report.roofline.measured_percent > 0
    page = render_page(report)
    assert all(f"<title>{name}: " in page for name in stages)
    table = render_table(report)
    assert list(table.columns[0].cells) == ["pipeline", *stages, END_TO_END]
    assert "-" not in list(table.columns[-1].cells)[1:]
    head, _, row, _, note = markdown_table([report]).splitlines()[:5]
    by_name = dict(zip(head.split(" | "), row.split(" | "), strict=True))
    assert "-" not in [by_name[f"{name} p50"] for name in stages]
    assert by_name["% of bound"] != "-"
    assert note.endswith("as the device measures them.")

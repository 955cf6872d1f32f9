from __future__ import annotations

import io
import itertools
import json
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from hipa_deploy.bundle.manifest import ModelInfo
from hipa_deploy.engines.latency.measure import drift_warnings, profile_pipeline, summarise
from hipa_deploy.engines.latency.report import END_TO_END, LatencyReport, read_report
from hipa_deploy.engines.latency.table import render_table
from hipa_deploy.errors import HipaError
from tests.engines.machine_samples import ORIN, plant

QUIET = Console(file=io.StringIO())


class StubPipeline:
    """Sleeps where OneStepPipeline computes, and caches text contexts as it does."""

    backend, load_seconds = "onnxruntime", 0.5

    def __init__(
        self, batch: int = 2, files: dict[str, str] | None = None, root: Path | None = None
    ) -> None:
        manifest = SimpleNamespace(
            batch=batch, precision="fp16", one_step=SimpleNamespace(height=8, width=16), producer="tests",
            layout="onestep", base_model=ModelInfo(name="tiny", sha256="0" * 64), adaptor=None, decoder=None,
            files=files or {}, task="generate",
        )  # fmt: skip
        self.bundle = SimpleNamespace(manifest=manifest, stages={}, path=lambda name: root / name)
        self.runners: dict[str, SimpleNamespace] = {}
        self.prompts: list[str] = []

    def __call__(self, prompt, *, source, seed, count, timer):
        assert source is None
        assert count == self.bundle.manifest.batch
        if prompt not in self.prompts:
            with timer("text_encoder"):
                time.sleep(0.001)
        with timer("unet"):
            time.sleep(0.05 if not self.prompts else 0.002)
        self.prompts.append(prompt)


def test_the_first_run_is_apart_and_prompts_differ():
    pipeline = StubPipeline()
    report = profile_pipeline(pipeline, runs=6, warmup=2, console=QUIET)
    assert len(set(pipeline.prompts)) == 9
    assert report.stages.keys() == {"text_encoder", "unet"}
    assert report.stages["unet"].first_ms >= 50 > report.stages["unet"].p50_ms >= 2
    assert report.end_to_end.runs == 6
    assert report.end_to_end.p50_ms >= report.stages["unet"].p50_ms
    assert report.throughput_images_per_second == pytest.approx(2e3 / report.end_to_end.mean_ms)
    assert report.conditions.prompts == "a new prompt every run"
    assert report.conditions.versions.keys() >= {"hipa-deploy", "numpy"}


def test_with_one_prompt_the_report_says_the_text_is_cached():
    report = profile_pipeline(StubPipeline(), runs=2, warmup=0, prompt="a cat", console=QUIET)
    assert report.stages.keys() == {"unet"}
    assert "cached" in report.conditions.prompts


def test_baked_prompts_are_taken_in_turn(tmp_path):
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts/prompts.txt").write_text("a cat\na dog\n")
    pipeline = StubPipeline(files={"prompts/prompts.txt": "0" * 64}, root=tmp_path)
    report = profile_pipeline(pipeline, runs=3, warmup=1, console=QUIET)
    assert pipeline.prompts == ["a cat", "a dog", "a cat", "a dog", "a cat"]
    assert "baked" in report.conditions.prompts


def test_device_time_and_memory_where_every_runner_tells():
    pipeline = StubPipeline()
    runners = {name: SimpleNamespace(device_ms=ms, device_memory_mib=100.0)
               for name, ms in (("text_encoder", 0.25), ("unet", 1.5))}  # fmt: skip
    pipeline.runners = runners
    report = profile_pipeline(pipeline, runs=3, warmup=0, console=QUIET)
    assert {name: stats.p50_ms for name, stats in report.device.items()} == pytest.approx(
        {"text_encoder": 0.25, "unet": 1.5, END_TO_END: 1.75}
    )
    assert report.peak_device_mib == 100  # each tells of all
    text = shown(report)
    assert "device p50" in text
    assert "device memory 100 MiB" in text
    for runner in runners.values():
        runner.device_ms = runner.device_memory_mib = None
    silent = profile_pipeline(pipeline, runs=1, warmup=0, console=QUIET)
    assert (silent.device, silent.peak_device_mib) == ({}, None)
    assert "device p50" not in shown(silent)


def test_the_machines_state_and_its_warnings(tmp_path):
    report = profile_pipeline(
        StubPipeline(), runs=1, warmup=0, console=QUIET, root=plant(tmp_path, ORIN)
    )
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


def test_runs_that_slow_down_are_told():
    assert drift_warnings([10.0] * 40) == drift_warnings([10.0, 99.0]) == ()
    assert (
        "the last quarter of the runs was 20% slower"
        in drift_warnings([10.0] * 30 + [12.0] * 10)[0]
    )
    assert "25% faster" in drift_warnings([10.0] * 10 + [7.5] * 30)[0]


def test_samples_are_kept_in_order():
    report = profile_pipeline(StubPipeline(), runs=4, warmup=1, console=QUIET)
    for stats in (report.end_to_end, *report.stages.values()):
        assert len(stats.samples_ms) == 4
        assert stats.p50_ms == pytest.approx(float(np.median(stats.samples_ms)), abs=1e-3)
        assert stats.p90_ms <= stats.p95_ms <= stats.p99_ms <= stats.max_ms


def test_a_report_of_schema_1_still_loads(tmp_path):
    old = json.loads((Path(__file__).parents[1] / "latency-schema-1.json").read_text())
    (tmp_path / "old.json").write_text(json.dumps(old))
    report = read_report(tmp_path / "old.json")
    assert (report.schema_version, report.end_to_end.samples_ms, report.conditions.state) == (
        1,
        (),
        None,
    )
    assert "end to end" in shown(report)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"schema_version": 3}', "\x00"])
def test_what_is_no_report_is_refused(tmp_path, text):
    (tmp_path / "no.json").write_text(text)
    with pytest.raises(HipaError, match=r"no\.json: not a latency report of this version"):
        read_report(tmp_path / "no.json")


def test_a_report_that_is_not_there(tmp_path):
    with pytest.raises(HipaError, match="No such file"):
        read_report(tmp_path / "no.json")


def test_the_published_schema_is_the_reports():
    """If a record has changed: hipa-profile's ``LatencyReport.model_json_schema()``, two spaces, into that file."""
    published = json.loads((Path(__file__).parents[3] / "docs/latency.schema.json").read_text())
    assert published == LatencyReport.model_json_schema()


def shown(report) -> str:
    console = Console(file=io.StringIO(), width=170)
    console.print(render_table(report))
    return " ".join(console.file.getvalue().split())  # captions wrap


def test_json_and_table():
    report = profile_pipeline(StubPipeline(), runs=1, warmup=0, console=QUIET)
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
def test_absurd_counts_are_refused(runs, warmup):
    with pytest.raises(HipaError, match="Expected 1 to"):
        profile_pipeline(StubPipeline(), runs=runs, warmup=warmup, console=QUIET)


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=200))
def test_statistics_are_ordered_and_within_the_data(seconds):
    stats, tolerance = summarise(seconds, None), 1e-6 + 1e-9 * max(seconds) * 1e3
    ordered = [
        stats.min_ms,
        stats.p50_ms,
        stats.p90_ms,
        stats.p95_ms,
        stats.p99_ms,
        max(seconds) * 1e3,
    ]
    assert all(low <= high + tolerance for low, high in itertools.pairwise(ordered))
    assert stats.min_ms - tolerance <= stats.mean_ms <= max(seconds) * 1e3 + tolerance
    assert stats.runs == len(seconds)
    assert stats.p50_ms == pytest.approx(float(np.median(seconds)) * 1e3)

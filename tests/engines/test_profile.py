from __future__ import annotations

import io
import itertools
import time
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from hipa_deploy.engines.profile import LatencyReport, StageTimer, profile_pipeline, render_table, summarise
from hipa_deploy.errors import HipaError

QUIET = Console(file=io.StringIO())


class StubPipeline:
    """Sleeps where OneStepPipeline computes, and caches text contexts as it does."""

    backend, load_seconds = "onnxruntime", 0.5

    def __init__(self, batch: int = 2) -> None:
        one_step = SimpleNamespace(height=8, width=16)
        self.bundle = SimpleNamespace(manifest=SimpleNamespace(batch=batch, precision="fp16", one_step=one_step))
        self.prompts: list[str] = []

    def __call__(self, prompt, *, seed, count, timer):
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


def test_json_and_table():
    report = profile_pipeline(StubPipeline(), runs=1, warmup=0, console=QUIET)
    assert LatencyReport.model_validate_json(report.model_dump_json()) == report
    console = Console(file=io.StringIO(), width=150)
    console.print(render_table(report))
    text = console.file.getvalue()
    for part in ("batch of 2, 16x8, fp16, onnxruntime", "unet", "end to end", "p99", "1 runs after 0", "images/s"):
        assert part in text


@pytest.mark.parametrize(("runs", "warmup"), [(0, 0), (1, -1), (10**9, 0)])
def test_absurd_counts_are_refused(runs, warmup):
    with pytest.raises(HipaError, match="Expected 1 to"):
        profile_pipeline(StubPipeline(), runs=runs, warmup=warmup, console=QUIET)


def test_a_stage_that_runs_twice_adds_up():
    timer = StageTimer()
    for _ in range(2):
        with timer("unet"):
            time.sleep(0.002)
    assert timer.seconds["unet"] >= 0.004


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=200))
def test_statistics_are_ordered_and_within_the_data(seconds):
    stats, tolerance = summarise(seconds, None), 1e-6 + 1e-9 * max(seconds) * 1e3
    ordered = [stats.min_ms, stats.p50_ms, stats.p90_ms, stats.p99_ms, max(seconds) * 1e3]
    assert all(low <= high + tolerance for low, high in itertools.pairwise(ordered))
    assert stats.min_ms - tolerance <= stats.mean_ms <= max(seconds) * 1e3 + tolerance
    assert stats.runs == len(seconds)
    assert stats.p50_ms == pytest.approx(float(np.median(seconds)) * 1e3)

"""The self-test on this machine as it is, and on steps that were made to fail."""

import io
import json
import warnings
from pathlib import Path

import pytest
from rich.console import Console

from hipa_deploy.commands.app import main
from hipa_deploy.doctor import self_test as self_test_module
from hipa_deploy.doctor.self_check import check_pipeline
from hipa_deploy.doctor.self_test import SelfTest, Step, _gpu_verdict, describe
from hipa_deploy.doctor.self_test_report import render_terminal, render_text, verdict
from hipa_deploy.engines.tensorrt.gpu import find_gpu
from hipa_deploy.errors import HipaError


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few runs: the bounds of a valid time have tests of their own."""
    monkeypatch.setattr(self_test_module, "RUNS", 5)
    monkeypatch.setattr(self_test_module, "SECONDS", 0.0)


def report_of(text: str) -> SelfTest:
    return SelfTest.model_validate_json(text.split("```json")[1].split("```")[0])


@pytest.mark.slow
def test_it_builds_runs_and_writes_a_report_that_a_program_can_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", "--self-test", "--out", str(tmp_path / "report.md")])
    text = (tmp_path / "report.md").read_text()
    report = report_of(text)
    steps = {step.name: step for step in report.steps}
    assert stopped.value.code == 0
    assert verdict(report) in " ".join(capsys.readouterr().out.split())
    ran = steps["run onnxruntime"]
    assert ran.outcome == "passed"
    lines = {check.name: check for check in ran.checks}
    assert lines["unet"].outcome == "passed"
    assert lines["unet"].bound == "at least 35 dB"
    assert lines["unet"].measured.endswith("dB from PyTorch FP32")
    assert lines["time of a batch"].outcome == "invalid"
    assert "5 queries, and at least 100 are needed" in lines["time of a batch"].measured
    assert ran.validity.queries == 5
    assert ran.figures["self_check"]["end to end"].endswith("passes")
    assert ran.figures["p50_ms"] > 0
    assert all(step.outcome != "skipped" or step.detail for step in steps.values())
    if find_gpu() is None:
        assert report.gpu == "no GPU was tested: no NVIDIA GPU answers here"
        assert f"- tested: {report.gpu}" in text
        assert steps["run rtx"].outcome == "skipped"
        if steps["build rtx"].outcome != "skipped":  # built for real, of the smallest stage
            assert steps["build rtx"].detail == "1 of 3 engines: vae_decoder"
            assert steps["build rtx"].figures["vae_decoder"]["bytes"] > 100_000


@pytest.fixture
def only_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    """No build, one backend."""
    from hipa_deploy.engines.backends import available as device

    def unusable(library: str, gpu: object) -> device.Backend:
        return device.Backend(name=library, version=None, usable=False, remedy="not here")

    monkeypatch.setattr(device, "_engine_backend", unusable)
    monkeypatch.setattr(device, "_openvino_backends", list)


def broken(*arguments: object) -> None:
    raise ZeroDivisionError("a bug")


@pytest.mark.usefixtures("only_onnxruntime")
def test_a_step_that_breaks_is_reported_in_one_line_and_the_others_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(self_test_module, "check_pipeline", broken)
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", "--self-test", "--json"])
    steps = {step["name"]: step for step in json.loads(capsys.readouterr().out)["steps"]}
    assert stopped.value.code == 1
    assert steps["run onnxruntime"]["outcome"] == "failed"
    assert steps["run onnxruntime"]["detail"].startswith(
        "ZeroDivisionError: a bug (test_self_test.py:"
    )
    assert steps["build rtx"] | {"seconds": 0} == {
        "name": "build rtx",
        "outcome": "skipped",
        "detail": "not here",
        "seconds": 0,
        "figures": {},
        "notes": [],
        "checks": [],
        "validity": None,
    }
    assert steps["run rtx"]["outcome"] == "skipped"


@pytest.mark.usefixtures("only_onnxruntime")
def test_a_gate_that_fails_keeps_its_figures_and_warnings_are_notes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def failing(pipe):
        warnings.warn("no CUDA graph", RuntimeWarning, stacklevel=1)
        return check_pipeline(pipe).model_copy(update={"problems": ("unet is 3 dB from PyTorch.",)})

    monkeypatch.setattr(self_test_module, "check_pipeline", failing)
    report = self_test_module.self_test()
    step = next(step for step in report.steps if step.name == "run onnxruntime")
    assert report.failed
    assert (step.outcome, step.detail, step.notes) == (
        "failed",
        "unet is 3 dB from PyTorch.",
        ("no CUDA graph",),
    )
    assert step.figures["p50_ms"] > 0
    assert report_of(render_text(report)) == report
    assert verdict(report).startswith("FAILED: failed steps: run onnxruntime; ")
    shown = shown_at(report, width=60)
    assert "unet is 3 dB" in shown
    assert "…" not in shown  # names and commands are whole
    assert "GPU: no GPU was tested" in shown


def shown_at(report: SelfTest, width: int) -> str:
    screen = io.StringIO()
    Console(file=screen, width=width).print(render_terminal(report))
    return screen.getvalue()


def test_the_verdict_on_a_gpu_is_of_what_ran_on_it() -> None:
    cpu = Step(name="run onnxruntime", outcome="passed", detail="")
    skipped = Step(name="run rtx", outcome="skipped", detail="not installed")
    built = Step(name="build rtx", outcome="passed", detail="")
    ran = Step(name="run rtx", outcome="passed", detail="")
    failed = Step(name="run onnxruntime-cuda", outcome="failed", detail="wrong")
    here = {"gpu": {"name": "H100"}}
    assert "no NVIDIA GPU answers" in _gpu_verdict({"gpu": None}, (cpu,))
    nothing = _gpu_verdict(here, (cpu, built, skipped))
    assert nothing == "no GPU was tested: no backend runs on the H100 here"
    assert _gpu_verdict(here, (cpu, ran, failed)) == (
        "H100 was tested: rtx passed, onnxruntime-cuda failed"
    )


def test_a_report_of_version_1_still_loads() -> None:
    old = {"schema_version": 1, "created": "", "producer": "", "device": {}, "versions": {}}
    step = {"name": "run rtx", "outcome": "passed", "detail": "fine"}
    report = SelfTest.model_validate({**old, "steps": [step]})
    assert report.steps[0].checks == ()
    assert verdict(report) == "passed: 0 of 0 checks passed; 0 steps skipped"


def test_our_own_errors_are_reported_as_they_are() -> None:
    assert describe(HipaError("run this. It helps.")) == "run this. It helps."
    assert describe(ValueError("two\nlines")) == "ValueError: two"

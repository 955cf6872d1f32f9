"""The command: what it refuses, what it says is missing, and a run of a part as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import run
from benchmarks.gpu.figures import NO_TIME, read_figures, read_part

ROOT = Path(__file__).parents[3]
TINY = ("--device", "cpu", "--tiny")


def command(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the script as a user would, from another folder."""
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/gpu/run.py"), *arguments],
        cwd=path,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_a_part_as_a_user_runs_it_then_again_and_then_with_figures_of_another_machine(tmp_path):
    out = tmp_path / "out"
    done = command(*TINY, "--out", str(out), "--only", "rates", "--minutes", "2", path=tmp_path)
    assert done.returncode == 0, done.stderr
    report = read_figures(out / "gpu-figures.json")
    assert report.conditions.note == run.TINY_NOTE
    figures = {figure.name: figure for figure in report.parts["rates"].figures}
    assert figures["copy on the device"].unit == "GB/s"
    assert figures["matrix product, fp32"].per_second > 0
    assert report.parts["rates"].left_out == {"matrix product, tf32": "a CPU has no TF32"}
    for figure in figures.values():
        assert not figure.validity.valid
        assert run.TINY_NOTE in figure.validity.reasons
    text = (out / "report.md").read_text()
    assert "no NVIDIA GPU: none was tested" in text
    assert text in done.stdout
    # Nothing of it needs an installation: the code of this folder is linked.
    assert (out / "work/tree/hipa_deploy/train").resolve() == ROOT / "train"

    again = command(*TINY, "--out", str(out), "--only", "rates")
    assert again.returncode == 0
    assert "rates: measured before" in again.stdout

    conditions = out / "conditions.json"
    conditions.write_text(conditions.read_text().replace(run.TINY_NOTE, "another"))
    refused = command(*TINY, "--out", str(out))
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: ")
    assert "figures of other conditions (note changed)" in refused.stderr


def arguments(monkeypatch: pytest.MonkeyPatch, *given: str) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", *given])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--out", "x", "--device", "cpu"), "--device cpu and --tiny go together"),
        (("--out", "x", "--tiny"), "--device cpu and --tiny go together"),
        (("--out", "x", "--minutes", "0"), "--minutes is 0. Expected 0.1 to 600."),
        (("--out", "x", "--only", "speed"), "invalid choice: 'speed'"),
        ((), "--out"),
    ],
)
def test_what_cannot_be_run_is_refused(monkeypatch, capsys, given, message):
    arguments(monkeypatch, *given)
    with pytest.raises(SystemExit) as stopped:
        run.main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_without_a_gpu_it_says_how_to_check_the_script(monkeypatch, capsys, tmp_path):
    arguments(monkeypatch, "--out", str(tmp_path / "out"))
    monkeypatch.setattr(run, "gpu_answers", lambda: False)
    assert run.main() == 1
    assert "no NVIDIA GPU answers" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_missing_packages_are_named_with_both_commands(monkeypatch, capsys):
    arguments(monkeypatch, "--out", "x")
    monkeypatch.setitem(run.NEEDED, "no_such_module", "pydantic-of-mars")
    assert run.main() == 1
    said = capsys.readouterr().err
    assert "not installed: pydantic-of-mars." in said
    assert "-m pip install pydantic-of-mars" in said
    assert "--no-index --find-links WHEELS pydantic-of-mars" in said
    assert run.absent({"no_parent.of_it": "a"}) == ["a"]


def test_the_parts_begin_without_the_packages_that_are_optional():
    absent = [name for name in run.OPTIONAL if "." not in name]
    code = f"""
import sys
sys.modules.update(dict.fromkeys({absent}))
sys.path.insert(0, ".")
import benchmarks.gpu.part, benchmarks.gpu.rates, benchmarks.gpu.models
import benchmarks.gpu.torch_inference, benchmarks.gpu.backends
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_part_that_does_not_end_is_stopped_with_its_children(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "GRACE_SECONDS", 0.2)
    mark = tmp_path / "alive"
    shell = f"(while true; do touch {mark}; sleep 0.05; done) & wait"
    child = subprocess.Popen(["bash", "-c", shell], start_new_session=True)
    while not mark.exists():
        time.sleep(0.01)
    assert run.finished("torch", child, time.time())
    mark.unlink()
    time.sleep(0.3)
    assert not mark.exists()


def test_a_part_that_crashes_fails_the_command():
    child = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"], start_new_session=True)
    assert not run.finished("torch", child, time.time() + 30)


def test_a_job_without_time_leaves_every_case_out(new_job):
    from benchmarks.gpu import rates

    rates.run(new_job("rates", seconds=-1))
    result = read_part(new_job("rates").out, "rates")
    assert result.figures == ()
    assert result.left_out["matrix product, fp16"] == NO_TIME

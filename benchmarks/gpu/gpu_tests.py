"""The project's own tests that need a GPU, counted."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.gpu.figures import Fact
from benchmarks.gpu.job import Job

ROOT = Path(__file__).absolute().parents[2]
MARK = "mark.gpu"
NAME = "pytest -m gpu"


def run(job: Job) -> None:
    """Run the tests and note how many passed, failed and were skipped, with their reasons."""
    job.file.plan([NAME])
    absent = [module for module in ("pytest", "hypothesis") if find_spec(module) is None]
    if absent:
        job.file.leave_out(NAME, f"{', '.join(absent)} is not installed")
        return

    report = job.work / "gpu-tests.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    command += [f"--junitxml={report}", *marked_files()]
    log = job.work / "gpu-tests.log"
    with log.open("wb") as out:
        try:
            subprocess.run(
                command,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                timeout=max(1.0, job.file.remaining),
                check=False,  # failed tests are counted
            )
        except subprocess.TimeoutExpired:
            job.file.leave_out(NAME, "the time budget ended before the tests did")
            return
    if not report.exists():
        said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        job.file.leave_out(NAME, f"pytest did not run: {said[-1] if said else 'it said nothing'}")
        return
    job.file.facts.update(count(report))
    job.file.left_out.pop(NAME, None)
    job.file.save()


def marked_files() -> list[str]:
    """The test files that have tests for a GPU: to collect all others would take longer."""
    found = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        if MARK in path.read_text(encoding="utf-8"):
            found.append(str(path.relative_to(ROOT)))
    return found


def count(report: Path) -> dict[str, Fact]:
    """Numbers of tests by outcome, names of those that failed, reasons of those that were skipped.

    Args:
        report: what ``pytest --junitxml`` wrote.

    """
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed: list[str] = []
    reasons: dict[str, None] = {}
    skipped = 0
    for case in cases:
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(f"{case.get('classname')}::{case.get('name')}")
        skip = case.find("skipped")
        if skip is not None:
            skipped += 1
            reasons[skip.get("message") or "no reason"] = None
    facts: dict[str, Fact] = {
        "passed": len(cases) - len(failed) - skipped,
        "failed": len(failed),
        "skipped": skipped,
    }
    if failed:
        facts["failed_tests"] = ", ".join(failed)
    if reasons:
        facts["skipped_because"] = "; ".join(reasons)
    return facts

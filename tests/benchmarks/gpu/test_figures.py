"""The data file of a part: what it keeps, what it leaves out, and how it goes on."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from benchmarks.gpu.figures import (
    NO_TIME,
    Figure,
    PartFile,
    check_conditions,
    find_conditions,
    merge,
    read_figures,
    read_part,
)
from hipa_deploy.engines.latency.measure import summarise
from hipa_deploy.engines.latency.validity import judge
from hipa_deploy.errors import HipaError


def a_figure(name: str = "case") -> Figure:
    return Figure(
        name=name,
        model="sd15",
        workload="generate",
        engine="rtx",
        precision="fp16",
        batch=1,
        unit="images/s",
        per_second=100.0,
        stats=summarise([0.01] * 20, None),
        validity=judge([10.0] * 20, readings=None),
    )


def broken() -> Figure:
    raise ZeroDivisionError("a bug")


def test_each_case_is_kept_at_once_and_a_failure_stops_nothing(tmp_path):
    file = PartFile(tmp_path, "rates", time.time() + 60)
    file.plan(["good", "bad", "never"])
    assert read_part(tmp_path, "rates").left_out == dict.fromkeys(["good", "bad", "never"], NO_TIME)

    file.attempt("good", lambda: a_figure("good"), least_seconds=1)
    file.attempt("bad", broken, least_seconds=1)
    file.attempt("never", broken, least_seconds=1000)
    result = read_part(tmp_path, "rates")
    assert [figure.name for figure in result.figures] == ["good"]
    assert result.left_out["bad"].startswith("ZeroDivisionError: a bug (test_figures.py:")
    assert result.left_out["never"] == NO_TIME
    assert not result.complete


def test_a_second_run_measures_only_what_is_missing(tmp_path):
    first = PartFile(tmp_path, "rates", time.time() + 60)
    first.plan(["one", "two"])
    first.attempt("one", lambda: a_figure("one"), least_seconds=1)

    second = PartFile(tmp_path, "rates", time.time() + 60)
    second.plan(["one", "two"])
    second.attempt("one", broken, least_seconds=1)  # it is there, so nothing is called
    second.attempt("two", lambda: a_figure("two"), least_seconds=1)
    result = read_part(tmp_path, "rates")
    assert [figure.name for figure in result.figures] == ["one", "two"]
    assert result.complete
    assert result.left_out == {}


def test_a_bundle_that_was_cut_leaves_its_figures_to_a_longer_run(tmp_path):
    file = PartFile(tmp_path, "backends", time.time() + 60)
    file.leave_out("a", f"{NO_TIME}: it has no bundle")
    assert not read_part(tmp_path, "backends").complete
    file.leave_out("a", "onnx is not installed: it has no bundle")
    assert read_part(tmp_path, "backends").complete


def test_figures_of_other_conditions_are_not_mixed(tmp_path):
    now = find_conditions(None)
    check_conditions(tmp_path, now)
    check_conditions(tmp_path, now)
    other = now.model_copy(update={"versions": {"torch": "1.0"}})
    with pytest.raises(HipaError, match=r"\(versions changed\).*Choose another --out"):
        check_conditions(tmp_path, other)


def test_the_parts_together_are_one_file(tmp_path: Path):
    check_conditions(tmp_path, find_conditions("a note"))
    PartFile(tmp_path, "rates", time.time()).save()
    report = merge(tmp_path, ["rates", "torch"])
    assert list(report.parts) == ["rates"]
    assert report.device_name == report.conditions.device.cpu
    (tmp_path / "all.json").write_text(report.model_dump_json())
    assert read_figures(tmp_path / "all.json") == report


def test_a_damaged_file_says_what_to_do(tmp_path):
    (tmp_path / "rates.json").write_text("{")
    with pytest.raises(HipaError, match=r"rates\.json.*Delete .*rates\.json to measure again"):
        read_part(tmp_path, "rates")

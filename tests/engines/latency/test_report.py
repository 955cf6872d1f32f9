"""The latency report's files: what is read, what is refused, and the published schema."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hipa_deploy.engines.latency.report import LatencyReport, read_report
from hipa_deploy.errors import HipaError


def test_a_report_of_schema_1_still_loads(tmp_path):
    old = json.loads((Path(__file__).parents[1] / "latency-schema-1.json").read_text())
    (tmp_path / "old.json").write_text(json.dumps(old))
    report = read_report(tmp_path / "old.json")
    assert report.schema_version == 1
    assert report.end_to_end.samples_ms == ()
    assert report.conditions.state is None


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"schema_version": 3}', "\x00"])
def test_a_file_that_is_no_report_is_refused(tmp_path, text):
    (tmp_path / "no.json").write_text(text)
    with pytest.raises(HipaError, match=r"no\.json.*a file that hipa-profile --json wrote"):
        read_report(tmp_path / "no.json")


def test_a_missing_report_is_refused(tmp_path):
    with pytest.raises(HipaError, match=r"is missing, .* that hipa-profile"):
        read_report(tmp_path / "no.json")


def test_the_published_schema_is_the_reports():
    """After a change of a record, write ``LatencyReport.model_json_schema()`` into that file again,
    with an indent of two spaces.
    """
    published = json.loads((Path(__file__).parents[3] / "docs/latency.schema.json").read_text())
    assert published == LatencyReport.model_json_schema()

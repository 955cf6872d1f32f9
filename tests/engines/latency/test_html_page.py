"""The HTML page of a latency report."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from hipa_deploy.commands.app import main
from hipa_deploy.engines.latency.html_page import render_page
from hipa_deploy.engines.latency.layer_times import LayerTime
from hipa_deploy.engines.latency.report import LatencyReport
from tests.engines.report_samples import CONDITIONS, a_report

VOID = {"meta"}


class Balanced(HTMLParser):
    """Fails where a tag is closed that is not open.

    An empty element of SVG, '<x/>', arrives as a start and an end.
    """

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def check(page: str) -> None:
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    # The name of the SVG namespace is no address: nothing is loaded from it.
    addresses = set(re.findall(r"https?://[^\"'<> ]+", page))
    assert addresses <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<script|<link|<img|@import|url\(|\bsrc=|\bhref=", page)


def test_the_page_loads_nothing_and_shows_the_whole_report():
    layers = tuple(LayerTime(name=f"node{i}", op="Conv", ms=1.0, percent=5.0) for i in range(20))
    warnings = ("throttled before the runs",)
    page = render_page(a_report(device=True, layers={"unet": layers}, warnings=warnings))
    check(page)
    assert page.count("<svg") == 3
    parts = (
        "Jetson Orin Nano", "sd15 + hipa, 512x512, batch 1, fp16, tensorrt",
        "throttled before the runs", "prompt to image", "the first run, apart",
        "images a second: throughput", "Device time", "MAXN_SUPER", "1020 of 1020 MHz", "5 more",
        "Conv 100 %", "10.3.0.30", "outside the stages",
    )  # fmt: skip
    for part in parts:
        assert part in page


def test_text_from_a_report_never_becomes_markup():
    evil = "<script>alert(1)</script>"
    facts = CONDITIONS.bundle.model_copy(update={"base_model": evil})
    conditions = CONDITIONS.model_copy(update={"bundle": facts, "versions": {evil: evil}})
    stages = {evil: a_report().stages["unet"]}
    page = render_page(a_report(conditions=conditions, warnings=(evil,), stages=stages))
    check(page)
    assert "&lt;script&gt;" in page


def test_a_report_of_schema_1_has_a_page_without_plots():
    old = json.loads((Path(__file__).parents[1] / "latency-schema-1.json").read_text())
    page = render_page(LatencyReport.model_validate(old))
    check(page)
    assert "<svg" not in page
    assert "keeps no samples" in page


def test_the_command_writes_every_requested_file(tmp_path, monkeypatch, capsys):
    """A real run of the embedded bundle."""
    monkeypatch.chdir(tmp_path)
    command = "profile emoji --backend onnxruntime --runs 3 --warmup 0 --layers"
    outputs = "--markdown --roofline orin-nano --json a.json --html a.html"
    with pytest.raises(SystemExit) as stopped:
        main([*command.split(), *outputs.split()])
    assert stopped.value.code == 0

    report = LatencyReport.model_validate_json(Path("a.json").read_text())
    assert report.end_to_end.runs == 3
    assert report.warmup == 0
    assert len(report.layers) == 3
    assert capsys.readouterr().out.startswith("| device | power mode |")
    page = Path("a.html").read_text()
    check(page)
    assert "Prediction: lower bound on Jetson Orin Nano 8 GB, not measured" in page
    assert report.created in page

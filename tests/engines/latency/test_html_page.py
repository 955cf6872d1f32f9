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
    """Raises where a tag is closed that is not open. SVG's own '<x/>' arrives as start and end."""

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
    assert set(re.findall(r"https?://[^\"'<> ]+", page)) <= {
        "http://www.w3.org/2000/svg"
    }  # a name, not an address
    assert not re.search(r"<script|<link|<img|@import|url\(|\bsrc=|\bhref=", page)


def test_it_stands_alone_and_tells_everything():
    layers = tuple(LayerTime(name=f"node{i}", op="Conv", ms=1.0, percent=5.0) for i in range(20))
    page = render_page(
        a_report(device=True, layers={"unet": layers}, warnings=("throttled before the runs",))
    )
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


def test_what_a_report_says_is_text_never_markup():
    evil = "<script>alert(1)</script>"
    facts = CONDITIONS.bundle.model_copy(update={"base_model": evil})
    told = CONDITIONS.model_copy(update={"bundle": facts, "versions": {evil: evil}})
    stages = {evil: a_report().stages["unet"]}
    page = render_page(a_report(conditions=told, warnings=(evil,), stages=stages))
    check(page)
    assert "&lt;script&gt;" in page


def test_a_report_of_schema_1_has_a_page_without_plots():
    old = json.loads((Path(__file__).parents[1] / "latency-schema-1.json").read_text())
    page = render_page(LatencyReport.model_validate(old))
    check(page)
    assert "<svg" not in page
    assert "keeps no samples" in page


def test_the_command_writes_everything_it_is_asked_for(tmp_path, monkeypatch, capsys):
    """The embedded bundle, really run."""
    monkeypatch.chdir(tmp_path)
    arguments = [
        "--runs",
        "3",
        "--warmup",
        "0",
        "--layers",
        "--markdown",
        "--roofline",
        "orin-nano",
    ]
    with pytest.raises(SystemExit) as stopped:
        main(
            [
                "profile",
                "emoji",
                "--backend",
                "onnxruntime",
                "--json",
                "a.json",
                "--html",
                "a.html",
                *arguments,
            ]
        )
    assert stopped.value.code == 0
    report = LatencyReport.model_validate_json(Path("a.json").read_text())
    assert (report.end_to_end.runs, report.warmup, len(report.layers)) == (3, 0, 3)
    assert capsys.readouterr().out.startswith("| device | power mode |")
    page = Path("a.html").read_text()
    check(page)
    assert "Prediction: lower bound on Jetson Orin Nano 8 GB, not measured" in page
    assert report.created in page

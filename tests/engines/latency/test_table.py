"""Latency reports as a table in a terminal and as rows of a Markdown table."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from hipa_deploy.commands.app import main
from hipa_deploy.engines.device.sysfs import Clock
from hipa_deploy.engines.latency.measure import summarise
from hipa_deploy.engines.latency.report import LatencyReport, read_report
from hipa_deploy.engines.latency.table import (
    device_name,
    markdown_table,
    render_table,
    state_facts,
)
from tests.engines.report_samples import CONDITIONS, READING, STATE, a_report


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_row_a_report_with_all_stages_and_numbered_notes():
    fused = {"generator": summarise([0.011] * 10, None)}
    reports = [
        a_report(warnings=("throttled", "not steady")),
        a_report(stages=fused, warnings=("not steady",)),
    ]
    lines = markdown_table(reports).splitlines()
    head = cells(lines[0])
    first = cells(lines[2])
    second = cells(lines[3])
    assert len(head) == len(first) == len(second)
    row = dict(zip(head, first, strict=True))
    assert row["device"] == "NVIDIA Jetson Orin Nano Developer Kit Super"
    assert row["power mode"] == "MAXN_SUPER (mode 2)"
    assert row["GPU clock, MHz"] == "1020 of 1020 (locked)"
    assert row["L4T / JetPack"] == "36.4.3 / 6.2"
    assert row["backend"] == "tensorrt 10.3.0.30"
    assert row["model"] == "sd15 + hipa"
    assert row["decoder"] == "tiny: taesd"
    assert row["size"] == "512x512"
    assert row["vae_decoder p50"] == "2.00"
    assert row["generator p50"] == "-"
    assert row["notes"] == "[1] [2]"
    assert dict(zip(head, second, strict=True))["generator p50"] == "11.00"
    assert second[-1] == "[2]"
    assert lines[-2:] == ["[1] throttled", "[2] not steady"]


def test_a_report_of_schema_1_has_a_row_too():
    path = Path(__file__).parents[1] / "latency-schema-1.json"
    old = json.loads(path.read_text())
    row = markdown_table([LatencyReport.model_validate(old)]).splitlines()[2]
    assert "unknown" in cells(row)


@pytest.mark.parametrize(
    ("backend", "expected"),
    [
        ("openvino", "openvino 2026.4.1"),
        ("openvino-bf16", "openvino-bf16 2026.4.1"),
        ("onnxruntime", "onnxruntime 1.32.0"),
        ("onnxruntime-cuda", "onnxruntime-cuda 1.31.0"),
        ("onnxruntime-tensorrt", "onnxruntime-tensorrt 1.31.0"),
        ("rtx", "rtx"),
        ("another", "another"),
    ],
)
def test_a_backend_has_the_version_of_its_own_package(backend, expected):
    versions = {
        "onnxruntime": "1.32.0",
        "onnxruntime-gpu": "1.31.0+cu12",
        "openvino": "2026.4.1",
    }
    conditions = CONDITIONS.model_copy(update={"backend": backend, "versions": versions})
    head, _, row = markdown_table([a_report(conditions=conditions)]).splitlines()[:3]
    assert cells(row)[cells(head).index("backend")] == expected


def test_a_report_without_the_version_of_openvino_has_no_other():
    conditions = CONDITIONS.model_copy(
        update={"backend": "openvino", "versions": {"onnxruntime": "1.32.0"}}
    )
    assert "| openvino |" in markdown_table([a_report(conditions=conditions)])


def test_a_bar_in_a_name_does_not_break_the_table():
    facts = CONDITIONS.bundle.model_copy(update={"base_model": "a|b"})
    conditions = CONDITIONS.model_copy(update={"bundle": facts})
    text = markdown_table([a_report(conditions=conditions)])
    assert "a\\|b + hipa" in text


def test_on_the_processor_the_gpu_is_not_the_device():
    on_cpu = CONDITIONS.model_copy(update={"backend": "onnxruntime"})
    name = device_name(a_report(conditions=on_cpu))
    assert name == "NVIDIA Jetson Orin Nano Developer Kit Super (CPU)"

    device = on_cpu.device.model_copy(update={"jetson": None})
    desktop = on_cpu.model_copy(update={"device": device})
    assert device_name(a_report(conditions=desktop)) == "ARMv8 Processor"

    gpu = desktop.model_copy(update={"backend": "rtx"})
    assert device_name(a_report(conditions=gpu)) == "Orin"


@pytest.mark.parametrize(
    ("reading", "expected"),
    [
        ({"throttled_by": None}, ("throttling", "unknown")),
        ({"throttled_by": ("power cap",)}, ("throttling", "power cap")),
        ({"throttled_by": ()}, ("throttling", "none")),
        ({"clocks": {}}, ("clocks", "unknown")),
        ({"clocks": {"gpu": Clock(now_mhz=900, max_mhz=None)}}, ("gpu clock", "900 MHz")),
        ({"temperatures_c": {"a": 40.0, "b": 60.4}}, ("hottest", "60 °C (b)")),
        ({"temperatures_c": {}}, ("hottest", "unknown")),
    ],
)
def test_what_is_not_known_is_called_unknown(reading, expected):
    after = READING.model_copy(update=reading)
    state = STATE.model_copy(update={"after": after})
    conditions = CONDITIONS.model_copy(update={"state": state})
    assert expected in state_facts(conditions)


def test_the_command_merges_reports(tmp_path, capsys):
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path in paths:
        path.write_text(a_report().model_dump_json())
    with pytest.raises(SystemExit) as stopped:
        main(["profile", "table", *map(str, paths)])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == markdown_table([a_report(), a_report()])


def test_a_report_of_schema_1_can_be_shown_in_a_terminal():
    path = Path(__file__).parents[1] / "latency-schema-1.json"
    console = Console(file=io.StringIO(), width=170)
    console.print(render_table(read_report(path)))
    assert "end to end" in console.file.getvalue()


def test_with_low_memory_the_caption_says_which_times_contain_the_loading():
    low = a_report(conditions=CONDITIONS.model_copy(update={"low_memory": True}))
    line = "end to end contains the loading of stages, the stages do not"
    assert line in render_table(low).caption
    assert line not in render_table(a_report()).caption

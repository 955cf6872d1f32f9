"""One GPU according to a fake of nvidia-smi."""

from __future__ import annotations

import subprocess

import pytest

from hipa_deploy.engines.device.nvidia_smi import ask_smi, smi_number, smi_text, smi_throttles

ROW = (
    "NVIDIA GeForce RTX 4090, 2520, 3120, 10501, 10501, 54, 310.55, 450.00, P2, Enabled, "
    "0x0000000000000004"
)
OTHER = "NVIDIA T400, 420, 1425, 405, 5001, 40, [N/A], [N/A], P8, Disabled, 0x0000000000000001"


def answer_with(monkeypatch, *rows: str, known: str = "clocks_event_reasons.active") -> list[str]:
    """Fake nvidia-smi; returns the list of queries that it gets.

    Like the real one it fails as a whole for a field that it does not know.
    """
    queries: list[str] = []

    def run(command, **more):
        queries.append(command[1])
        if not command[1].endswith(known):
            raise subprocess.CalledProcessError(2, command)
        return subprocess.CompletedProcess(command, 0, stdout="\n".join(rows) + "\n")

    monkeypatch.setattr(subprocess, "run", run)
    return queries


def test_one_gpu(monkeypatch):
    queries = answer_with(monkeypatch, ROW)
    smi = ask_smi(None)
    assert len(queries) == 1
    assert smi_number(smi, "clocks.sm") == 2520
    assert smi_number(smi, "power.draw") == 310.55
    assert smi_text(smi, "pstate") == "P2"
    assert smi_throttles(smi) == ("power cap",)


def test_an_older_driver_knows_the_reasons_by_another_name(monkeypatch):
    queries = answer_with(monkeypatch, ROW, known="clocks_throttle_reasons.active")
    assert smi_throttles(ask_smi(None)) == ("power cap",)
    assert len(queries) == 2


def test_of_several_gpus_the_one_with_the_name_is_used(monkeypatch):
    answer_with(monkeypatch, ROW, OTHER)
    smi = ask_smi("NVIDIA T400")
    assert smi_throttles(smi) == ()  # idle is no throttling
    assert smi_number(smi, "power.draw") is smi_text(smi, "power.limit") is None
    assert ask_smi("Orin") == ask_smi(None) == {}


@pytest.mark.parametrize(
    ("order", "visible", "asked"),
    [
        ("", "", None),
        ("", "1", None),
        ("PCI_BUS_ID", "", "--id=0"),
        ("PCI_BUS_ID", "3,1", "--id=3"),
        ("", "GPU-8932f937,GPU-1", "--id=GPU-8932f937"),
    ],
)
def test_cudas_first_gpu_is_asked_where_the_environment_tells(monkeypatch, order, visible, asked):
    commands = []

    def run(command, **more):
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, stdout=ROW + "\n")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("CUDA_DEVICE_ORDER", order)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert smi_number(ask_smi(None), "clocks.sm") == 2520
    assert commands[0][3:] == ([asked] if asked else [])


def test_two_gpus_of_one_name_cannot_be_distinguished(monkeypatch):
    answer_with(monkeypatch, OTHER, OTHER)
    assert ask_smi("NVIDIA T400") == {}


def test_gpus_of_one_name_are_told_apart_by_their_address(monkeypatch):
    hot = OTHER.replace(" 40,", " 88,")
    rows = {"00000000:3b:00.0": [OTHER], "00000000:d8:00.0": [hot], None: [OTHER, hot]}

    def run(command, **more):
        chosen = next((part[5:] for part in command if part.startswith("--id=")), None)
        if chosen not in rows:
            raise subprocess.CalledProcessError(6, command)
        return subprocess.CompletedProcess(command, 0, stdout="\n".join(rows[chosen]) + "\n")

    monkeypatch.setattr(subprocess, "run", run)
    smi = ask_smi("NVIDIA T400", "00000000:d8:00.0")
    assert smi_number(smi, "temperature.gpu") == 88
    assert ask_smi("NVIDIA T400") == {}
    # An address that nvidia-smi does not know, as a Jetson's.
    rows[None] = [OTHER]
    smi = ask_smi("NVIDIA T400", "00000000:00:00.0")
    assert smi_number(smi, "temperature.gpu") == 40


@pytest.mark.parametrize("rows", [(), ("No devices were found",)])
def test_an_answer_without_a_gpu_is_empty(monkeypatch, rows):
    answer_with(monkeypatch, *rows)
    smi = ask_smi(None)
    assert smi == {}
    assert smi_number(smi, "clocks.sm") is smi_text(smi, "pstate") is smi_throttles(smi) is None


def test_without_nvidia_smi_the_answer_is_empty(monkeypatch):
    def absent(command, **more):
        raise FileNotFoundError(command[0])

    monkeypatch.setattr(subprocess, "run", absent)
    assert ask_smi(None) == {}

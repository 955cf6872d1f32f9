"""The demo, whole but small: every step is real, on a few images."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.demo import contact_sheet, steps, training_length
from hipa_deploy.demo import training_demo as demo
from hipa_deploy.demo.contact_sheet import (
    HEADING_HEIGHT,
    HEADING_LINE_HEIGHT,
    LINE_HEIGHT,
    MARGIN,
    PROMPT_WIDTH,
)
from hipa_deploy.demo.steps import MARKER
from hipa_deploy.embedded import MODEL
from hipa_deploy.engines.store.sidecar import find_sidecars
from hipa_deploy.errors import HipaError, MissingDependencyError
from hipa_deploy.generate.prompt_files import read_prompt_file
from hipa_deploy.images.png import read_parameters
from hipa_deploy.train.prediction import training_cost


@pytest.mark.slow
def test_demo_writes_what_it_says(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = {"teacher.pairs": 4, "teacher.batch": 4, "steps": 1, "batch": 2}
    monkeypatch.setenv("HIPA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo, "IMAGES", 8)
    monkeypatch.setattr(demo, "TIMED", 1)
    for module in (contact_sheet, demo):
        monkeypatch.setattr(module, "SHEET_ROWS", 4)
    monkeypatch.setattr(steps, "LATENCY_RUNS", 5)
    monkeypatch.setattr(steps, "LATENCY_SECONDS", 0.0)
    monkeypatch.setattr(training_length, "QUICK", training_length.QUICK | short)
    out = tmp_path / "demo"
    demo.run_demo(out, quick=True, console=console)
    text = console.export_text()
    assert "KID-Lite0" in text
    assert "none was run" in text
    check_sheet(out, rows=4)
    bundle = Bundle.open(out / "bundle")
    bundle.verify()
    assert all(find_sidecars(bundle, stage, "rtx") for stage in bundle.stages)
    assert json.loads((out / "latency.json").read_text())["end_to_end"]["p50_ms"] > 0
    quality = json.loads((out / "quality.json").read_text())
    assert quality["images"] == 8
    assert {"base", "shipped", "hipa"} <= set(quality["rows"])
    assert (out / "adaptor/pytorch_lora_weights.safetensors").is_file()


def check_sheet(out: Path, *, rows: int) -> None:
    """A line of note, the table, and the spectra beside it; prompts of the whole file."""
    width = PROMPT_WIDTH + 4 * 258
    top = LINE_HEIGHT + MARGIN + HEADING_HEIGHT + 2 * HEADING_LINE_HEIGHT
    with Image.open(out / "spectra.png") as spectra:
        spectra_HWC = np.asarray(spectra.convert("RGB"))
    sheet_HWC = np.asarray(Image.open(out / "contact_sheet.png"))
    assert sheet_HWC.shape == (top + rows * 258, width + spectra_HWC.shape[1], 3)
    assert sheet_HWC.shape[1] <= 1500
    assert (sheet_HWC[: len(spectra_HWC), width:] == spectra_HWC).all()

    parameters = read_parameters(out / "contact_sheet.png")
    assert parameters is not None
    for heading, count in zip(parameters["columns"], (25, 1, 1, 1), strict=True):
        first, time, _ = heading.split("\n")
        assert re.search(rf"\b{count} steps?$", first)
        assert re.fullmatch(r"\d+ ms, (PyTorch|bundle)", time)
    held_out = read_prompt_file(MODEL / "prompts_pair.txt")
    # A quarter of the sheet's prompts from each quarter of the file.
    quarters = [4 * held_out.index(prompt) // len(held_out) for prompt in parameters["rows"]]
    assert quarters == [0, 1, 2, 3]


@pytest.mark.parametrize(("slowness", "number"), [(0.1, 0), (1.0, 1), (100.0, 2)])
def test_the_training_is_as_long_as_the_pace_allows(
    monkeypatch: pytest.MonkeyPatch, console: Console, slowness: float, number: int
) -> None:
    """Of three lengths: the first that ends in time, and the last on the slowest machine."""
    pace = {"teacher call": slowness, "warm-up step": slowness / 2, "step": slowness}
    monkeypatch.setattr(training_cost, "measure_steps", lambda *arguments: pace)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    recipes = training_length.training_recipes()
    # 512 / 32 batches of 15 calls, 150 and 350 steps; then 384 / 32 of 15, 100 and 200.
    longest, middle = 240 + 75 + 350, 180 + 50 + 200
    assert training_length.longest_within(recipes, longest - 1, console) is recipes[number]
    assert middle < longest - 1


def test_a_gpu_trains_the_longest_demo_and_no_pace_is_measured(
    monkeypatch: pytest.MonkeyPatch, console: Console
) -> None:
    monkeypatch.setattr(training_cost, "measure_steps", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    recipes = training_length.training_recipes()
    assert training_length.longest_within(recipes, 1.0, console) is recipes[0]


def test_the_pace_is_measured_here(console: Console) -> None:
    (recipe,) = training_length.training_recipes(quick=True)
    shorter = recipe.model_copy(update={"steps": 1})
    # No machine trains in a microsecond.
    assert training_length.longest_within([recipe, shorter], 1e-6, console) is shorter


def test_a_folder_of_something_else_is_not_touched(tmp_path: Path, console: Console) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(HipaError, match="not a demo's folder"):
        demo.run_demo(out, quick=True, console=console)
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]


def test_a_demo_with_other_options_is_not_mixed(tmp_path: Path, console: Console) -> None:
    out = tmp_path / "demo"
    out.mkdir()
    (out / MARKER).write_text("{")
    with pytest.raises(HipaError, match="other options"):
        demo.run_demo(out, quick=True, console=console)


def test_missing_extras_come_with_the_command(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hipa_deploy.extras.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="pip install"):
        demo.run_demo(tmp_path / "demo", quick=True, console=console)
    assert not (tmp_path / "demo").exists()


def test_of_each_part_the_sheet_shows_what_changed_most() -> None:
    one_NHWC = np.zeros((6, 2, 2, 3), np.uint8)
    other_NHWC = one_NHWC.copy()
    other_NHWC[1] = 9
    other_NHWC[3] = 200
    other_NHWC[2] = 100
    assert demo._most_changed(one_NHWC, other_NHWC, 3) == [1, 3, 4]
    assert demo._most_changed(one_NHWC, other_NHWC, 2) == [2, 3]

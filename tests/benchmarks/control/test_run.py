from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edges import control_image

from benchmarks.control import run
from tests.emoji.emoji_run import write_run


def squares() -> run.Cases:
    """Two cases: a square at the top left, and one at the bottom right."""
    pictures = np.full((2, 64, 64, 3), 255, np.uint8)
    pictures[0, 8:28, 8:28] = 0
    pictures[1, 36:56, 36:56] = 0
    controls = np.stack([control_image(picture) for picture in pictures])
    return run.Cases(pictures, controls, ["a square", "another square"])


def test_the_pictures_themselves_agree_and_others_do_not() -> None:
    cases = squares()
    numbers = run.measure(cases.pictures, cases)
    assert numbers["F1, 1 px"] == 1
    assert numbers["Sobel correlation"] == pytest.approx(1)
    assert numbers["F1 to another picture, 2 px"] == 0
    assert numbers["edge pixels, share of the control's"] == 1

    exchanged = run.measure(cases.pictures[::-1], cases)
    assert exchanged["F1, 1 px"] == 0
    assert exchanged["F1 to another picture, 1 px"] == 1


def test_the_cases_are_of_held_out_emoji(tmp_path: Path) -> None:
    cases = run.held_out_cases(write_run(tmp_path / "data"), 64)
    assert cases.pictures.shape == cases.controls.shape == (1, 128, 128, 3)
    assert cases.prompts[0].startswith("noto emoji of a left arrow")
    assert cases.edges.any()


def test_a_spread_is_a_standard_deviation() -> None:
    assert run.spread([1.0]) == "1.000"
    assert run.spread([1.0, 3.0]) == "2.000 ± 1.414"


def test_the_report_has_every_row_and_the_sheet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = squares()
    seen = []

    def makers(*arguments: Any) -> dict[str, Callable[[list[int]], np.ndarray]]:
        def make(seeds: list[int]) -> np.ndarray:
            seen.append(seeds)
            return cases.pictures

        return dict.fromkeys([run.REAL, *list(run.SHEET)[1:]], make)

    monkeypatch.setattr(run, "held_out_cases", lambda data, count: cases)
    monkeypatch.setattr(run, "makers", makers)
    run.main(tmp_path, tmp_path, tmp_path / "report", repeats=2)
    stored = json.loads((tmp_path / "report" / "control.json").read_text(encoding="utf-8"))
    counts = {name: len(repeats) for name, repeats in stored["rows"].items()}
    assert counts == {run.REAL: 1, **dict.fromkeys(list(run.SHEET)[1:], 2)}
    assert len({tuple(seeds) for seeds in seen}) == 2
    assert (tmp_path / "report" / "control.png").is_file()
    text = (tmp_path / "report" / "control.md").read_text(encoding="utf-8")
    assert "one step, scale 1 | 1.000 ± 0.000" in text

"""The scripts that no other test runs still start: they import, and their options parse."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import watermark
from hipa_deploy import OneStepPipeline

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize("name", ["serve", "serve_peers", "cluster", "watermark"])
def test_a_script_answers_help(name: str) -> None:
    """As a user runs it: scripts import each other from their own folder."""
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--help"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert f"usage: {name}.py" in ended.stdout


def test_generated_images_fill_the_size_that_is_marked() -> None:
    """The included model decides how many of its images a sheet has."""
    sheet_HWC, single_HWC = watermark.generated(1)
    assert sheet_HWC.shape == single_HWC.shape == (watermark.SIDE, watermark.SIDE, 3)
    with OneStepPipeline.load("emoji") as pipe:
        first_HWC = pipe("3d emoji of a red apple", seed=0).images_BHWC[0]
    side = len(first_HWC)
    # Images of a batch of another size may differ by a rounding.
    difference = sheet_HWC[:side, :side].astype(int) - first_HWC
    assert np.abs(difference).max() <= 2


def test_a_sheet_has_its_images_row_by_row() -> None:
    images_NHWC = np.arange(4, dtype=np.uint8).reshape(4, 1, 1, 1).repeat(3, axis=3)
    sheet_HWC = watermark.sheet(images_NHWC, 2)
    assert sheet_HWC[..., 0].tolist() == [[0, 1], [2, 3]]

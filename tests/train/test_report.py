from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from hipa_deploy.errors import HipaError
from hipa_deploy.train.recipe import TeacherSettings
from hipa_deploy.train.report import draw, held_out_prompts, quality_report, render_table

TEACHER = TeacherSettings(steps=25, guidance=5.0, pairs=1)


def test_draw_goes_through_the_prompts_in_turn() -> None:
    texts, seeds = draw(["a", "b", "c"], 5)
    assert texts == ["a", "b", "c", "a", "b"]
    assert len(set(seeds)) == 5


@pytest.mark.parametrize("count", [0, -1, 3, 10**9])
def test_absurd_counts(count: int) -> None:
    with pytest.raises(HipaError, match="images were asked for"):
        draw(["a"], count)


def test_held_out_prompts_come_from_the_model_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "prompts_pair.txt").write_text("a red apple\n\na pear\n")
    (tmp_path / "mine.txt").write_text("a boat\n")
    assert held_out_prompts(tmp_path) == ["a red apple", "a pear"]
    assert held_out_prompts(tmp_path, tmp_path / "mine.txt") == ["a boat"]


@pytest.mark.parametrize("content", [None, "\n \n"])
def test_no_prompts(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "p.txt").write_text(content)
    with pytest.raises(HipaError, match=r"p\.txt"):
        held_out_prompts(tmp_path, tmp_path / "p.txt")


def test_a_better_set_has_better_numbers(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    truth = generator.integers(0, 255, (8, 1, 1, 3)) + generator.integers(0, 60, (8, 64, 64, 3))
    near, far = truth + generator.integers(0, 4, truth.shape), generator.integers(0, 255, truth.shape)
    images = [np.clip(array, 0, 255).astype(np.uint8) for array in (truth, near, far)]
    report = quality_report(TEACHER, images[0], images[1], {"near": images[1], "far": images[2]})
    assert report.rows["near"].kid_lite0 < report.rows["far"].kid_lite0
    assert report.kid_lite0_floor == report.rows["near"].kid_lite0
    assert report.rows["near"].distance < report.rows["far"].distance
    assert report.rows["near"].high_frequency_ratio == pytest.approx(1, abs=0.2)
    console = Console(record=True, width=160, file=(tmp_path / "out").open("w"))
    console.print(render_table(report))
    assert "other noise" in console.export_text()

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks.tasks import run
from hipa_deploy.errors import HipaError


def test_gap_closed_and_spread() -> None:
    numbers = {
        run.BASE: [{"d": 1.0}, {"d": 2.0}],
        run.ADAPTED: [{"d": 0.4}, {"d": 0.5}],
        "pipeline, 25 steps": [{"d": 0.0}, {"d": 1.0}],
    }
    assert run.gap_closed(numbers, "pipeline, 25 steps") == [0.6, 1.5]
    assert run.spread([1.0, 3.0]) == "2.000 ± 1.000"
    assert run.spread([1.0]) == "1.000"
    assert run.spread([float("inf")]) == "-"


@pytest.fixture
def emoji_dir(model_dir: Path) -> Path:
    """The tiny model, with prompts that edits can be made of."""
    (model_dir / "prompts.txt").write_text("3d emoji of a pear\n3d emoji of a lemon\n")
    (model_dir / "prompts_pair.txt").write_text(
        "flat emoji of a pear\nflat emoji of a lemon\nflat emoji of a boat\n"
    )
    return model_dir


def test_edits_start_from_a_training_prompt_of_the_same_thing(emoji_dir: Path) -> None:
    assert run.edit_pairs(emoji_dir, 64) == [
        ("flat emoji of a pear", "3d emoji of a pear"),
        ("flat emoji of a lemon", "3d emoji of a lemon"),
    ]
    samples = run.make_samples("edit", emoji_dir, None, 0, 4, 64)
    assert samples.prompts == ["flat emoji of a pear", "flat emoji of a lemon"]
    assert samples.sources.shape == samples.truth.shape


def test_real_images_are_found_by_their_captions(emoji_dir: Path, tmp_path: Path) -> None:
    captions = ["flat emoji of a boat", "flat emoji of a lemon", "flat emoji of a pear"]
    (tmp_path / "captions.csv").write_text("caption\n" + "\n".join(captions) + "\n")
    images = np.arange(3, dtype=np.uint8)[:, None, None, None] * np.ones((1, 16, 16, 3), np.uint8)
    np.savez(tmp_path / "emoji.npz", images=images)
    samples = run.make_samples("upscale", emoji_dir, tmp_path, 0, 4, 64)
    assert samples.truth[:, 0, 0, 0].tolist() == [2, 1, 0]
    assert samples.sources.shape == (3, 4, 4, 3)


def test_the_captions_of_an_edit_have_every_style() -> None:
    captions = run.in_all_styles("flat emoji of a fox", ["3d", "flat", "noto"])
    assert captions == ["flat emoji of a fox", "3d emoji of a fox", "noto emoji of a fox"]


def test_unknown_task(tmp_path: Path) -> None:
    with pytest.raises(HipaError, match="task 'draw' is unknown"):
        run.main("draw", tmp_path, tmp_path)


def test_report_of_a_base_model_as_its_own_adaptor(
    emoji_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(run, "TEACHER", run.TEACHER.model_copy(update={"steps": 5}))
    original = run.one_step_task_images

    def without_adaptor(model: Path, adaptor: Path | None, *args: Any, **options: Any) -> Any:
        return original(model, None, *args, **options)

    monkeypatch.setattr(run, "read_metadata", lambda adaptor: SimpleNamespace(timestep=999))
    monkeypatch.setattr(run, "one_step_task_images", without_adaptor)
    run.main("upscale", tmp_path / "none", tmp_path, model=str(emoji_dir), factor=4, repeats=2)
    assert (
        "Of the gap from the base model in one step to many steps, closed: 0.000"
        in capsys.readouterr().out
    )
    stored = json.loads((tmp_path / "upscale.json").read_text())
    assert stored["rows"][run.BASE] == stored["rows"][run.ADAPTED]
    assert (tmp_path / "upscale.png").stat().st_size > 0

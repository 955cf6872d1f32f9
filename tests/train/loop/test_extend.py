"""A finished run goes on to more steps; whatever else lies at its place is left alone."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from hipa_deploy.errors import HipaError
from hipa_deploy.models.adaptor_folder import METADATA, WEIGHTS, read_metadata
from hipa_deploy.train.loop.output import check_output, replacing, run_folder
from hipa_deploy.train.recipes.recipe import Recipe
from hipa_deploy.train.train_adaptor import train_adaptor
from tests.weights import differences, read_weights

NOTHING_LEFT = r"finished after 2 steps, and 2 were asked for\. There is nothing to do.*--steps 4"


def train(
    recipe: Recipe, model_dir: Path, out: Path, cache: Path, **changes: Any
) -> tuple[dict[str, torch.Tensor], str]:
    """The adaptor's weights after training, and what was printed."""
    screen = Console(file=io.StringIO(), width=1000)
    changed = recipe.model_copy(update=changes)
    train_adaptor(changed, model_dir, out, cache=cache, console=screen, device="cpu")
    return read_weights(out / WEIGHTS), screen.file.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where one finished run of two steps lies, for all tests that change nothing."""
    return tmp_path_factory.mktemp("finished") / "adaptor"


@pytest.fixture
def copied(finished: Path, recipe: Recipe, model_dir: Path, cache: Path, tmp_path: Path) -> Path:
    """A copy of a finished run of two steps."""
    if not finished.exists():
        train(recipe, model_dir, finished, cache, steps=2)
    out = tmp_path / "adaptor"
    shutil.copytree(finished, out)
    shutil.copytree(run_folder(finished), run_folder(out))
    return out


def test_an_extended_run_is_the_unbroken_one(
    recipe: Recipe, model_dir: Path, cache: Path, tmp_path: Path, copied: Path
) -> None:
    earlier = read_weights(copied / WEIGHTS)
    with pytest.raises(HipaError, match=NOTHING_LEFT):
        train(recipe, model_dir, copied, cache, steps=2)

    extended, printed = train(recipe, model_dir, copied, cache, steps=4)
    unbroken, _ = train(recipe, model_dir, tmp_path / "unbroken", cache, steps=4)
    assert not differences(extended, unbroken)
    assert differences(extended, earlier)
    assert "the run of 2 steps goes on from step 2 to step 4" in printed
    assert "warning" not in printed

    # What there was is kept, and the hours are those of both sessions.
    kept = run_folder(copied) / "finished" / "step-00000002"
    assert not differences(read_weights(kept / WEIGHTS), earlier)
    metadata = read_metadata(copied)
    assert metadata.steps_trained == 4
    (spent,) = metadata.training
    assert spent.device == "cpu"
    assert spent.steps == 4
    assert spent.hours > read_metadata(kept).training[0].hours > 0


def test_a_schedule_that_depends_on_the_end_says_so(
    recipe: Recipe, model_dir: Path, cache: Path, tmp_path: Path
) -> None:
    cosine = recipe.optimiser.model_copy(update={"decay": "cosine"})
    changed = recipe.model_copy(update={"optimiser": cosine})
    train(changed, model_dir, tmp_path / "adaptor", cache, steps=2)
    _, printed = train(changed, model_dir, tmp_path / "adaptor", cache, steps=4)
    assert re.search(r"the learning rate goes from 0\.005\d* to 0\.005\d* here", printed)
    assert "will differ from one that was trained for 4 steps at once" in printed


def test_what_may_not_change_is_named(recipe: Recipe, copied: Path) -> None:
    loss = recipe.loss.model_copy(update={"hf_weight": 2.0})
    changed = recipe.model_copy(update={"steps": 4, "loss": loss})
    expected = r"loss.hf_weight was 1.0, is 2.0\. A run that goes on may change steps, checkpoint"
    with pytest.raises(HipaError, match=expected):
        check_output(copied, changed)
    assert check_output(copied, recipe.model_copy(update={"steps": 4, "samples": 1})) == 2


def test_a_result_without_its_run_folder_is_left_alone(recipe: Recipe, copied: Path) -> None:
    shutil.rmtree(run_folder(copied))
    with pytest.raises(HipaError, match=r"run folder .*adaptor\.run is gone"):
        check_output(copied, recipe)


def test_a_result_of_another_run_is_left_alone(
    recipe: Recipe, model_dir: Path, cache: Path, copied: Path
) -> None:
    path = copied / METADATA
    metadata = json.loads(path.read_text())
    path.write_text(json.dumps(metadata | {"prompts_sha256": "0" * 64}))
    with pytest.raises(HipaError, match="was started with other prompts"):
        train(recipe, model_dir, copied, cache)
    path.write_text(json.dumps(metadata | {"steps_trained": 3}))
    with pytest.raises(HipaError, match=r"took 3 steps, and the checkpoint .* is of step 2"):
        train(recipe, model_dir, copied, cache)


def test_fewer_steps_than_were_taken(
    recipe: Recipe, model_dir: Path, cache: Path, copied: Path
) -> None:
    shutil.rmtree(copied)
    with pytest.raises(HipaError, match="has taken 2 steps already, and 1 were asked for"):
        train(recipe, model_dir, copied, cache, steps=1)


@pytest.mark.parametrize("name", ["samples/holiday.png", "tensorboard/notes.txt", "photo.png"])
def test_a_foreign_folder_is_told_from_a_run(recipe: Recipe, tmp_path: Path, name: str) -> None:
    file = run_folder(tmp_path / "adaptor") / name
    file.parent.mkdir(parents=True)
    file.touch()
    with pytest.raises(HipaError, match=r"adaptor\.run is needed .* not a training's folder"):
        check_output(tmp_path / "adaptor", recipe)
    assert file.exists()


def fail_at_the_end(out: Path) -> None:
    with replacing(out, 2):
        assert not out.exists()
        raise OSError("full")


def test_a_failure_at_the_end_puts_the_finished_result_back(tmp_path: Path) -> None:
    out = tmp_path / "adaptor"
    out.mkdir()
    (out / "a").touch()
    with pytest.raises(OSError, match="full"):
        fail_at_the_end(out)
    assert (out / "a").exists()
    with replacing(out, 2):
        out.mkdir()
    with replacing(out, 2):  # nothing that was kept is overwritten
        out.mkdir()
    kept = {path.name for path in (tmp_path / "adaptor.run" / "finished").iterdir()}
    assert kept == {"step-00000002", "step-00000002-2"}

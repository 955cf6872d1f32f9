"""Two trainings in one run folder: the second is told which process is there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hipa_deploy.errors import HipaError
from hipa_deploy.train.loop.run_lock import run_folder
from hipa_deploy.train.recipes.recipe import Recipe
from hipa_deploy.train.train_adaptor import train_adaptor

HOLDS = """
import sys, time
from pathlib import Path
from hipa_deploy.disk.locks import locked
with locked(Path(sys.argv[1]) / ".lock", "it"):
    print("held", flush=True)
    time.sleep(120)
"""


def train(recipe: Recipe, model_dir: Path, out: Path) -> None:
    train_adaptor(recipe, model_dir, out, device="cpu")


def test_a_second_training_is_refused_at_once(
    recipe: Recipe, tmp_path: Path, model_dir: Path
) -> None:
    folder = run_folder(tmp_path / "a")
    folder.mkdir()
    command = [sys.executable, "-c", HOLDS, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(HipaError, match=rf"run folder .*a\.run: process {other.pid} .*writing"):
            train(recipe, model_dir, tmp_path / "a")
        other.kill()

    # Its holder died, so the lock is free: the next mistake is met.
    with pytest.raises(HipaError, match="model"):
        train(recipe, tmp_path / "no model", tmp_path / "a")
    assert not folder.exists()


def test_a_folder_of_somebody_else_is_no_run_folder(
    recipe: Recipe, tmp_path: Path, model_dir: Path
) -> None:
    folder = run_folder(tmp_path / "a")
    folder.mkdir()
    (folder / "photo.png").touch()
    with pytest.raises(HipaError, match=r"a\.run is needed for checkpoints"):
        train(recipe, model_dir, tmp_path / "a")
    run_folder(tmp_path / "b").touch()
    with pytest.raises(HipaError, match=r"b\.run is needed for checkpoints"):
        train(recipe, model_dir, tmp_path / "b")


def test_paths_may_be_text(recipe: Recipe, tmp_path: Path, model_dir: Path) -> None:
    recipe = recipe.model_copy(update={"steps": 1})
    paths = (str(model_dir), str(tmp_path / "a"))
    cache = str(tmp_path / "cache")
    out = train_adaptor(recipe, *paths, cache=cache, device="cpu")  # type: ignore[arg-type]
    assert out == tmp_path / "a"
    # The name of an adaptor to start from too.
    again = (str(model_dir), str(tmp_path / "b"))
    train_adaptor(
        recipe,
        *again,
        initial_adaptor=str(out),
        cache=cache,
        device="cpu",  # type: ignore[arg-type]
    )
    assert (tmp_path / "b" / "hipa_adaptor.json").is_file()

"""``hipa-train``: mistakes are refused, and a dry run writes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hipa_deploy.commands.app import main
from hipa_deploy.commands.train import training_gpus
from hipa_deploy.errors import HipaError
from hipa_deploy.train import train_adaptor
from hipa_deploy.train.recipes.recipe import SHIPPED


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--adaptor", "emoji"], "--adaptor is for a decoder"),
        (["--recipe", "emoji-decoder", "--from", "emoji"], "--from is for an adaptor"),
        (["--recipe", "emoji-decoder", "--dry-run"], "--dry-run is for an adaptor"),
        (["--config", "sd15"], "--config is for a checkpoint in one file"),
        (["--prompts", "none.csv"], "none.csv cannot be read"),
    ],
)
def test_a_mistake(arguments: list[str], message: str, refused: Callable[..., str]) -> None:
    assert message in refused("train", "--out", "x", *arguments)


@pytest.mark.parametrize(
    ("problem", "code"), [(None, 0), (HipaError("prompts none.txt cannot be read"), 1)]
)
def test_a_dry_run_prints_writes_nothing_and_fails_with_its_prompts(
    problem: HipaError | None,
    code: int,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from hipa_deploy.train.prediction import dry_run

    def stand_in(
        recipe: object, model_dir: Path, gpus: list, processes: int
    ) -> tuple[list[str], HipaError | None]:
        assert processes == 1
        knows_a100 = "A100 80 GB SXM" in [gpu.title for gpu in gpus]
        return [f"{recipe.steps} steps of {model_dir.name}, {knows_a100}"], problem

    monkeypatch.setattr(dry_run, "dry_run", stand_in)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--out", "x", "--steps", "7", "--dry-run"])
    captured = capsys.readouterr()
    assert stopped.value.code == code
    assert "7 steps of model, True" in captured.out
    assert ("none.txt" in captured.err) == bool(problem)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["emoji", "emoji-decoder"])
def test_a_recipe_that_names_code_is_refused_before_the_code_runs(
    name: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    text = (SHIPPED / f"{name}.toml").read_text(encoding="utf-8")
    assert "[loss]" in text
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(text.replace("[loss]", '[loss]\nbackbone = "os:abort"'))
    message = refused("train", "--out", "x", "--recipe", str(recipe))
    assert "backbone os:abort runs code of the module os" in message
    assert "--allow-code" in message


def test_a_training_is_predicted_for_the_gpus_that_people_train_on() -> None:
    memory = {gpu.title: gpu.memory_gib for gpu in training_gpus()}
    for title, gib in (
        ("GeForce RTX 4090", 24),
        ("A100 40 GB SXM", 40),
        ("A100 80 GB SXM", 80),
        ("H100 80 GB SXM", 80),
    ):
        assert memory[title] == gib
    assert not [title for title in memory if "Jetson" in title]


def test_too_little_memory_of_a_gpu_is_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    def fails(*_: object, **__: object) -> Path:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(train_adaptor, "train_adaptor", fails)
    message = refused("train", "--out", str(tmp_path / "x"))
    assert "not enough memory (CUDA out of memory. Tried to allocate 2.00 GiB). Lower" in message
    assert "micro_batch" in message

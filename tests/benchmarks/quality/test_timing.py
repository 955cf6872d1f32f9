from __future__ import annotations

from pathlib import Path

import pytest
import torch
from timing import StepTime, TimedRun, spent_in, timed_training

from hipa_deploy.errors import HipaError
from hipa_deploy.train import train_adaptor as adaptor_training
from hipa_deploy.train.loop.run import Run
from hipa_deploy.train.recipes.recipe import Recipe, TeacherSettings


def new_run(folder: Path) -> TimedRun:
    weight = torch.nn.Parameter(torch.ones(2))
    recipe = Recipe(prompts="prompts.txt", steps=100, teacher=TeacherSettings(pairs=1))
    identity = {"recipe": recipe.model_dump(mode="json")}
    return TimedRun(folder, {"w": weight}, torch.optim.AdamW([weight]), identity, recipe)


def take(run: TimedRun, steps: int) -> None:
    for _ in range(steps):
        loss = run.weights["w"].square().sum()
        loss.backward()
        run.take_step(loss.item())


def test_time_adds_up_over_sittings_as_far_as_the_checkpoint(tmp_path: Path) -> None:
    run = new_run(tmp_path / "phase-0")
    take(run, 4)
    run.save()
    take(run, 3)  # lost with the process
    again = new_run(tmp_path / "phase-0")
    again.resume()
    assert (again.step, again.timed.steps) == (4, 3)  # the first step has no beginning
    take(again, 3)
    again.save()
    second = new_run(tmp_path / "phase-1")
    take(second, 2)
    second.save()
    total = spent_in(tmp_path)
    assert total.steps == 3 + 2 + 1
    assert total.wall > 0
    assert total.cpu >= 0


def test_no_timed_step_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(HipaError, match="no step was timed"):
        spent_in(tmp_path)
    assert StepTime(1, 2, 3) + StepTime(1, 1, 1) == StepTime(2, 3, 4)


def test_training_is_timed_inside_the_block_only() -> None:
    with timed_training():
        assert adaptor_training.Run is TimedRun
    assert adaptor_training.Run is Run

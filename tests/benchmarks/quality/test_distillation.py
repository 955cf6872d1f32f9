from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from distillation import (
    Student,
    consistent,
    phases,
    train_consistency,
    train_progressive,
    two_steps_in_one,
)
from rich.console import Console
from safetensors.torch import load_file
from timing import spent_in

from hipa_deploy.errors import HipaError
from hipa_deploy.models.adaptor_folder import WEIGHTS, read_metadata
from hipa_deploy.train.loop import training_steps as run_module
from hipa_deploy.train.recipes.recipe import Recipe, TeacherSettings

QUIET = Console(file=io.StringIO())


@pytest.fixture
def student(recipe: Recipe, model_dir: Path, cache: Path) -> Student:
    return Student.prepare(recipe, model_dir, cache, QUIET, "test")


def test_a_consistency_function_is_the_identity_at_zero() -> None:
    x0, z = torch.rand(2, 3, 4, 8, 8)
    values = consistent(x0, z, torch.tensor([0, 20, 999]))
    assert torch.equal(values[0], z[0])
    assert torch.allclose(values[2], x0[2], atol=1e-4)


def test_phases_halve_down_to_one_step_and_share_the_budget() -> None:
    assert [halved for halved, _ in phases(25, 1200)] == [16, 8, 4, 2, 1]
    assert sum(steps for _, steps in phases(25, 1203)) == 1203
    assert phases(2, 7) == [(1, 7)]


def test_one_step_to_the_target_ends_where_two_steps_did(student: Student) -> None:
    z, first_x0, second_x0 = torch.randn(3, 2, 4, 8, 8)
    now = torch.full((2,), 999)
    middle = torch.full((2,), 749)
    then = torch.full((2,), 499)
    second = student.ddim(student.ddim(z, first_x0, now, middle), second_x0, middle, then)
    target = two_steps_in_one(z, second, student.alpha_bar(now), student.alpha_bar(then))
    assert torch.allclose(student.ddim(z, target, now, then), second, atol=1e-4)


def test_a_step_to_no_noise_is_the_prediction(student: Student) -> None:
    z, x0 = torch.randn(2, 2, 4, 8, 8)
    assert torch.allclose(
        student.ddim(z, x0, torch.tensor([999, 30]), torch.tensor([-1, -1])), x0, atol=1e-6
    )


def test_guided_ddim_is_the_teachers_sampler(student: Student) -> None:
    """The steps made of predict and ddim are those of the scheduler that made the pairs."""
    from hipa_deploy.train.data.teacher_pairs import teacher_latents

    noise = student.model.noise([3, 4])
    conditions = student.model.conditions(["a pear", "a boat"])
    teacher = TeacherSettings(steps=2, guidance=3.0, pairs=1)
    expected = teacher_latents(student.model, noise, conditions, student.unguided, teacher)
    z = noise
    with torch.no_grad():
        for now, then in ((999, 499), (499, -1)):
            now_B = torch.full((2,), now)
            then_B = torch.full((2,), then)
            z = student.ddim(z, student.predict(z, now_B, conditions, guidance=3.0), now_B, then_B)
    assert torch.allclose(z, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("train", [train_consistency, train_progressive])
def test_a_baseline_leaves_an_adaptor_and_resumes_exactly(
    train: Any,
    recipe: Recipe,
    model_dir: Path,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unbroken = load_file(
        train(recipe, model_dir, tmp_path / "a", cache=cache, console=QUIET) / WEIGHTS
    )
    assert any(weight.abs().sum() > 0 for name, weight in unbroken.items() if "lora_B" in name)
    metadata = read_metadata(tmp_path / "a", model_dir)
    assert (metadata.rank, metadata.timestep, metadata.steps_trained) == (2, 999, 6)
    assert "distillation" in metadata.recipe["method"]
    assert spent_in(tmp_path / "a.run").steps >= 2

    original = run_module.batch_rows
    calls = []

    def fails_once(*args: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 6:
            raise HipaError("the machine went down")
        return original(*args)

    monkeypatch.setattr(run_module, "batch_rows", fails_once)
    with pytest.raises(HipaError, match="went down"):
        train(recipe, model_dir, tmp_path / "b", cache=cache, console=QUIET)
    assert not (tmp_path / "b").exists()
    resumed = load_file(
        train(recipe, model_dir, tmp_path / "b", cache=cache, console=QUIET) / WEIGHTS
    )
    assert all(torch.equal(resumed[name], unbroken[name]) for name in unbroken)


@pytest.mark.gpu
@pytest.mark.parametrize("train", [train_consistency, train_progressive])
def test_a_baseline_trains_on_a_gpu(
    train: Any, recipe: Recipe, model_dir: Path, cache: Path, tmp_path: Path
) -> None:
    """The pairs and the random numbers are of the CPU, and the model is where the GPU is."""
    out = train(recipe, model_dir, tmp_path / "a", cache=cache, console=QUIET)
    assert read_metadata(out, model_dir).steps_trained == 6

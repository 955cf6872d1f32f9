from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from hipa_deploy.train.loop import run as run_module
from hipa_deploy.train.model.diffusion_model import DiffusionModel
from hipa_deploy.train.recipes.recipe import Recipe
from tests.tiny_model import make_model


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def v_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny-v", "v_prediction", seed=1)


@pytest.fixture
def model(model_dir: Path) -> DiffusionModel:
    """A fresh copy, since adaptors are added in place."""
    return DiffusionModel.load(model_dir, "cpu")


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def recipe() -> Recipe:
    return Recipe.model_validate(
        {
            "prompts": "model:prompts.txt",
            "steps": 4,
            "batch": 2,
            "checkpoint_every": 2,
            "sample_every": 2,
            "samples": 2,
            "adaptor": {"preset": "full", "rank": 2},
            "teacher": {"steps": 3, "pairs": 6, "batch": 4},
            "loss": {"latent_warmup_steps": 1},
            "optimiser": {"learning_rate": 1e-2},
        }
    )


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch):
    """Press Ctrl-C during the given step."""
    original = run_module.batch_rows

    def arm(step: int | None) -> None:
        def rows(count: int, batch: int, seed: int, now: int) -> torch.Tensor:
            if now + 1 == step:
                os.kill(os.getpid(), signal.SIGINT)
            return original(count, batch, seed, now)

        monkeypatch.setattr(run_module, "batch_rows", rows)

    return arm


@pytest.fixture
def random_vgg16() -> Callable[[], nn.Sequential]:
    """Makes torchvision's ``vgg16().features`` (Simonyan & Zisserman 2014, configuration D) with seeded weights."""

    def make() -> nn.Sequential:
        generator = torch.Generator().manual_seed(0)
        layers, inputs = [], 3
        for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0):
            if width:
                layer = nn.Conv2d(inputs, width, 3, padding=1)
                nn.init.kaiming_normal_(layer.weight, generator=generator)
                nn.init.normal_(layer.bias, std=0.1, generator=generator)
                layers += [layer, nn.ReLU(inplace=True)]
            else:
                layers.append(nn.MaxPool2d(2, 2))
            inputs = width or inputs
        return nn.Sequential(*layers)

    return make

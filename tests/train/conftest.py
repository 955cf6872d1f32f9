from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from hipa_deploy.train.loop import training_steps as run_module
from hipa_deploy.train.model import mixed_precision
from hipa_deploy.train.model.diffusion_model import DiffusionModel
from hipa_deploy.train.recipes.recipe import Recipe
from tests.tiny_model import make_model
from tests.tiny_sdxl import make_sdxl

StopAfter = Callable[[int | None], None]

# Widths of VGG16's convolutions (Simonyan & Zisserman 2014, configuration D); 0 is a pooling layer.
VGG16_WIDTHS = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)


@pytest.fixture
def half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half precision even where the CPU emulates it: tiny networks are fast enough."""
    monkeypatch.setattr(mixed_precision, "_cpu_computes_in", lambda precision: True)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion folder that predicts noise."""
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def v_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion folder that predicts v."""
    return make_model(tmp_path_factory.mktemp("model") / "tiny-v", "v_prediction", seed=1)


@pytest.fixture
def model(model_dir: Path) -> DiffusionModel:
    """A fresh copy for each test, since adaptors are added in place."""
    return DiffusionModel.load(model_dir, "cpu")


@pytest.fixture(scope="session")
def sdxl_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SDXL folder, with two text encoders."""
    return make_sdxl(tmp_path_factory.mktemp("sdxl") / "tiny")


@pytest.fixture
def sdxl(sdxl_dir: Path) -> DiffusionModel:
    """A fresh copy for each test, since adaptors are added in place."""
    return DiffusionModel.load(sdxl_dir, "cpu")


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache of teacher pairs for all tests: the same pairs are made once."""
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
def stop_after(monkeypatch: pytest.MonkeyPatch) -> StopAfter:
    """A function that arms a Ctrl-C during the step of that number, or disarms it (None)."""
    original = run_module.batch_rows

    def arm(step: int | None) -> None:
        def rows(count: int, batch: int, seed: int, current: int) -> torch.Tensor:
            if current + 1 == step:
                os.kill(os.getpid(), signal.SIGINT)
            return original(count, batch, seed, current)

        monkeypatch.setattr(run_module, "batch_rows", rows)

    return arm


@pytest.fixture
def random_vgg16() -> Callable[[], nn.Sequential]:
    """A function that makes torchvision's ``vgg16().features`` with seeded weights."""

    def make() -> nn.Sequential:
        generator = torch.Generator().manual_seed(0)
        layers: list[nn.Module] = []
        inputs = 3
        for width in VGG16_WIDTHS:
            if width == 0:
                layers.append(nn.MaxPool2d(2, 2))
                continue
            convolution = nn.Conv2d(inputs, width, 3, padding=1)
            nn.init.kaiming_normal_(convolution.weight, generator=generator)
            nn.init.normal_(convolution.bias, std=0.1, generator=generator)
            layers.append(convolution)
            layers.append(nn.ReLU(inplace=True))
            inputs = width
        return nn.Sequential(*layers)

    return make

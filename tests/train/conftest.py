from __future__ import annotations

from pathlib import Path

import pytest

from hipa_deploy.train.base_model import DiffusionModel
from hipa_deploy.train.recipe import Recipe
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

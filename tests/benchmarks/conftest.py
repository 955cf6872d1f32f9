from __future__ import annotations

from pathlib import Path

import pytest

from hipa_deploy.train.recipes.recipe import Recipe
from tests.tiny_model import make_model


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_model(tmp_path_factory.mktemp("model") / "tiny")
    (folder / "prompts_pair.txt").write_text("a red pear\na green apple\na blue lemon\n")
    (folder / "prompts_concept.txt").write_text("a boat\na train\n")
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def recipe() -> Recipe:
    return Recipe.model_validate(
        {
            "prompts": "model:prompts.txt",
            "steps": 6,
            "batch": 2,
            "checkpoint_every": 3,
            "sample_every": 6,
            "samples": 2,
            "adaptor": {"preset": "paper", "rank": 2},
            "teacher": {"steps": 3, "guidance": 2.0, "pairs": 4, "batch": 4},
            "loss": {"latent_warmup_steps": 2},
            "optimiser": {"learning_rate": 1e-2},
        }
    )

from __future__ import annotations

import pytest

from hipa_deploy.models.configurations import write_config
from hipa_deploy.models.model_config import ModelConfig


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelConfig]:
    folder = tmp_path_factory.mktemp("configs")
    names = ("sd15", "sd21-base", "sd21-v")
    return {name: ModelConfig.read(write_config(name, folder / name)) for name in names}

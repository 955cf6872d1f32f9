from __future__ import annotations

from pathlib import Path

import pytest

from hipa_deploy.errors import HipaError
from hipa_deploy.train.model.diffusion_model import DiffusionModel


def test_shapes_and_schedule_of_the_tiny_model(model: DiffusionModel, v_model_dir: Path) -> None:
    assert model.latent_shape_CHW == (4, 8, 8)
    assert model.resolution == (32, 32)
    assert model.alpha_bar(999) == pytest.approx(0.0046601, rel=1e-4)
    assert DiffusionModel.load(v_model_dir, "cpu").prediction_type == "v_prediction"
    with pytest.raises(HipaError, match="timestep 1000 is out of range"):
        model.alpha_bar(1000)

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.export.export_bundle import export_bundle
from hipa_deploy.export.export_options import ExportOptions
from hipa_deploy.models.adaptor_folder import AdaptorMetadata, unet_sha256
from hipa_deploy.train.model.unet_adaptor import (
    PRESETS,
    adaptor_parameters,
    add_adaptor,
    save_adaptor,
)
from tests.tiny_model import make_model

SD_SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


def make_adaptor(
    model_dir: Path,
    out: Path,
    *,
    preset: str = "full",
    rank: int = 4,
    alpha: float = 8.0,
    **task: Any,
) -> Path:
    """An adaptor whose B matrices are not zero: merging it changes the UNet. ``task``: what its metadata says of it."""
    unet = UNet2DConditionModel.from_pretrained(model_dir, subfolder="unet")
    add_adaptor(unet, targets=PRESETS[preset], rank=rank, alpha=alpha, seed=0)
    for index, weight in enumerate(adaptor_parameters(unet).values()):
        values = np.random.default_rng(index).normal(scale=0.05, size=weight.shape)
        weight.data.copy_(weight.new_tensor(values))
    metadata = AdaptorMetadata(
        base_unet_sha256=unet_sha256(model_dir),
        prompts_sha256="0" * 64,
        rank=rank,
        alpha=alpha,
        targets=PRESETS[preset],
        timestep=task.pop("timestep", 999),
        prediction_type="epsilon",
        alpha_bar=0.0046601,
        resolution=(32, 32),
        steps_trained=1,
        recipe={},
        **task,
    )
    return save_adaptor(unet, metadata, SD_SCHEDULE, out)


@pytest.fixture(scope="session")
def adaptor_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_adaptor(model_dir, tmp_path_factory.mktemp("adaptor") / "adaptor")
    assert load_file(folder / "pytorch_lora_weights.safetensors")
    return folder


@pytest.fixture(scope="session")
def fp32_bundle(
    model_dir: Path, adaptor_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    out = tmp_path_factory.mktemp("bundle") / "fp32"
    return export_bundle(
        ExportOptions(model=str(model_dir), adaptor=adaptor_dir, out=out, dtype="fp32", batch=2)
    )

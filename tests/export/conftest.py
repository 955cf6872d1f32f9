from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from rich.console import Console
from safetensors.torch import load_file

from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.export.export_bundle import export_bundle
from hipa_deploy.export.export_options import ExportOptions
from hipa_deploy.models.adaptor_folder import AdaptorMetadata, unet_sha256
from hipa_deploy.models.model_config import ModelConfig
from hipa_deploy.train.model.encoder_adaptor import add_encoder_adaptor, save_encoder_adaptor
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
    """An adaptor whose B matrices are not zero, so that merging it changes the UNet.

    ``task``: further fields of its metadata.
    """
    unet = UNet2DConditionModel.from_pretrained(model_dir, subfolder="unet")
    add_adaptor(unet, targets=PRESETS[preset], rank=rank, alpha=alpha, seed=0)
    for index, weight in enumerate(adaptor_parameters(unet).values()):
        values = np.random.default_rng(index).normal(scale=0.05, size=weight.shape)
        weight.data.copy_(weight.new_tensor(values))
    config = ModelConfig.read(model_dir, task.get("task", "generate"))
    timestep = task.pop("timestep", 999)
    metadata = AdaptorMetadata(
        base_unet_sha256=unet_sha256(model_dir),
        prompts_sha256="0" * 64,
        rank=rank,
        alpha=alpha,
        targets=PRESETS[preset],
        timestep=timestep,
        prediction_type=config.prediction_type,
        alpha_bar=config.alpha_bar(timestep),
        resolution=task.pop("resolution", (32, 32)),
        steps_trained=1,
        recipe=task.pop("recipe", {}),
        **task,
    )
    return save_adaptor(unet, metadata, SD_SCHEDULE, out)


@pytest.fixture(scope="session")
def adaptor_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_adaptor(model_dir, tmp_path_factory.mktemp("adaptor") / "adaptor")
    assert load_file(folder / "pytorch_lora_weights.safetensors")
    return folder


@pytest.fixture(scope="session")
def fp32_export(
    model_dir: Path, adaptor_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Bundle, list[str]]:
    """A bundle, and the lines that its export printed."""
    # Two images per call: a batch that is not one shows where a shape is taken for granted.
    out = tmp_path_factory.mktemp("bundle") / "fp32"
    said = StringIO()
    bundle = export_bundle(
        ExportOptions(model=str(model_dir), adaptor=adaptor_dir, out=out, dtype="fp32", batch=2),
        Console(file=said, width=60),
    )
    return bundle, said.getvalue().splitlines()


@pytest.fixture(scope="session")
def fp32_bundle(fp32_export: tuple[Bundle, list[str]]) -> Bundle:
    return fp32_export[0]


@pytest.fixture(scope="session")
def tiny_vae_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TAESD's architecture, four times reducing, in a few thousand seeded parameters."""
    torch.manual_seed(0)
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8), num_encoder_blocks=(1, 1, 1),
        decoder_block_out_channels=(8, 8, 8), num_decoder_blocks=(1, 1, 1),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("vae") / "tiny"
    tiny.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def encoder_adaptor_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For super-resolution, with B matrices of the encoder that are not zero."""
    folder = make_adaptor(
        model_dir, tmp_path_factory.mktemp("both") / "adaptor", task="upscale", timestep=249
    )
    vae = AutoencoderKL.from_pretrained(model_dir, subfolder="vae").eval().requires_grad_(False)
    add_encoder_adaptor(vae, 2, seed=0)
    with torch.no_grad():
        for index, weight in enumerate(adaptor_parameters(vae).values()):
            weight.normal_(std=0.1, generator=torch.Generator().manual_seed(index))
    save_encoder_adaptor(vae, folder)
    return folder

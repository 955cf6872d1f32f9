"""What the configuration files of a model say without diffusers: enough to check a request early.

``ModelConfig.read`` takes the defaults of the libraries' classes, which need torch. Here the few
that a request is checked against are written down, and a test compares them with the libraries'.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hipa_deploy.models.kind import SECOND, check_pipeline, has_second_encoder
from hipa_deploy.models.model_config import ModelConfig
from hipa_deploy.models.weights.part_config import checked_values, read_config

# The defaults of UNet2DConditionModel, AutoencoderKL, CLIPTextConfig and DDIMScheduler.
UNET: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 1280,
}
VAE: dict[str, Any] = {
    "latent_channels": 4,
    "block_out_channels": (64,),
    "scaling_factor": 0.18215,
}
TEXT: dict[str, Any] = {
    "hidden_size": 512,
    "num_hidden_layers": 12,
    "max_position_embeddings": 77,
    "vocab_size": 49408,
    "projection_dim": 512,
}
SCHEDULER: dict[str, Any] = {"num_train_timesteps": 1000, "prediction_type": "epsilon"}


@dataclass(frozen=True)
class EarlyConfig(ModelConfig):
    """A ``ModelConfig`` whose noise schedule is not computed: only its length is known."""

    @property
    def alphas_cumprod(self) -> Any:  # type: ignore[override]
        """A number above 0 for each timestep, in place of the schedule's."""
        return np.full(self.scheduler["num_train_timesteps"], 0.5)


def early_config(folder: Path) -> EarlyConfig:
    """Read the configuration files of a diffusers folder, without torch.

    Raises:
        HipaError: no such files, a pipeline of another kind, or a value that is no positive number
            where one is needed.

    """
    index = read_config(folder, "model_index.json")
    check_pipeline(folder, index)
    second = None
    if has_second_encoder(index):
        second = _values(folder, f"{SECOND}/config.json", TEXT)
    config = EarlyConfig(
        folder=folder,
        unet=_values(folder, "unet/config.json", UNET),
        vae=_values(folder, "vae/config.json", VAE),
        text_encoder=_values(folder, "text_encoder/config.json", TEXT),
        scheduler=_values(folder, "scheduler/scheduler_config.json", SCHEDULER),
        text_encoder_2=second,
    )
    config._check_numbers()
    config._check_prediction()
    return config


def _values(folder: Path, name: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    content = read_config(folder, name)
    # Keys without a default here are checked when the class is imported, which knows them.
    return {**content, **defaults, **checked_values(defaults, content, folder / name)}

"""The frozen base model: a Stable Diffusion folder, loaded in float32, and the few things training asks of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from torch import Tensor

from hipa_deploy.errors import HipaError, first_line
from hipa_deploy.generate.noise import initial_noise
from hipa_deploy.models.model_config import ModelConfig
from hipa_deploy.tasks import Task, is_inpainting_unet


@dataclass(frozen=True)
class DiffusionModel:
    """Tokenizer, text encoder, UNet, VAE and noise schedule of one StableDiffusionPipeline folder."""

    folder: Path
    pipe: Any
    device: torch.device

    @classmethod
    def load(
        cls, folder: Path, device: str | torch.device | None = None, task: Task = "generate"
    ) -> DiffusionModel:
        """Load in float32 whatever the stored precision, frozen; ``device`` defaults to the GPU if there is one.

        A UNet that was made for inpainting is for that ``task`` alone.

        Raises:
            HipaError: not a Stable Diffusion folder, a model that one step cannot drive, or weights not finite.

        """
        ModelConfig.read(folder, task)
        diffusers_logging.disable_progress_bar()
        parts = {
            "safety_checker": None,
            "feature_extractor": None,
            "requires_safety_checker": False,
        }
        try:
            pipe = StableDiffusionPipeline.from_pretrained(
                folder, torch_dtype=torch.float32, **parts
            )
        except (
            Exception
        ) as error:  # each library raises its own kinds for a folder with missing or broken parts
            raise HipaError(f"model {folder} cannot be loaded: {first_line(error)}") from None
        _check_finite(folder, pipe)
        pipe.set_progress_bar_config(disable=True)
        for module in (pipe.text_encoder, pipe.unet, pipe.vae):
            module.eval().requires_grad_(False)
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return cls(folder, pipe.to(device), device)

    @property
    def unet(self) -> Any:
        """UNet2DConditionModel; adaptors are added to it in place."""
        return self.pipe.unet

    @property
    def vae(self) -> Any:
        """AutoencoderKL or AutoencoderTiny."""
        return self.pipe.vae

    @cached_property
    def config(self) -> ModelConfig:
        """What the model's configuration files say."""
        return ModelConfig.read(self.folder)

    @property
    def latent_shape_CHW(self) -> tuple[int, int, int]:
        """Latent shape at the model's native resolution."""
        return self.config.native_latents

    @property
    def resolution(self) -> tuple[int, int]:
        """Native image height and width in pixels."""
        return self.config.native_size

    @property
    def schedule(self) -> dict[str, Any]:
        """The noise schedule as scheduler keywords, without any sampler's own settings."""
        return self.config.schedule

    @property
    def prediction_type(self) -> str:
        """What the UNet predicts: epsilon, v_prediction or sample."""
        return self.config.prediction_type

    @property
    def alphas_cumprod(self) -> Tensor:
        """``alpha_bar`` of every timestep, float32 [T], on the model's device."""
        return self.config.alphas_cumprod.to(self.device)

    def alpha_bar(self, timestep: int) -> float:
        """Cumulative signal power at ``timestep``; see ``ModelConfig.alpha_bar``."""
        return self.config.alpha_bar(timestep)

    def noise(self, seeds: Sequence[int]) -> Tensor:
        """Standard normal float32 [B, C, H, W], the same as every backend starts from."""
        return torch.from_numpy(initial_noise(list(seeds), self.latent_shape_CHW)).to(self.device)

    @torch.no_grad()
    def context(self, prompts: Sequence[str]) -> Tensor:
        """Text context float32 [B, L, D]; words beyond the encoder's length are cut."""
        tokenizer, encoder = self.pipe.tokenizer, self.pipe.text_encoder
        length = tokenizer.model_max_length
        tokens = tokenizer(
            list(prompts),
            padding="max_length",
            max_length=length,
            truncation=True,
            return_tensors="pt",
        )
        mask = (
            tokens.attention_mask.to(self.device)
            if getattr(encoder.config, "use_attention_mask", None)
            else None
        )
        return encoder(tokens.input_ids.to(self.device), attention_mask=mask)[0]

    def encode(self, image_BCHW: Tensor) -> Tensor:
        """Image [B, 3, H, W] in [0, 1] -> scaled latents float32 [B, C, h, w], the mean of the VAE's posterior.

        Differentiable, as the encoder may have an adaptor.
        """
        posterior = self.vae.encode(image_BCHW.to(self.device) * 2 - 1).latent_dist
        return posterior.mean.float() * self.vae.config.scaling_factor

    @property
    def concatenates(self) -> bool:
        """Whether the UNet was made for inpainting: noise, mask and source are channels beside each other."""
        return is_inpainting_unet(self.unet.config.in_channels, self.vae.config.latent_channels)

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Scaled latents -> float32 image [B, 3, H, W], [0, 1] where valid, not clamped: differentiable everywhere."""
        return (
            self.vae.decode(latents_BCHW / self.vae.config.scaling_factor, return_dict=False)[
                0
            ].float()
            / 2
            + 0.5
        )


def to_uint8(image01_BCHW: Tensor) -> Tensor:
    """Clamp, round and move channels last: uint8 [B, H, W, 3] on the CPU."""
    return (image01_BCHW.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()


def to_float(image_BHWC: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in [0, 1]."""
    return image_BHWC.permute(0, 3, 1, 2).float() / 255


def _check_finite(folder: Path, pipe: Any) -> None:
    for part in ("text_encoder", "unet", "vae"):
        for name, weight in getattr(pipe, part).named_parameters():
            if not torch.isfinite(weight).all():
                raise HipaError(
                    f"model {folder}: {part} weight {name} is not finite. The file is damaged."
                )

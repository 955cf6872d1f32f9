"""The frozen base model: a Stable Diffusion folder in float32, and what training needs of it.

Shape suffixes: B batch, T timesteps of the noise schedule, L tokens, D width of the text context,
C channels, H W height and width; h w where the size of latents stands beside that of images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from torch import Tensor

from hipa_deploy.errors import HipaError, first_line
from hipa_deploy.generate.noise import initial_noise
from hipa_deploy.models.clip_tokenizer import load_tokenizer
from hipa_deploy.models.lora.open_style import OpenStyle
from hipa_deploy.models.model_config import ModelConfig
from hipa_deploy.models.style import Style, StyleInfo
from hipa_deploy.tasks import Task, is_inpainting_unet


@dataclass(frozen=True)
class DiffusionModel:
    """Tokenizer, text encoder, UNet, VAE and noise schedule of one StableDiffusionPipeline folder.

    Args:
        folder: Where it was loaded from.
        pipe: The StableDiffusionPipeline that holds its parts.
        device: Where its parts are.
        style: The LoRAs and embeddings that were added to it.

    Example:
        >>> model = DiffusionModel.load(Path("stable-diffusion-v1-5"), "cuda")
        >>> model.latent_shape_CHW, model.resolution
        ((4, 64, 64), (512, 512))
        >>> model.context(["a cat", "a dog"]).shape
        torch.Size([2, 77, 768])

    """

    folder: Path
    pipe: Any
    device: torch.device
    style: StyleInfo = field(default_factory=StyleInfo)

    @classmethod
    def load(
        cls,
        folder: Path,
        device: str | torch.device | None = None,
        task: Task = "generate",
        style: Style | None = None,
    ) -> DiffusionModel:
        """Load in float32, whatever the stored precision, and freeze all weights.

        Args:
            folder: A Stable Diffusion folder, in the format of diffusers.
            device: Default: the GPU, or the CPU without one.
            task: The task to train. A UNet that was made for inpainting can learn that task alone.
            style: LoRAs to merge into it and embeddings to add, before anything else.

        Raises:
            HipaError: it is not a Stable Diffusion folder, its kind of model cannot be trained to
                one step, its tokenizer cannot be read, its weights are not finite, or the style
                does not fit it.

        """
        # Before loading gigabytes: its configuration says whether the model can be trained at all.
        config = ModelConfig.read(folder, task)
        tokenizer = load_tokenizer(config)
        added = OpenStyle.read(style or Style(), config)
        diffusers_logging.disable_progress_bar()
        try:
            pipe = StableDiffusionPipeline.from_pretrained(
                folder,
                torch_dtype=torch.float32,
                tokenizer=None,
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )
        except Exception as error:  # a broken folder: each library raises classes of its own
            raise HipaError(f"model {folder} cannot be loaded: {first_line(error)}") from None

        # Not the one that diffusers would load: the bundle's, so that both see the same ids.
        pipe.register_modules(tokenizer=tokenizer)

        # A damaged file would otherwise show as a loss of NaN, hours later.
        _check_finite(folder, pipe)
        added.merge({"unet": pipe.unet, "text_encoder": pipe.text_encoder})
        added.add_words(pipe.tokenizer, pipe.text_encoder)

        pipe.set_progress_bar_config(disable=True)
        for module in (pipe.text_encoder, pipe.unet, pipe.vae):
            module.eval().requires_grad_(False)
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return cls(folder, pipe.to(device), device, added.info)

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
        """Standard normal noise, float32 [B, C, H, W], one seed a row.

        The runtime makes the same noise of the same seeds, on every backend.
        """
        return torch.from_numpy(initial_noise(list(seeds), self.latent_shape_CHW)).to(self.device)

    @torch.no_grad()
    def context(self, prompts: Sequence[str]) -> Tensor:
        """Text context, float32 [B, L, D]; words beyond the encoder's length are cut."""
        tokenizer = self.pipe.tokenizer
        tokens = tokenizer(
            list(prompts),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )

        # As StableDiffusionPipeline does: Stable Diffusion was trained with the padding visible,
        # and the configuration of a text encoder says so if it was trained otherwise.
        encoder = self.pipe.text_encoder
        mask = None
        if getattr(encoder.config, "use_attention_mask", None):
            mask = tokens.attention_mask.to(self.device)
        return encoder(tokens.input_ids.to(self.device), attention_mask=mask)[0]

    def encode(self, image_BCHW: Tensor) -> Tensor:
        """Image [B, 3, H, W] in [0, 1] -> scaled latents, float32 [B, C, h, w].

        They are the mean of the VAE's posterior. Differentiable, as the encoder may have an
        adaptor.
        """
        posterior = self.vae.encode(image_BCHW.to(self.device) * 2 - 1).latent_dist
        return posterior.mean.float() * self.vae.config.scaling_factor

    @property
    def concatenates(self) -> bool:
        """Whether the UNet was made for inpainting: noise, mask and source are its channels."""
        return is_inpainting_unet(self.unet.config.in_channels, self.vae.config.latent_channels)

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Scaled latents [B, C, h, w] -> image, float32 [B, 3, H, W], in [0, 1] but for overshoot.

        It is not clamped: a clamped pixel would have no gradient.
        """
        unscaled_BCHW = latents_BCHW / self.vae.config.scaling_factor
        image_BCHW = self.vae.decode(unscaled_BCHW, return_dict=False)[0]
        return image_BCHW.float() / 2 + 0.5


def to_uint8(image01_BCHW: Tensor) -> Tensor:
    """Float image [B, 3, H, W], clamped to [0, 1] -> uint8 [B, H, W, 3] on the CPU."""
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

"""The frozen base model: a Stable Diffusion folder in float32, and what training needs of it.

SDXL, SSD-1B and Segmind-Vega have two text encoders and added conditions. Sizes and crop are those
that StableDiffusionXLPipeline takes by default: original and target size are those of the
images, and nothing is cropped.

Shape suffixes: B batch, T timesteps of the noise schedule, L tokens, D width of the text context, P
width of the pooled vector, C channels, H W height and width; h w where the size of latents stands
beside that of images.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import logging as diffusers_logging
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from hipa_deploy.bundle.text_settings import TextSettings
from hipa_deploy.generate.noise import initial_noise
from hipa_deploy.generate.prompt_weights import weigh_context
from hipa_deploy.generate.tokenizer import PromptTokenizer
from hipa_deploy.models.clip_tokenizer import load_tokenizer, prompt_tokenizer
from hipa_deploy.models.kind import SECOND
from hipa_deploy.models.lora.open_style import OpenStyle
from hipa_deploy.models.model_config import ModelConfig
from hipa_deploy.models.style import Style, StyleInfo
from hipa_deploy.models.text_context import text_context
from hipa_deploy.models.text_pair import forces_zeros, pair_context
from hipa_deploy.models.weights.load_part import check_weights, load_part
from hipa_deploy.models.weights.weight_identity import weights_identity
from hipa_deploy.tasks import Task, is_inpainting_unet, size_numbers
from hipa_deploy.train.model.conditions import Conditions


@dataclass(frozen=True)
class DiffusionModel:
    """Tokenizers, text encoders, UNet, VAE and noise schedule of one Stable Diffusion folder.

    Args:
        folder: Where it was loaded from.
        pipe: The StableDiffusionPipeline, or StableDiffusionXLPipeline, that holds its parts.
        device: Where its parts are.
        style: The LoRAs and embeddings that were added to it.
        text: How prompts are encoded.
        size: Height and width of its images in pixels; None is what it was made for.

    Example:
        >>> model = DiffusionModel.load(Path("stable-diffusion-v1-5"), "cuda")
        >>> model.latent_shape_CHW, model.resolution
        ((4, 64, 64), (512, 512))
        >>> model.conditions(["a cat", "a dog"]).context_BLD.shape
        torch.Size([2, 77, 768])

    """

    folder: Path
    pipe: Any
    device: torch.device
    style: StyleInfo = field(default_factory=StyleInfo)
    text: TextSettings = field(default_factory=TextSettings)
    size: tuple[int, int] | None = None

    @classmethod
    def load(
        cls,
        folder: Path,
        device: str | torch.device | None = None,
        task: Task = "generate",
        style: Style | None = None,
        text: TextSettings | None = None,
        size: tuple[int, int] | None = None,
    ) -> DiffusionModel:
        """Load in float32, whatever the stored precision, and freeze all weights.

        Args:
            folder: A Stable Diffusion folder, in the format of diffusers.
            device: Default: the GPU, or the CPU without one.
            task: The task to train. A UNet that was made for inpainting can learn that task alone.
            style: LoRAs to merge into it and embeddings to add, before anything else.
            text: How prompts are encoded; None is as the text encoder reads them at once.
            size: Height and width of its images in pixels; None is what it was made for.

        Raises:
            HipaError: it is not a Stable Diffusion folder, its kind of model cannot be trained to
                one step, its tokenizer cannot be read, its weights are not finite, or the style
                or the size does not fit it.

        """
        # Before loading gigabytes: its configuration says whether the model can be trained at all.
        config = ModelConfig.read(folder, task)
        if size is not None:
            config.latents_of(size)
        text = text or TextSettings()
        tokenizers = {}
        for part in config.text_parts:
            name = tokenizer_of(part)
            tokenizers[name] = load_tokenizer(config, name)
            text.check(tokenizers[name].model_max_length, config.text_layers)
        added = OpenStyle.read(style or Style(), config)
        check_weights(folder, config.text_parts)
        diffusers_logging.disable_progress_bar()
        parts: dict[str, Any] = {
            "vae": load_part(AutoencoderKL, folder / "vae"),
            "text_encoder": load_part(CLIPTextModel, folder / "text_encoder"),
            "unet": load_part(UNet2DConditionModel, folder / "unet"),
        }
        if config.has_text_pair:
            parts[SECOND] = load_part(CLIPTextModelWithProjection, folder / SECOND)
        pipe = pipeline(config, parts, tokenizers)
        added.merge({part: parts[part] for part in ("unet", *config.text_parts)})
        added.add_words(pipe.tokenizer, pipe.text_encoder)
        if config.has_text_pair:
            added.add_words(pipe.tokenizer_2, pipe.text_encoder_2, SECOND)
        for module in parts.values():
            module.eval().requires_grad_(False)

        pipe.set_progress_bar_config(disable=True)
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return cls(folder, pipe.to(device), device, added.info, text, size)

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

    @cached_property
    def tokenizer(self) -> PromptTokenizer:
        """The tokenizer as a bundle has it; of two, the first. Both count the same tokens."""
        return prompt_tokenizer(self.pipe.tokenizer, self.text.context_tokens)

    @cached_property
    def tokenizers(self) -> list[PromptTokenizer]:
        """The tokenizer of each text encoder, in their order."""
        found = [self.tokenizer]
        if self.config.has_text_pair:
            found.append(prompt_tokenizer(self.pipe.tokenizer_2, self.text.context_tokens))
        return found

    @property
    def text_modules(self) -> dict[str, Any]:
        """The text encoders by the names of their folders."""
        return {part: getattr(self.pipe, part) for part in self.config.text_parts}

    def identity(self) -> dict[str, Any]:
        """What a training depends on beside UNet and VAE, as JSON values."""
        digest = hashlib.sha256()
        for part in self.config.text_parts:
            digest.update(weights_identity(self.folder / part).encode())
        schedule = json.loads(json.dumps(self.schedule))
        return {"schedule": schedule, "text_encoders_sha256": digest.hexdigest()}

    @property
    def latent_shape_CHW(self) -> tuple[int, int, int]:
        """Latent shape of its images."""
        return self.config.latents_of(self.size)

    @property
    def resolution(self) -> tuple[int, int]:
        """Height and width of its images in pixels."""
        return self.size or self.config.native_size

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

    def context(self, prompts: Sequence[str]) -> Tensor:
        """Text context, float32 [B, L, D]; words beyond the context's length are cut."""
        return self.conditions(prompts).context_BLD

    @torch.no_grad()
    def conditions(self, prompts: Sequence[str]) -> Conditions:
        """What the UNet is told of B prompts; words beyond the context's length are cut."""
        tokens = []
        weights = []
        for tokenizer in self.tokenizers:
            if self.text.prompt_weights:
                ids, weight = tokenizer.weighted(prompts, truncate=True)
                weights.append(torch.from_numpy(weight).to(self.device))
            else:
                ids = tokenizer(prompts, truncate=True)
            tokens.append(torch.from_numpy(ids).to(self.device))

        encoder = self.pipe.text_encoder
        chunk = self.tokenizer.chunk
        skip = self.text.clip_skip
        pooled_BP = None
        sizes_B6 = None
        if self.config.has_text_pair:
            context_BLD, pooled_BP = pair_context(
                encoder, self.pipe.text_encoder_2, tokens[0], tokens[1], chunk, skip
            )
            sizes_B6 = self._sizes().expand(len(context_BLD), -1)
        else:
            context_BLD = text_context(encoder, tokens[0], chunk, skip)
        if weights:
            # Each encoder's part is weighed by itself; the pooled vector has no tokens to weigh.
            parts = context_BLD.split(self.config.text_widths, dim=-1)
            weighed = [weigh_context(*pair, chunk) for pair in zip(parts, weights, strict=True)]
            context_BLD = torch.cat(weighed, dim=-1)
        return Conditions(context_BLD, pooled_BP, sizes_B6)

    def unguided(self) -> Conditions:
        """One row of what classifier-free guidance leads away from: the empty prompt.

        SDXL was trained with zeros in its place where its folder says so
        (``force_zeros_for_empty_prompt``, which StableDiffusionXLPipeline obeys in
        ``encode_prompt`` when no negative prompt is given). An empty prompt that a user types is
        encoded all the same.
        """
        empty = self.conditions([""])
        zeros = self.config.has_text_pair and self.pipe.config.force_zeros_for_empty_prompt
        return empty.zeroed() if zeros else empty

    def _sizes(self) -> Tensor:
        numbers = size_numbers(*self.resolution)
        return torch.tensor([numbers], dtype=torch.float32, device=self.device)

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


def pipeline(config: ModelConfig, parts: dict[str, Any], tokenizers: dict[str, Any]) -> Any:
    """The pipeline that holds the parts of a model.

    Args:
        config: Of the model.
        parts: unet, vae and text encoders, by the names of their folders.
        tokenizers: The bundle's, so that both see the same ids, by the names of their folders;
            None where no prompt will be read.

    Raises:
        HipaError: ``force_zeros_for_empty_prompt`` in model_index.json is no truth value.

    """
    # Sampling has a scheduler of its own: this one holds the place in the pipeline. Diffusers warns
    # of settings that Stable Diffusion does not have.
    scheduler = DDIMScheduler(**config.schedule, steps_offset=1, clip_sample=False)
    if config.has_text_pair:
        return StableDiffusionXLPipeline(
            **parts,
            **tokenizers,
            scheduler=scheduler,
            force_zeros_for_empty_prompt=forces_zeros(config.folder),
            add_watermarker=False,
        )
    return StableDiffusionPipeline(
        **parts,
        **tokenizers,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def tokenizer_of(text_encoder: str) -> str:
    """The folder of a text encoder's tokenizer: text_encoder_2 -> tokenizer_2."""
    return text_encoder.replace("text_encoder", "tokenizer")


def to_uint8(image01_BCHW: Tensor) -> Tensor:
    """Float image [B, 3, H, W], clamped to [0, 1] -> uint8 [B, H, W, 3] on the CPU."""
    return (image01_BCHW.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()


def to_float(image_BHWC: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in [0, 1]."""
    return image_BHWC.permute(0, 3, 1, 2).float() / 255

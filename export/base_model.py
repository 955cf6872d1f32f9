"""The base model: what kind it is, its parts, and the constants of its one step."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizerFast

from hipa_deploy.bundle import ModelInfo, OneStep
from hipa_deploy.errors import HipaError
from hipa_deploy.hashing import folder_sha256

PARTS = {"unet": "UNet2DConditionModel", "text_encoder": "CLIPTextModel", "vae": "AutoencoderKL"}
MAX_PIXELS = 2048 * 2048


@dataclass(frozen=True)
class BaseModel:
    """A Stable Diffusion folder with one CLIP text encoder. Parts are loaded one at a time, in float32, frozen."""

    folder: Path
    name: str

    @classmethod
    def open(cls, model: str | Path) -> BaseModel:
        """Open a diffusers folder, or fetch a hub id into the local cache.

        Raises:
            HipaError: no such folder or id, or a pipeline of another kind.

        """
        folder = Path(model) if Path(model).exists() else _download(str(model))
        index = folder / "model_index.json"
        if not index.is_file():
            raise HipaError(
                f"{folder}: no model_index.json in it. Expected a diffusers StableDiffusionPipeline folder."
            )
        _check_kind(folder, json.loads(index.read_text()))
        return cls(folder, folder.resolve().name if Path(model).exists() else str(model))

    def info(self) -> ModelInfo:
        """Name, and the hash of the UNet's weights: what an adaptor is bound to."""
        return ModelInfo(name=self.name, sha256=folder_sha256(self.folder / "unet"))

    def unet(self) -> UNet2DConditionModel:
        """The UNet. Raises HipaError for kinds that need more than a timestep and one text context."""
        config = UNet2DConditionModel.load_config(self.folder, subfolder="unet")
        for key in ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type", "time_cond_proj_dim"):
            if config.get(key) is not None:
                raise HipaError(f"{self.folder}: the UNet has {key}={config[key]!r}, which is not supported.")
        return _load(UNet2DConditionModel, self.folder, "unet")

    def text_encoder(self) -> CLIPTextModel:
        """The CLIP text encoder."""
        return _load(CLIPTextModel, self.folder, "text_encoder")

    def vae(self) -> AutoencoderKL:
        """The autoencoder."""
        return _load(AutoencoderKL, self.folder, "vae")

    def tokenizer(self) -> CLIPTokenizerFast:
        """The tokenizer, in its Rust form."""
        try:
            return CLIPTokenizerFast.from_pretrained(self.folder, subfolder="tokenizer")
        except (OSError, ValueError) as error:
            raise HipaError(f"{self.folder}/tokenizer cannot be loaded: {_first_line(error)}") from None

    def scheduler(self) -> DDPMScheduler:
        """The noise schedule the model was trained with."""
        return DDPMScheduler.from_pretrained(self.folder, subfolder="scheduler")

    def one_step(self, timestep: int, height: int | None, width: int | None) -> OneStep:
        """The constants of one step at ``timestep`` and a size in pixels (None: the size it was trained for).

        Raises:
            HipaError: a size that is not a multiple the model allows, or is absurd.

        """
        unet = UNet2DConditionModel.load_config(self.folder, subfolder="unet")
        vae = AutoencoderKL.load_config(self.folder, subfolder="vae")
        scale = 2 ** (len(vae["block_out_channels"]) - 1)
        multiple = scale * 2 ** (len(unet["block_out_channels"]) - 1)
        height, width = (size or scale * unet["sample_size"] for size in (height, width))
        for name, size in (("height", height), ("width", width)):
            if size <= 0 or size % multiple:
                raise HipaError(f"{name} {size} does not fit this model. Expected a positive multiple of {multiple}.")
        if height * width > MAX_PIXELS:
            raise HipaError(f"{width}x{height} is too large. Expected at most {MAX_PIXELS} pixels.")
        schedule = self.scheduler()
        return OneStep(
            prediction_type=schedule.config.prediction_type,
            timestep=timestep,
            alpha_bar=float(schedule.alphas_cumprod[timestep]),
            scaling_factor=vae["scaling_factor"],
            latent_shape=(unet["in_channels"], height // scale, width // scale),
            height=height,
            width=width,
        )


def _download(model: str) -> Path:
    if "/" not in model or model.startswith(("/", ".")):
        raise HipaError(f"{model} does not exist. Expected a diffusers model folder or a hub id like owner/name.")
    try:
        return Path(DiffusionPipeline.download(model))
    except Exception as error:  # network, authentication and hub errors share no base class
        raise HipaError(f"{model}: no such folder, and the hub did not provide it: {_first_line(error)}") from None


def _check_kind(folder: Path, index: dict[str, Any]) -> None:
    if "text_encoder_2" in index:
        raise HipaError(
            f"{folder} is {index['_class_name']}: two text encoders are not supported. Use an SD 1.x or 2.x model."
        )
    for part, expected in PARTS.items():
        found = (index.get(part) or [None, None])[1]
        if found != expected:
            raise HipaError(f"{folder}: its {part} is {found}, expected {expected}. Use an SD 1.x or 2.x model.")


def _load(kind: Any, folder: Path, part: str) -> Any:
    try:
        module = kind.from_pretrained(folder, subfolder=part, use_safetensors=True).float()
    except Exception as error:  # a truncated file, a missing file and a wrong shape each raise their own kind
        raise HipaError(f"{folder}/{part} cannot be loaded: {_first_line(error)}") from None
    for name, weight in module.named_parameters():
        if weight.is_meta:
            raise HipaError(f"{folder}/{part}: weight {name} is missing from the file. Copy the model again.")
        if not torch.isfinite(weight).all():
            raise HipaError(f"{folder}/{part}: weight {name} holds NaN or infinity. Expected finite weights.")
    return module.requires_grad_(False).eval()


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:300] or type(error).__name__

"""The base model: what kind it is, its parts, and the constants of its one step."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizerFast

from hipa_deploy.bundle.manifest import ModelInfo, OneStep
from hipa_deploy.errors import HipaError, first_line
from hipa_deploy.models.adaptor_folder import unet_sha256
from hipa_deploy.models.decoder_folder import DECODER_METADATA, read_decoder_metadata, vae_sha256
from hipa_deploy.models.kind import check_pipeline, check_unet, latent_channels, read_config
from hipa_deploy.models.locate import model_folder
from hipa_deploy.tasks import Task

MAX_PIXELS = 2048 * 2048


@dataclass(frozen=True)
class BaseModel:
    """A Stable Diffusion folder with one CLIP text encoder. Parts are loaded one at a time, in float32, frozen."""

    folder: Path
    name: str

    @classmethod
    def open(cls, name: str) -> BaseModel:
        """Open 'emoji', a diffusers folder, or a hub id (fetched into the local cache).

        Raises:
            HipaError: no such folder or id, or a pipeline of another kind.

        """
        folder = model_folder(name)
        check_pipeline(folder, read_config(folder, "model_index.json"))
        return cls(folder, folder.resolve().name if Path(name).exists() else name)

    @cached_property
    def info(self) -> ModelInfo:
        """Name, and the hash of the UNet's weights: what an adaptor is bound to."""
        return ModelInfo(name=self.name, sha256=unet_sha256(self.folder))

    def unet(self, task: Task = "generate") -> UNet2DConditionModel:
        """The UNet. Raises HipaError for kinds that take more than noise, a timestep and one text context.

        For inpainting it may take mask and source as well.
        """
        check_unet(self.folder, task)
        return _load(UNet2DConditionModel, self.folder, "unet")

    @property
    def text_width(self) -> int:
        """Width D of a text context [B, L, D]."""
        return int(read_config(self.folder, "text_encoder/config.json")["hidden_size"])

    def text_encoder(self) -> CLIPTextModel:
        """The CLIP text encoder."""
        return _load(CLIPTextModel, self.folder, "text_encoder")

    def vae(self) -> AutoencoderKL:
        """The autoencoder."""
        return _load(AutoencoderKL, self.folder, "vae")

    @property
    def latent_channels(self) -> int:
        """Channels C of the latents [B, C, h, w]."""
        return latent_channels(self.folder)

    def tiny_encoder(self, folder: Path) -> AutoencoderTiny:
        """An AutoencoderTiny whose encoder gives this model's latents.

        Raises:
            HipaError: it cannot be loaded, gives other latents, or is a decoder alone.

        """
        if not folder.is_dir():
            raise HipaError(
                f"encoder {folder} does not exist. Expected full, tiny, or an AutoencoderTiny folder."
            )
        if (folder / DECODER_METADATA).exists():
            raise HipaError(
                f"encoder {folder} is a decoder that hipa-train wrote: its encoder was never trained."
            )
        tiny = _load(AutoencoderTiny, folder, None)
        halvings = sum(
            layer.stride == (2, 2)
            for layer in tiny.encoder.layers
            if isinstance(layer, torch.nn.Conv2d)
        )
        got, expected = (
            (tiny.config.latent_channels, 2**halvings),
            (self.latent_channels, self._scale),
        )
        if got != expected:
            raise HipaError(
                f"encoder {folder} gives {got[0]} latent channels and reduces {got[1]} times, "
                f"expected {expected[0]} and {expected[1]}. Use one for this model's latents."
            )
        return tiny

    def tiny_decoder(self, folder: Path) -> AutoencoderTiny:
        """An AutoencoderTiny for this model's latents.

        Raises:
            HipaError: it cannot be loaded, decodes other latents, or was distilled from another VAE.

        """
        if not folder.is_dir():
            raise HipaError(
                f"decoder {folder} does not exist. Expected full, tiny, or an AutoencoderTiny folder."
            )
        _check_distilled_from(folder, self.folder)
        tiny = _load(AutoencoderTiny, folder, None)
        upsamplings = sum(isinstance(layer, torch.nn.Upsample) for layer in tiny.decoder.layers)
        got = (tiny.config.latent_channels, tiny.config.upsampling_scaling_factor**upsamplings)
        expected = (self.latent_channels, self._scale)
        if got != expected:
            raise HipaError(
                f"decoder {folder} takes {got[0]} latent channels and enlarges {got[1]} times, "
                f"expected {expected[0]} and {expected[1]}. Use one for this model's latents."
            )
        return tiny

    def tokenizer(self) -> CLIPTokenizerFast:
        """The tokenizer, in its Rust form."""
        try:
            return CLIPTokenizerFast.from_pretrained(self.folder, subfolder="tokenizer")
        except (OSError, ValueError) as error:
            raise HipaError(
                f"{self.folder}/tokenizer cannot be loaded: {first_line(error)}"
            ) from None

    def scheduler(self) -> DDPMScheduler:
        """The noise schedule the model was trained with."""
        return DDPMScheduler.from_config(
            read_config(self.folder, "scheduler/scheduler_config.json")
        )

    @property
    def _scale(self) -> int:
        """Pixels a latent, in each direction."""
        return 2 ** (len(read_config(self.folder, "vae/config.json")["block_out_channels"]) - 1)

    @property
    def size_multiple(self) -> int:
        """Heights and widths are multiples of this many pixels: every level of the UNet halves without remainder."""
        return self._scale * 2 ** (
            len(read_config(self.folder, "unet/config.json")["block_out_channels"]) - 1
        )

    def one_step(self, timestep: int, height: int | None, width: int | None) -> OneStep:
        """The constants of one step at ``timestep`` and a size in pixels (None: the size it was trained for).

        Raises:
            HipaError: a size that is not a multiple the model allows, or is absurd.

        """
        unet, multiple, scale = (
            read_config(self.folder, "unet/config.json"),
            self.size_multiple,
            self._scale,
        )
        native = scale * unet["sample_size"]
        height, width = (native if size is None else size for size in (height, width))
        for name, size in (("height", height), ("width", width)):
            if size <= 0 or size % multiple:
                nearest = max(multiple, round(size / multiple) * multiple)
                raise HipaError(
                    f"{name} {size} does not fit this model. Expected a multiple of {multiple}: {nearest} is nearest."
                )
        if height * width > MAX_PIXELS:
            raise HipaError(f"{width}x{height} is too large. Expected at most {MAX_PIXELS} pixels.")
        schedule = self.scheduler()
        return OneStep(
            prediction_type=schedule.config.prediction_type,
            timestep=timestep,
            alpha_bar=float(schedule.alphas_cumprod[timestep]),
            scaling_factor=read_config(self.folder, "vae/config.json")["scaling_factor"],
            latent_shape=(self.latent_channels, height // scale, width // scale),
            height=height,
            width=width,
        )


def _check_distilled_from(decoder: Path, model: Path) -> None:
    """A decoder that says which VAE it was distilled from must mean this one; another tool's says nothing."""
    if not (decoder / DECODER_METADATA).exists():
        return
    if read_decoder_metadata(decoder).base_vae_sha256 != vae_sha256(model):
        raise HipaError(
            f"decoder {decoder} was distilled from another VAE than {model}'s. Distil one from it."
        )


def _load(kind: Any, folder: Path, part: str | None) -> Any:
    """One part in float32, frozen. A weight that the file lacks would be random, so it is refused."""
    where = folder / part if part else folder
    try:
        module, report = kind.from_pretrained(
            folder, subfolder=part, use_safetensors=True, output_loading_info=True
        )
    except (
        Exception
    ) as error:  # a truncated file, a missing file and a wrong shape each raise their own kind
        raise HipaError(f"{where} cannot be loaded: {first_line(error)}") from None
    if report["missing_keys"]:
        raise HipaError(
            f"{where}: weight {min(report['missing_keys'])} is missing. Copy the model again."
        )
    for name, weight in module.named_parameters():
        if not torch.isfinite(weight).all():
            raise HipaError(
                f"{where}: weight {name} holds NaN or infinity. Expected finite weights."
            )
    return module.float().requires_grad_(False).eval()

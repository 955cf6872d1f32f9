"""The base model that is exported: its parts, and the constants of its one step.

Each part is loaded anew by every call, so the caller decides how long it stays in memory: an export
never holds two copies of the UNet.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hipa_deploy.bundle.manifest import ModelInfo, OneStep, StepMethod
from hipa_deploy.errors import HipaError, brief, reason_of
from hipa_deploy.models.adaptor_folder import unet_sha256
from hipa_deploy.models.clip_tokenizer import load_tokenizer
from hipa_deploy.models.decoder_folder import DECODER_METADATA, read_decoder_metadata
from hipa_deploy.models.locate import model_folder, model_name
from hipa_deploy.models.model_config import ModelConfig
from hipa_deploy.models.one_step.one_step_method import OneStepMethod
from hipa_deploy.models.one_step.step_constants import step_constants
from hipa_deploy.models.weights.early_check import check_tensors
from hipa_deploy.models.weights.load_part import check_part, check_weights, load_part
from hipa_deploy.models.weights.part_config import read_config
from hipa_deploy.models.weights.weight_file import SAFETENSORS
from hipa_deploy.models.weights.weight_files import find_weights
from hipa_deploy.models.weights.weight_identity import has_identity
from hipa_deploy.tasks import Task

# Imported where a part is loaded: a request is checked without torch.
if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizerFast

MAX_PIXELS = 2048 * 2048


@dataclass(frozen=True)
class ModelParts:
    """A Stable Diffusion folder with CLIP's text encoder, or with SDXL's two.

    Its parts come in float32, frozen.

    Attributes:
        folder: the diffusers folder.
        name: what the bundle's manifest calls the model.
        config: what its configuration files say.

    Example:
        >>> model = ModelParts.open("emoji")
        >>> model.one_step(999, None, None).latent_shape
        (4, 16, 16)
        >>> model.unet().config.in_channels
        4

    """

    folder: Path
    name: str
    config: ModelConfig

    @classmethod
    def open(cls, name: str) -> ModelParts:
        """Open 'emoji', a diffusers folder, or a hub id (fetched into the local cache).

        Raises:
            HipaError: there is no such folder or id, or it holds another kind of pipeline.

        """
        folder = model_folder(name)
        config = ModelConfig.read(folder)
        check_weights(folder, config.text_parts)
        return cls(folder, model_name(str(name), folder), config)

    @cached_property
    def info(self) -> ModelInfo:
        """The name, and the hash of the UNet's weights, to which an adaptor is bound."""
        return ModelInfo(name=self.name, sha256=unet_sha256(self.folder))

    def check_parts(self) -> None:
        """Check by the headers of files that every part has its weights, before any is loaded.

        Raises:
            HipaError: weights of a part are missing, or are another model's.

        """
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTextModelWithProjection

        kinds: dict[str, Any] = {
            "text_encoder": CLIPTextModel,
            "unet": UNet2DConditionModel,
            "vae": AutoencoderKL,
        }
        if self.config.has_text_pair:
            kinds["text_encoder_2"] = CLIPTextModelWithProjection
        for part, kind in kinds.items():
            check_part(kind, self.folder / part)

    def unet(self, task: Task = "generate") -> UNet2DConditionModel:
        """The UNet.

        Raises:
            HipaError: it takes more than noise, a timestep and one text context (for the task
                inpaint: and more than mask and source), or it cannot be loaded.

        """
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

        self.check_unet(task)
        return load_part(UNet2DConditionModel, self.folder / "unet")

    def check_unet(self, task: Task) -> None:
        """Check by its configuration that the UNet is one for ``task``.

        Raises:
            HipaError: as ``unet``.

        """
        self.config.check_unet(task)

    def text_encoder(self) -> CLIPTextModel:
        """The CLIP text encoder."""
        from transformers import CLIPTextModel

        return load_part(CLIPTextModel, self.folder / "text_encoder")

    def text_encoder_2(self) -> CLIPTextModelWithProjection:
        """The second CLIP text encoder of SDXL, with the pooled vector's projection."""
        from transformers import CLIPTextModelWithProjection

        return load_part(CLIPTextModelWithProjection, self.folder / "text_encoder_2")

    def vae(self) -> AutoencoderKL:
        """The autoencoder."""
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

        return load_part(AutoencoderKL, self.folder / "vae")

    def check_tiny_encoder(self, folder: Path) -> None:
        """Check the AutoencoderTiny in ``folder`` as far as that needs no torch.

        Raises:
            HipaError: it does not exist, is damaged, is for other latents, or only its decoder was
                trained.

        """
        _check_tiny(folder, "encoder", self.config.latent_channels)
        if (folder / DECODER_METADATA).exists():
            raise HipaError(
                f"encoder {folder} is a decoder that hipa-train wrote: its encoder was never "
                "trained. Use full, or another AutoencoderTiny folder."
            )

    def check_tiny_decoder(self, folder: Path) -> None:
        """Check the AutoencoderTiny in ``folder`` as far as that needs no torch.

        Raises:
            HipaError: it does not exist, is damaged, is for other latents, or was distilled from
                another VAE.

        """
        _check_tiny(folder, "decoder", self.config.latent_channels)
        _check_distilled_from(folder, self.folder)

    def tiny_encoder(self, folder: Path) -> AutoencoderTiny:
        """The AutoencoderTiny in ``folder``, whose encoder gives this model's latents.

        Raises:
            HipaError: it cannot be loaded, gives other latents, or only its decoder was trained.

        """
        import torch
        from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny

        self.check_tiny_encoder(folder)
        tiny = load_part(AutoencoderTiny, folder)

        # EncoderTiny does not record its factor: each convolution of stride two halves the image.
        factor = 1
        for layer in tiny.encoder.layers:
            if isinstance(layer, torch.nn.Conv2d) and layer.stride == (2, 2):
                factor *= 2
        channels = tiny.config.latent_channels
        if (channels, factor) != (self.config.latent_channels, self.config.vae_factor):
            raise HipaError(
                f"encoder {folder} gives {channels} latent channels and reduces {factor} times, "
                f"expected {self.config.latent_channels} and {self.config.vae_factor}. "
                "Use one for this model's latents."
            )
        return tiny

    def tiny_decoder(self, folder: Path) -> AutoencoderTiny:
        """The AutoencoderTiny in ``folder``, whose decoder takes this model's latents.

        Raises:
            HipaError: it cannot be loaded, decodes other latents, or was distilled from another
                VAE.

        """
        import torch
        from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny

        self.check_tiny_decoder(folder)
        tiny = load_part(AutoencoderTiny, folder)

        # Every upsampling of DecoderTiny enlarges by the same factor.
        upsamplings = sum(isinstance(layer, torch.nn.Upsample) for layer in tiny.decoder.layers)
        factor = tiny.config.upsampling_scaling_factor**upsamplings
        channels = tiny.config.latent_channels
        if (channels, factor) != (self.config.latent_channels, self.config.vae_factor):
            raise HipaError(
                f"decoder {folder} takes {channels} latent channels and enlarges {factor} times, "
                f"expected {self.config.latent_channels} and {self.config.vae_factor}. "
                "Use one for this model's latents."
            )
        return tiny

    def tokenizer(self, part: str = "tokenizer") -> CLIPTokenizerFast:
        """The tokenizer, or 'tokenizer_2' of SDXL, in its Rust form; see ``load_tokenizer``."""
        return load_tokenizer(self.config, part)

    def one_step(
        self,
        timestep: int,
        height: int | None,
        width: int | None,
        method: OneStepMethod | None = None,
    ) -> OneStep:
        """The constants of one step at ``timestep`` for images of a size in pixels.

        Args:
            timestep: 0 to 999.
            height: pixels; None is the size that the model was trained for.
            width: the same.
            method: a one-step method of others, which decides the timestep.

        Raises:
            HipaError: a size that is not a multiple of ``ModelConfig.size_multiple``, or is too
                large; a model that does not say its own size, where one is not given; a timestep
                out of range or without signal; or a method whose step this model cannot take.

        """
        config = self.config
        multiple = config.size_multiple
        if height is None:
            height = config.native_size[0]
        if width is None:
            width = config.native_size[1]
        for name, size in (("height", height), ("width", width)):
            if size <= 0 or size % multiple:
                nearest = max(multiple, round(size / multiple) * multiple)
                raise HipaError(
                    f"{name} {size} does not fit this model. "
                    f"Expected a multiple of {multiple}: {nearest} is nearest."
                )
        # A typing error such as a digit too many should not cost minutes and all memory.
        if height * width > MAX_PIXELS:
            raise HipaError(f"{width}x{height} is too large. Expected at most {MAX_PIXELS} pixels.")

        prediction_type: Any = config.prediction_type
        alpha_bar: float
        numbers: StepMethod | None = None
        if method is None:
            alpha_bar = config.alpha_bar(timestep)
        else:
            constants = step_constants(method, config)
            prediction_type = constants.prediction_type
            timestep = constants.timestep
            alpha_bar = constants.alpha_bar
            numbers = constants.method

        scale = config.vae_factor
        return OneStep(
            prediction_type=prediction_type,
            timestep=timestep,
            alpha_bar=alpha_bar,
            scaling_factor=config.scaling_factor,
            latent_shape=(config.latent_channels, height // scale, width // scale),
            height=height,
            width=width,
            method=numbers,
        )


def free_memory() -> None:
    """Give the memory of parts that are no longer used back to the system.

    Modules with hooks and torch.export leave cycles, which hold weights until they are collected.
    And glibc keeps freed blocks of up to 32 MiB for later: after SDXL's UNet that was 7 GB.
    """
    gc.collect()
    # Other C libraries have no malloc_trim, and Windows has no library without a name.
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _check_tiny(folder: Path, what: str, latent_channels: int) -> None:
    """Check the files of an AutoencoderTiny.

    Raises:
        HipaError: there are none, they are damaged or not finite, or are for other latents.

    """
    if not folder.is_dir():
        raise HipaError(
            f"{what} {folder} does not exist. Expected full, tiny, or an AutoencoderTiny folder."
        )
    try:
        if not (folder / "config.json").exists():
            raise HipaError("it has no config.json")
        config = read_config(folder, "config.json")
        kind = str(config.get("_class_name", "AutoencoderTiny"))
        if kind != "AutoencoderTiny":
            raise HipaError(f"it is of the class {kind}. Expected AutoencoderTiny")
        channels = config.get("latent_channels", latent_channels)
        if channels != latent_channels:
            raise HipaError(f"it has {channels} latent channels, the model {latent_channels}")
        factor = config.get("scaling_factor", 1.0)
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < 1e6:
            raise HipaError(
                f"config.json has scaling_factor {brief(factor)}. Expected a number above 0"
            )
        for path in find_weights(folder):
            if path.suffix.lower() == SAFETENSORS:
                check_tensors(path)
    except HipaError as error:
        raise HipaError(
            f"{what} {folder} cannot be used: {reason_of(error)}. "
            "Expected full, tiny, or an AutoencoderTiny folder for this model's latents."
        ) from None


def _check_distilled_from(decoder: Path, model: Path) -> None:
    """Raise HipaError if the decoder's metadata names another VAE than ``model``'s.

    A decoder of another tool has no such metadata and is taken on trust.
    """
    if not (decoder / DECODER_METADATA).exists():
        return
    if not has_identity(model / "vae", read_decoder_metadata(decoder).base_vae_sha256):
        raise HipaError(
            f"decoder {decoder} was distilled from another VAE than {model}'s. "
            f"Distil one from {model}, or use --decoder full."
        )

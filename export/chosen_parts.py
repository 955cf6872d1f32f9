"""The parts that one export is made of: the model's own or tiny ones, with the adaptor merged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizerFast

from hipa_deploy.bundle.manifest import AdaptorInfo, ControlInfo, DecoderInfo, EncoderInfo
from hipa_deploy.disk.hashing import file_sha256
from hipa_deploy.export.export_options import ExportOptions
from hipa_deploy.export.graph.conditioning import Conditioning, JointConditioning
from hipa_deploy.export.graph.modules import named_encoder
from hipa_deploy.export.merge import merge_adaptor, merge_encoder_adaptor
from hipa_deploy.export.model_parts import ModelParts, free_memory
from hipa_deploy.models.adaptor_folder import ENCODER_WEIGHTS, METADATA, read_metadata
from hipa_deploy.models.decoder_folder import vae_sha256
from hipa_deploy.models.kind import SECOND
from hipa_deploy.models.locate import model_name
from hipa_deploy.models.lora.open_style import OpenStyle
from hipa_deploy.models.style import check_same_loras
from hipa_deploy.models.text_context import text_context
from hipa_deploy.models.text_pair import pair_context
from hipa_deploy.models.weights.controlnet import load_controlnet
from hipa_deploy.models.weights.weight_identity import has_identity, weights_identity
from hipa_deploy.tasks import Task

CONTROL = "controlnet"


@dataclass(frozen=True)
class ChosenParts:
    """What an export is made of. Every call loads its part anew, in float32, as ``ModelParts`` do.

    Attributes:
        model: the base model.
        task: what the bundle makes an image from.
        adaptor: the adaptor folder to merge; None leaves the model as it is.
        adaptor_scale: 1.0 merges the adaptor as it was trained.
        tiny_encoder: an AutoencoderTiny folder that encodes in place of the model's VAE.
        tiny_decoder: an AutoencoderTiny folder that decodes in place of the model's VAE.
        chunk_tokens: tokens that the text encoder reads at once.
        clip_skip: last layers of the text encoder that are left out.
        style: LoRAs and embeddings, which change the model before the adaptor.
        controlnet: a ControlNet's folder, of the task control; None for other tasks.

    """

    model: ModelParts
    task: Task
    adaptor: Path | None = None
    adaptor_scale: float = 1.0
    tiny_encoder: Path | None = None
    tiny_decoder: Path | None = None
    chunk_tokens: int = 77
    clip_skip: int = 0
    style: OpenStyle = field(default_factory=OpenStyle)
    controlnet: Path | None = None

    @classmethod
    def choose(
        cls,
        model: ModelParts,
        options: ExportOptions,
        task: Task,
        chunk_tokens: int = 77,
        clip_skip: int = 0,
    ) -> ChosenParts:
        """The parts that ``options`` ask for.

        Raises:
            HipaError: a LoRA or an embedding that does not fit the model, or LoRAs that are not
                those that the adaptor was trained on.

        """
        style = OpenStyle.read(options.style, model.config)
        if options.adaptor is not None and (options.adaptor / METADATA).exists():
            trained = read_metadata(options.adaptor)
            check_same_loras(options.adaptor, trained.loras, style.info.loras)
        return cls(
            model=model,
            task=task,
            adaptor=options.adaptor,
            adaptor_scale=options.adaptor_scale,
            tiny_encoder=options.encoder,
            tiny_decoder=options.decoder,
            chunk_tokens=chunk_tokens,
            clip_skip=clip_skip,
            style=style,
            controlnet=options.controlnet,
        )

    @property
    def has_text_pair(self) -> bool:
        """Whether the model has two text encoders and conditioning, as SDXL has."""
        return self.model.config.has_text_pair

    def tokenizer(self) -> CLIPTokenizerFast:
        """The model's tokenizer, with the words of embeddings."""
        tokenizer = self.model.tokenizer()
        self.style.add_words(tokenizer)
        return tokenizer

    def tokenizer_2(self) -> CLIPTokenizerFast:
        """The second tokenizer of a model with two text encoders, with the words of embeddings."""
        tokenizer = self.model.tokenizer("tokenizer_2")
        self.style.add_words(tokenizer, part=SECOND)
        return tokenizer

    def text_encoder_2(self) -> CLIPTextModelWithProjection:
        """The second text encoder with LoRAs merged and words added; no adaptor changes it."""
        encoder = self.model.text_encoder_2()
        self.style.merge({SECOND: encoder})
        if self.style.embeddings:
            self.style.add_words(self.model.tokenizer("tokenizer_2"), encoder, SECOND)
        named: CLIPTextModelWithProjection = named_encoder(encoder)
        return named

    def text_pair(self) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
        """Both text encoders."""
        return self.text_encoder(), self.text_encoder_2()

    def pair_context(
        self,
        pair: tuple[CLIPTextModel, CLIPTextModelWithProjection],
        tokens_BL: Tensor,
        tokens_2_BL: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The context float32 [B, L, D] and the pooled vector float32 [B, P] of both encoders."""
        return pair_context(*pair, tokens_BL, tokens_2_BL, self.chunk_tokens, self.clip_skip)

    def conditioning(
        self, timesteps: Sequence[int], sizes: Sequence[int] | None
    ) -> Conditioning | JointConditioning:
        """What the UNet, with LoRAs and adaptor merged, makes of the pooled vector.

        After it what a ControlNet makes of it. The rest of both networks is freed again.
        """
        unet, _ = self.unet()
        own = Conditioning(unet, timesteps, sizes)
        controlnet = self.control_network()
        if controlnet is None:
            return own
        return JointConditioning(own, Conditioning(controlnet, timesteps, sizes, CONTROL))

    def text_encoder(self) -> CLIPTextModel:
        """The model's text encoder with LoRAs merged and words added; no adaptor changes it.

        Its parts are called ``text_model.*`` in every version of transformers.
        """
        encoder = self.model.text_encoder()
        self.style.merge({"text_encoder": encoder})
        if self.style.embeddings:
            self.style.add_words(self.model.tokenizer(), encoder)
        named: CLIPTextModel = named_encoder(encoder)
        return named

    def context(self, encoder: CLIPTextModel, tokens_BL: Tensor) -> Tensor:
        """What the text encoder gives for tokens int64 [B, L]: the context, float32 [B, L, D]."""
        return text_context(encoder, tokens_BL, self.chunk_tokens, self.clip_skip)

    def unet(self) -> tuple[UNet2DConditionModel, AdaptorInfo | None]:
        """The UNet with LoRAs and adaptor merged, and what the manifest says of that adaptor."""
        unet = self.model.unet(self.task)
        self.style.merge({"unet": unet})
        if self.adaptor is None:
            return unet, None
        return unet, merge_adaptor(unet, self.adaptor, self.adaptor_scale)

    def control_network(self) -> ControlNetModel | None:
        """The ControlNet, as it is: no LoRA and no adaptor changes it. None for other tasks."""
        return load_controlnet(self.controlnet) if self.controlnet is not None else None

    def control_info(self) -> ControlInfo | None:
        """What the manifest says of the ControlNet; None for other tasks."""
        if self.controlnet is None:
            return None
        name = model_name(str(self.controlnet), self.controlnet)
        return ControlInfo(name=name, sha256=weights_identity(self.controlnet))

    def encoder(self) -> AutoencoderKL | AutoencoderTiny:
        """The autoencoder that encodes, with the adaptor's weights for it merged, if any."""
        if self.tiny_encoder is not None:
            return self.model.tiny_encoder(self.tiny_encoder)
        vae = self.model.vae()
        merge_encoder_adaptor(vae, self.adaptor, self.adaptor_scale)
        return vae

    def decoder(self) -> AutoencoderKL | AutoencoderTiny:
        """The autoencoder that decodes."""
        if self.tiny_decoder is not None:
            return self.model.tiny_decoder(self.tiny_decoder)
        return self.model.vae()

    def encoder_info(self) -> EncoderInfo:
        """What the manifest says of the encoder."""
        if self.tiny_encoder is not None:
            name = model_name(str(self.tiny_encoder), self.tiny_encoder)
            return EncoderInfo(kind="tiny", name=name, sha256=weights_identity(self.tiny_encoder))
        adaptor_sha256 = None
        if self.adaptor is not None and (self.adaptor / ENCODER_WEIGHTS).exists():
            adaptor_sha256 = file_sha256(self.adaptor / ENCODER_WEIGHTS)
        vae = vae_sha256(self.model.folder)
        return EncoderInfo(kind="full", name="vae", sha256=vae, adaptor_sha256=adaptor_sha256)

    def decoder_info(self) -> DecoderInfo:
        """What the manifest says of the decoder."""
        if self.tiny_decoder is not None:
            name = model_name(str(self.tiny_decoder), self.tiny_decoder)
            return DecoderInfo(kind="tiny", name=name, sha256=weights_identity(self.tiny_decoder))
        return DecoderInfo(kind="full", name="vae", sha256=vae_sha256(self.model.folder))

    def decodes_like(self, decoder: DecoderInfo) -> bool:
        """Whether the decoder is the one that a manifest names, by its weights."""
        folder = self.tiny_decoder or self.model.folder / "vae"
        return has_identity(folder, decoder.sha256)


@dataclass(frozen=True)
class HeldParts(ChosenParts):
    """The same parts; the last one that was asked for stays loaded, until ``release`` or another.

    So a part serves several prompts in turn, and two parts are never in memory together.
    """

    held: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, parts: ChosenParts) -> HeldParts:
        """Parts that load what ``parts`` load."""
        return cls(**{entry.name: getattr(parts, entry.name) for entry in fields(ChosenParts)})

    def text_encoder(self) -> CLIPTextModel:
        """As ``ChosenParts.text_encoder``."""
        return self._once("text_encoder", super().text_encoder)

    def text_pair(self) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
        """As ``ChosenParts.text_pair``."""
        pair: tuple[CLIPTextModel, CLIPTextModelWithProjection]
        pair = self._once("text_pair", self._load_pair)
        return pair

    def _load_pair(self) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
        return super().text_encoder(), super().text_encoder_2()

    def unet(self) -> tuple[UNet2DConditionModel, AdaptorInfo | None]:
        """As ``ChosenParts.unet``."""
        unet: tuple[UNet2DConditionModel, AdaptorInfo | None] = self._once("unet", super().unet)
        return unet

    def control_network(self) -> ControlNetModel | None:
        """As ``ChosenParts.control_network``; it stays beside the UNet, with which it runs."""
        if self.controlnet is not None and CONTROL not in self.held:
            self.held[CONTROL] = super().control_network()
        return self.held.get(CONTROL)

    def encoder(self) -> AutoencoderKL | AutoencoderTiny:
        """As ``ChosenParts.encoder``."""
        return self._once("encoder", super().encoder)

    def decoder(self) -> AutoencoderKL | AutoencoderTiny:
        """As ``ChosenParts.decoder``."""
        return self._once("decoder", super().decoder)

    def release(self) -> None:
        """Free what is loaded."""
        self.held.clear()
        free_memory()

    def _once(self, name: str, load: Callable[[], Any]) -> Any:
        if name not in self.held:
            self.release()
            self.held[name] = load()
        return self.held[name]

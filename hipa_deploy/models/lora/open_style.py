"""A style with its files read and checked: LoRAs to merge, and embeddings to add."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from hipa_deploy.bundle.manifest import LoraInfo
from hipa_deploy.errors import HipaError
from hipa_deploy.models.lora.embeddings import (
    FIRST,
    Embedding,
    add_rows,
    add_tokens,
    read_embedding,
    read_pair_embeddings,
)
from hipa_deploy.models.lora.find_lora import own_name
from hipa_deploy.models.lora.lora_file import LoraFile, LoraLayer, read_lora
from hipa_deploy.models.lora.merge_lora import merge_lora, module_names
from hipa_deploy.models.lora.names import SECOND
from hipa_deploy.models.model_config import ModelConfig
from hipa_deploy.models.style import Style, StyleInfo
from hipa_deploy.models.weights.part_config import build

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizerFast


@dataclass(frozen=True)
class OpenStyle:
    """LoRAs and embeddings in memory, which fit the model.

    Attributes:
        loras: the files and their scales, in the order in which they are merged.
        embeddings: in the order of their options.
        info: what a manifest says of them.

    Example:
        >>> style = OpenStyle.read(Style((LoraChoice(Path("style.safetensors")),)), config)
        >>> style.merge({"unet": unet})

    """

    loras: tuple[tuple[LoraFile, float], ...] = ()
    embeddings: tuple[Embedding, ...] = ()
    info: StyleInfo = field(default_factory=StyleInfo)

    @classmethod
    def read(cls, style: Style, config: ModelConfig) -> OpenStyle:
        """Read the files of ``style`` and check that they fit the model; no weights are loaded.

        Raises:
            HipaError: a file that cannot be read, that is not whole or is for another model; an
                embedding of another width or for another number of text encoders, or a token that
                is taken.

        """
        if not style:
            return cls()
        embeddings: list[Embedding]
        if config.has_text_pair:
            embeddings = read_pair_embeddings(style.embeddings, config.text_widths)
        else:
            width = config.text_width
            embeddings = [read_embedding(chosen, width) for chosen in style.embeddings]
        for part in config.text_parts:
            _check_tokens([embedding for embedding in embeddings if embedding.part == part])

        loras = []
        infos = []
        shapes = empty_parts(config) if style.loras else {}
        for chosen in style.loras:
            lora = read_lora(chosen.path, module_names(shapes))
            # On tensors without memory: it finds what does not fit before gigabytes are loaded.
            merge_lora(shapes, _without_memory(lora), chosen.scale, "--lora")
            loras.append((lora, chosen.scale))
            infos.append(
                LoraInfo(
                    name=own_name(chosen.path),
                    sha256=lora.sha256,
                    scale=chosen.scale,
                    rank=lora.rank,
                    parts=lora.parts,
                )
            )
        # A file with vectors for two text encoders is one embedding.
        added = dict.fromkeys(embedding.info for embedding in embeddings)
        info = StyleInfo(loras=tuple(infos), embeddings=tuple(added))
        return cls(tuple(loras), tuple(embeddings), info)

    @property
    def changes_text(self) -> bool:
        """Whether the text encoder is another with this style."""
        in_loras = any({"text_encoder", SECOND} & set(lora.parts) for lora in self.info.loras)
        return in_loras or bool(self.embeddings)

    def merge(self, parts: Mapping[str, nn.Module]) -> None:
        """Merge the LoRAs into ``parts`` ('unet', 'text_encoder'), in place.

        Raises:
            HipaError: a weight would not be finite.

        """
        for lora, scale in self.loras:
            merge_lora(parts, lora, scale, "the number after --lora")

    def add_words(
        self,
        tokenizer: CLIPTokenizerFast,
        encoder: CLIPTextModel | CLIPTextModelWithProjection | None = None,
        part: str = FIRST,
    ) -> None:
        """Add the embeddings' tokens to ``tokenizer``, and their rows to ``encoder``, in place.

        Args:
            tokenizer: of a text encoder.
            encoder: that text encoder; None adds the words alone.
            part: which of two encoders it is: 'text_encoder' or 'text_encoder_2'.

        Raises:
            HipaError: a token is one of the tokenizer's already.

        """
        own = [embedding for embedding in self.embeddings if embedding.part == part]
        if not own:
            return
        for embedding, ids in zip(own, add_tokens(tokenizer, own), strict=True):
            if encoder is not None:
                add_rows(encoder, embedding, ids)


def empty_parts(config: ModelConfig) -> dict[str, Any]:
    """UNet and text encoders as their configurations describe them, on the meta device."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    folder = config.folder
    text = folder / "text_encoder/config.json"
    parts = {
        "unet": build(UNet2DConditionModel, config.unet, folder / "unet/config.json"),
        "text_encoder": build(CLIPTextModel, config.text_encoder, text),
    }
    if config.text_encoder_2 is not None:
        second = folder / SECOND / "config.json"
        parts[SECOND] = build(CLIPTextModelWithProjection, config.text_encoder_2, second)
    return parts


def _without_memory(lora: LoraFile) -> LoraFile:
    layers = {}
    for key, layer in lora.layers.items():
        tensors = {role: value.to("meta") for role, value in layer.tensors.items()}
        layers[key] = LoraLayer(tensors, layer.scaling, layer.rank)
    return replace(lora, layers=layers)


def _check_tokens(embeddings: Sequence[Embedding]) -> None:
    """Raise HipaError for two embeddings of one token."""
    seen: dict[str, Embedding] = {}
    for embedding in embeddings:
        for token in embedding.tokens:
            if token in seen:
                raise HipaError(
                    f"--embedding {embedding.path}: the token {token!r} is that of "
                    f"{seen[token].path} already. Give another one after a colon: "
                    f"{embedding.path}:{token}-2."
                )
            seen[token] = embedding

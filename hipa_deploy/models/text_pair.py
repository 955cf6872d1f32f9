"""Two text encoders and what they give, as SDXL has them: the one formula of training and export.

The contexts of CLIP ViT-L and OpenCLIP bigG stand side by side. Each is the hidden state before the
encoder's last layer, without the final layer norm. The second encoder also gives a pooled vector:
its last hidden state at the end token, normed and projected. The UNet takes that vector together
with six numbers: the original size of a training image, the crop's corner, and the target size
(Podell et al. 2023, https://arxiv.org/abs/2307.01952, section 2.2).

The numbers are ``hipa_deploy.tasks.size_numbers``. The source is ``encode_prompt`` of diffusers'
pipeline_stable_diffusion_xl.py. The functions call the models that they are given, so nothing of
torch is imported here.

Shape suffixes: B prompts, N = B * chunks, C tokens of a chunk (77 for CLIP), L = C * chunks tokens
of a context, D its width, P width of the pooled vector.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hipa_deploy.errors import HipaError, brief
from hipa_deploy.models.weights.part_config import read_config

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import CLIPTextModel, CLIPTextModelWithProjection


def pair_context(
    encoder: CLIPTextModel,
    encoder_2: CLIPTextModelWithProjection,
    tokens_BL: Tensor,
    tokens_2_BL: Tensor,
    chunk_tokens: int,
    clip_skip: int = 0,
) -> tuple[Tensor, Tensor]:
    """The text context [B, L, D] and the pooled vector [B, P] of a prompt's tokens.

    Of a context of several chunks the pooled vector is the first chunk's.

    Args:
        encoder: the first text encoder, of width D1.
        encoder_2: the second one, of width D2; D = D1 + D2.
        tokens_BL: int64, as the first tokenizer gives them.
        tokens_2_BL: int64, as the second tokenizer gives them. It pads otherwise, and reads
            exclamation marks otherwise.
        chunk_tokens: C, tokens that an encoder reads at once.
        clip_skip: layers of both encoders that are left out besides the last one.

    Example:
        >>> context_BLD, pooled_BP = pair_context(encoder, encoder_2, tokens, tokens_2, 77)
        >>> context_BLD.shape, pooled_BP.shape
        (torch.Size([1, 77, 2048]), torch.Size([1, 1280]))

    """
    import torch

    first_BLD = hidden_context(encoder, tokens_BL, chunk_tokens, clip_skip)
    batch, length = tokens_2_BL.shape
    outputs = encoder_2(tokens_2_BL.reshape(-1, chunk_tokens), output_hidden_states=True)
    second_BLD = outputs.hidden_states[-2 - clip_skip].reshape(batch, length, -1)
    chunks = length // chunk_tokens
    pooled_BP = outputs.text_embeds[::chunks]
    return torch.cat([first_BLD, second_BLD], dim=-1), pooled_BP


def hidden_context(
    encoder: CLIPTextModel, tokens_BL: Tensor, chunk_tokens: int, clip_skip: int = 0
) -> Tensor:
    """The hidden state [B, L, D1] before the encoder's last layer; see ``pair_context``."""
    batch, length = tokens_BL.shape
    outputs = encoder(tokens_BL.reshape(-1, chunk_tokens), output_hidden_states=True)
    hidden: Tensor = outputs.hidden_states[-2 - clip_skip]
    return hidden.reshape(batch, length, -1)


def forces_zeros(folder: Path) -> bool:
    """Whether guidance leads away from zeros, and not from the encoded empty prompt.

    SDXL was trained so. ``StableDiffusionXLPipeline.encode_prompt`` then takes zeros for the
    context and the pooled vector where no negative prompt is given.

    Args:
        folder: the diffusers folder. One that does not say it has diffusers' default, which is yes.

    Raises:
        HipaError: ``force_zeros_for_empty_prompt`` in model_index.json is no truth value.

    """
    key = "force_zeros_for_empty_prompt"
    value = read_config(folder, "model_index.json").get(key, True)
    if not isinstance(value, bool):
        raise HipaError(
            f"{folder}: model_index.json has {key}={brief(value)}. Expected true or false. "
            "Correct the file."
        )
    return value

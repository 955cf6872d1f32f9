"""SDXL's two text encoders in the layout generic: what each gives, and how the export calls it.

diffusers takes the hidden state before an encoder's last layer as its context, and counts from the
last layer back. optimum reads the count of layers in ``config.json``, and as many hidden states
from the graph. So a bundle with a clip skip has fewer hidden states, and a smaller number there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from hipa_deploy.bundle.adaptor_swap import TEXT_STAGE, TEXT_STAGE_2
from hipa_deploy.export.generic.generic_modules import GenericPairEncoder
from hipa_deploy.export.generic.generic_rows import PairSizes
from hipa_deploy.generate.stages import CONTEXT_PARTS
from hipa_deploy.models.model_config import ModelConfig

TEXT_PARTS = (TEXT_STAGE, TEXT_STAGE_2)
# Keys of outputs that optimum asks for and the path of a bundle does not take.
_UNTAKEN = ("last_hidden_state", "hidden_state")


def hidden_states(config: ModelConfig, clip_skip: int) -> tuple[int, int]:
    """How many hidden states each text encoder gives: one a layer, less those that are skipped.

    Example:
        >>> hidden_states(config_of_sdxl, 0)
        (12, 32)

    """
    layers = [int(config.text_parts[part]["num_hidden_layers"]) for part in TEXT_PARTS]
    first, second = (count - clip_skip for count in layers)
    return first, second


def pair_sizes(config: ModelConfig, clip_skip: int) -> PairSizes | None:
    """What the stages of SDXL's text encoders give; None for a model with one encoder."""
    pooled = config.pooled_width
    if pooled is None:
        return None
    first, second = config.text_widths
    return PairSizes((first, second), hidden_states(config, clip_skip), pooled)


def encoder_keys(part: str, states: int) -> tuple[str, ...]:
    """What the export calls the outputs of a text encoder, in their order.

    Example:
        >>> encoder_keys("text_encoder_2", 2)
        ('pooled', 'last_hidden_state of 2', 'hidden_state 0 of 2', 'context_2')

    """
    number = TEXT_PARTS.index(part) + 1
    last, each = _UNTAKEN
    keys = [f"{last} of {number}"]
    for state in range(states - 1):
        keys.append(f"{each} {state} of {number}")
    keys.append(CONTEXT_PARTS[part])
    if part == TEXT_STAGE_2:
        keys.insert(0, "pooled")
    return tuple(keys)


def is_taken(key: str) -> bool:
    """Whether the path of a bundle takes a tensor of the export's."""
    return not key.startswith(_UNTAKEN)


def encoder_tensors(
    part: str,
    encoder: CLIPTextModel | CLIPTextModelWithProjection,
    tokens_BL: Tensor,
    states: int,
) -> dict[str, Any]:
    """What a text encoder gives in PyTorch, as float32 arrays, by ``encoder_keys``."""
    module = GenericPairEncoder(part, encoder, states, torch.float32)
    outputs = module(tokens_BL)
    return {
        key: output.numpy() for key, output in zip(encoder_keys(part, states), outputs, strict=True)
    }

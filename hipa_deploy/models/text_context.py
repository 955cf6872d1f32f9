"""Text contexts from token ids: the one formula for training and for the references of an export.

The functions call the model that they are given, so nothing of torch is imported here.

Shape suffixes: B prompts, N = B * chunks, C tokens of a chunk (77 for CLIP), L = C * chunks tokens
of a context, D its width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import CLIPTextModel


def text_context(
    encoder: CLIPTextModel, tokens_BL: Tensor, chunk_tokens: int, clip_skip: int = 0
) -> Tensor:
    """The text context [B, L, D] of tokens int64 [B, L].

    Each chunk is encoded by itself, and the contexts of a prompt's chunks are joined along the
    tokens. compel and the pipelines for long prompts in diffusers' examples/community do the same.

    Args:
        encoder: the text encoder.
        tokens_BL: as ``PromptTokenizer`` gives them.
        chunk_tokens: C, tokens that the encoder reads at once.
        clip_skip: last layers whose work is left out; the final layer norm follows all the same
            (``encode_prompt`` of diffusers' pipeline_stable_diffusion.py).

    Example:
        >>> text_context(encoder, torch.zeros(2, 154, dtype=torch.int64), 77).shape
        torch.Size([2, 154, 768])

    """
    batch, length = tokens_BL.shape
    tokens_NC = tokens_BL.reshape(-1, chunk_tokens)
    if clip_skip == 0:
        context_NCD = encoder(tokens_NC).last_hidden_state
    else:
        # The embeddings come first, then what each layer gives.
        states = encoder(tokens_NC, output_hidden_states=True).hidden_states
        context_NCD = text_module(encoder).final_layer_norm(states[-1 - clip_skip])
    return context_NCD.reshape(batch, length, -1)


def text_module(encoder: Any) -> Any:
    """The module that has a CLIP text encoder's embeddings, its layers and its final norm.

    Before transformers 5.6, CLIPTextModel holds it as ``text_model``. Since then it is the model
    itself. CLIPTextModelWithProjection holds it in every version.

    Args:
        encoder: a CLIPTextModel or CLIPTextModelWithProjection.

    Example:
        >>> len(text_module(encoder).encoder.layers)
        12

    """
    return getattr(encoder, "text_model", encoder)

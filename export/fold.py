"""One-step specialisation: at one step the timestep is a constant, so nothing of the time path need remain."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D

from hipa_deploy.errors import HipaError


class NoTimeEmbedding(torch.nn.Module):
    """Stands where the time embedding was; the ResNet blocks skip what is None."""

    def forward(self, *_: Any) -> None:
        """Return nothing, whatever comes."""


@torch.no_grad()
def fold_timestep(unet: UNet2DConditionModel, timestep: int) -> int:
    """Fold the embedding of ``timestep`` into the bias of each ResNet block's first convolution, in place.

    A block adds its projected embedding to the output of ``conv1``, per channel: the same sum as a bias.
    Returns the number of blocks folded.

    Raises:
        HipaError: a block that uses the embedding in another way (scale and shift, for one).

    """
    probe = torch.zeros(1, dtype=next(unet.parameters()).dtype)
    embedding_BD = unet.time_embedding(unet.get_time_embed(probe, timestep))
    blocks = [module for module in unet.modules() if isinstance(module, ResnetBlock2D)]
    for block in blocks:
        if block.time_embedding_norm != "default" or block.time_emb_proj is None:
            raise HipaError(f"time embedding '{block.time_embedding_norm}' cannot be folded. Use --layout generic.")
        block.conv1.bias += block.time_emb_proj(block.nonlinearity(embedding_BD))[0]
        block.time_emb_proj = None
    unet.time_embedding = NoTimeEmbedding()
    return len(blocks)

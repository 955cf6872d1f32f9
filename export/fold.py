"""One-step specialisation: at one step the timestep is a constant, so nothing of the time path need remain."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D

from hipa_deploy.errors import HipaError

MAX_CONDITION = 1e5  # of post_quant_conv; float32 has seven digits


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


@torch.no_grad()
def fold_decoder_input(vae: AutoencoderKL) -> torch.Tensor:
    """Fold latent scaling and ``post_quant_conv`` into the decoder's first convolution, in place.

    With W and b the 1x1 ``post_quant_conv`` and s the scaling factor, ``conv_in(W z / s + b)`` equals a convolution
    with weights ``conv_in W / s`` of ``z + d``, where ``d = s W^-1 b``: exact at the borders too, where a folded
    bias would not be, because ``conv_in`` pads with zeros after the bias. Returns d, float32 [1, C, 1, 1], to be
    added to the scaled latents.

    Raises:
        HipaError: a ``post_quant_conv`` that cannot be inverted.

    """
    conv_in, scale = vae.decoder.conv_in, vae.config.scaling_factor
    mix_CC, offset_C = torch.eye(conv_in.in_channels), torch.zeros(conv_in.in_channels)
    if vae.config.use_post_quant_conv:
        mix_CC, bias_C = vae.post_quant_conv.weight[:, :, 0, 0], vae.post_quant_conv.bias
        if torch.linalg.cond(mix_CC) > MAX_CONDITION:
            raise HipaError(
                "the VAE's post_quant_conv cannot be inverted, so it cannot be folded. Use --layout generic."
            )
        offset_C = scale * torch.linalg.solve(mix_CC, bias_C)
    conv_in.weight.copy_(torch.einsum("omhw,mi->oihw", conv_in.weight, mix_CC) / scale)
    return offset_C.view(1, -1, 1, 1)

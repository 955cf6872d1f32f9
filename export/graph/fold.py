"""One-step specialisation: at one step the timestep is a constant, so nothing of the time path need remain.

Where a UNet serves several timesteps, a table of their constants remains.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D, ResnetBlockCondNorm2D

from hipa_deploy.errors import HipaError

MAX_CONDITION = 1e5  # of post_quant_conv; float32 has seven digits


class NoTimeEmbedding(torch.nn.Module):
    """Stands where the time embedding was; the ResNet blocks skip what is None."""

    def forward(self, *_: Any) -> None:
        """Return nothing, whatever comes."""


class StepEmbedding(torch.nn.Module):
    """Stands there when the UNet serves several timesteps: hands the index of one, int64 [1], on to every block."""

    def forward(self, step: torch.Tensor, _: Any = None) -> torch.Tensor:
        """The index as it came."""
        return step


class StepBias(torch.nn.Module):
    """Stands where a block projected the time embedding: the block's bias at each of K timesteps, [K, C]."""

    def __init__(self, bias_KC: torch.Tensor) -> None:
        super().__init__()
        self.bias_KC = torch.nn.Parameter(bias_KC, requires_grad=False)

    def forward(self, step: torch.Tensor) -> torch.Tensor:
        """Index int64 [1] -> bias [1, C]."""
        return torch.nn.functional.embedding(step, self.bias_KC)


@torch.no_grad()
def fold_timestep(unet: UNet2DConditionModel, *timesteps: int) -> int:
    """Fold the embedding of the timestep into the bias of each ResNet block's first convolution, in place.

    A block adds its projected embedding to the output of ``conv1``, per channel: the same sum as a bias. With several
    ``timesteps`` the bias is a row of a table, and the UNet takes its index, int64 [1], in place of a timestep.
    Returns the number of blocks folded.

    Raises:
        HipaError: a block that uses the embedding in another way (scale and shift, or in its norms).

    """
    probe = torch.zeros(1, dtype=next(unet.parameters()).dtype)
    embed = torch.nn.Sequential(unet.time_embedding, unet.time_embed_act or torch.nn.Identity())
    embeddings_1D = [embed(unet.get_time_embed(probe, timestep)) for timestep in timesteps]
    if any(isinstance(module, ResnetBlockCondNorm2D) for module in unet.modules()):
        raise HipaError(
            "a time embedding in the norms of its blocks cannot be folded. Use --layout generic."
        )
    blocks = [module for module in unet.modules() if isinstance(module, ResnetBlock2D)]
    for block in blocks:
        if block.time_embedding_norm != "default" or block.time_emb_proj is None:
            raise HipaError(
                f"time embedding '{block.time_embedding_norm}' cannot be folded. Use --layout generic."
            )
        shifts_1C = [
            block.time_emb_proj(block.nonlinearity(embedding_1D)) for embedding_1D in embeddings_1D
        ]
        bias_KC = block.conv1.bias + torch.cat(
            shifts_1C
        )  # one by one: a row is to the bit what it is alone
        if len(timesteps) == 1:
            block.conv1.bias.copy_(bias_KC[0])
            block.time_emb_proj = None
        else:
            block.conv1.bias, block.time_emb_proj, block.skip_time_act = (
                None,
                StepBias(bias_KC),
                True,
            )
    if len(timesteps) == 1:
        unet.time_embedding = NoTimeEmbedding()
    else:
        unet.get_time_embed = lambda sample, timestep: timestep
        unet.time_embedding = StepEmbedding()
    unet.time_embed_act = None
    return len(blocks)


@torch.no_grad()
def fold_encoder_output(vae: AutoencoderKL) -> None:
    """Fold ``quant_conv``'s mean and the latent scaling into the encoder's last convolution, in place.

    Nothing is padded between the two, so it is exact: with W and b the rows of the 1x1 ``quant_conv`` that give the
    mean and s the scaling factor, ``conv_out`` gets weights ``s W conv_out`` and the bias ``s (W bias + b)``. It then
    gives the C channels of the scaled mean, not the 2 C of mean and variance.
    """
    conv_out, scale, channels = (
        vae.encoder.conv_out,
        vae.config.scaling_factor,
        vae.config.latent_channels,
    )
    mix_CM, offset_C = torch.eye(channels, conv_out.out_channels), torch.zeros(channels)
    if vae.config.use_quant_conv:
        mix_CM, offset_C = vae.quant_conv.weight[:channels, :, 0, 0], vae.quant_conv.bias[:channels]
    mix_CM = (
        mix_CM.double()
    )  # rounded once, so that the order of the sums does not show in the weights
    weight = scale * torch.einsum("om,mihw->oihw", mix_CM, conv_out.weight.double())
    bias = scale * (mix_CM @ conv_out.bias.double() + offset_C)
    conv_out.weight, conv_out.bias = (
        torch.nn.Parameter(value.to(conv_out.weight.dtype), requires_grad=False)
        for value in (weight, bias)
    )
    conv_out.out_channels = channels


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

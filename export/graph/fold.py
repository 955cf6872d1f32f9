"""One-step specialisation: at one step the timestep is a constant, so the time path can go.

Where a UNet serves several timesteps, a table of their constants remains.

Suffixes: C channels, D width of the time embedding, K timesteps, M channels before a mix.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.resnet import ResnetBlock2D, ResnetBlockCondNorm2D
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from hipa_deploy.errors import HipaError

MAX_CONDITION = 1e5  # of post_quant_conv's matrix; float32 has seven digits


class NoTimeEmbedding(torch.nn.Module):
    """Replaces the time embedding. It gives None, at which ResNet blocks add nothing."""

    def forward(self, *_: Any) -> None:
        """Return None, whatever the arguments."""


class StepEmbedding(torch.nn.Module):
    """Replaces the time embedding of a UNet that serves several timesteps.

    It hands the index of a timestep, int64 [1], on to every block.
    """

    def forward(self, step: torch.Tensor, _: Any = None) -> torch.Tensor:
        """Return the index as it is."""
        return step


class StepBias(torch.nn.Module):
    """Replaces a block's projection of the time embedding: its bias [K, C] at K timesteps."""

    def __init__(self, bias_KC: torch.Tensor) -> None:
        super().__init__()
        self.bias_KC = torch.nn.Parameter(bias_KC, requires_grad=False)

    def forward(self, step: torch.Tensor) -> torch.Tensor:
        """Index int64 [1] -> bias [1, C]."""
        return torch.nn.functional.embedding(step, self.bias_KC)


@torch.no_grad()
def fold_timestep(unet: UNet2DConditionModel | ControlNetModel, *timesteps: int) -> int:
    """Fold the embedding of the timestep into the bias of each ResNet block's first convolution.

    A block adds its projected embedding to the output of ``conv1``, per channel: the same sum as a
    bias. With several timesteps the bias is a row of a table.

    Args:
        unet: or a ControlNet, in float32; it is changed in place. With several timesteps it takes
            the index of one, int64 [1], in place of a timestep.
        timesteps: one or more, 0 to 999.

    Returns:
        The number of blocks folded.

    Raises:
        HipaError: a block uses the embedding in another way: scale and shift, or in its norms.

    Example:
        >>> fold_timestep(unet, 999)
        22
        >>> unet(noise_BCHW, 999, context_BLD).sample.shape
        torch.Size([1, 4, 64, 64])

    """
    probe = torch.zeros(1, dtype=next(unet.parameters()).dtype)
    # A ControlNet has no activation of its own there, and looks its sinusoids up in ``forward``.
    activation = getattr(unet, "time_embed_act", None) or torch.nn.Identity()
    embed = torch.nn.Sequential(unet.time_embedding, activation)
    embeddings_1D = []
    for timestep in timesteps:
        sinusoids_1D = unet.time_proj(torch.tensor([timestep])).to(probe.dtype)
        embeddings_1D.append(embed(sinusoids_1D))

    if any(isinstance(module, ResnetBlockCondNorm2D) for module in unet.modules()):
        raise HipaError(
            "a time embedding in the norms of its blocks cannot be folded. Use --layout generic."
        )
    blocks = [module for module in unet.modules() if isinstance(module, ResnetBlock2D)]
    for block in blocks:
        _fold_block(block, embeddings_1D)

    # Any, as modules of other classes take the places that diffusers declares. The general form
    # would look up the sinusoids of a timestep first; an index goes through as it is.
    folded: Any = unet
    if len(timesteps) == 1:
        folded.time_embedding = NoTimeEmbedding()
    else:
        folded.get_time_embed = lambda sample, timestep: timestep
        folded.time_embedding = StepEmbedding()
    folded.time_embed_act = None
    return len(blocks)


def _fold_block(block: Any, embeddings_1D: list[torch.Tensor]) -> None:
    """Fold a ``ResnetBlock2D``, in place."""
    if block.time_embedding_norm != "default" or block.time_emb_proj is None:
        raise HipaError(
            f"time embedding '{block.time_embedding_norm}' cannot be folded. Use --layout generic."
        )

    # Projected one by one: a row is then bit for bit what it is when folded alone.
    shifts_1C = []
    for embedding_1D in embeddings_1D:
        shifts_1C.append(block.time_emb_proj(block.nonlinearity(embedding_1D)))
    bias_KC = block.conv1.bias + torch.cat(shifts_1C)

    if len(embeddings_1D) == 1:
        block.conv1.bias.copy_(bias_KC[0])
        block.time_emb_proj = None
    else:
        # The index must reach the table as it is, so the activation before the table goes too.
        block.conv1.bias = None
        block.time_emb_proj = StepBias(bias_KC)
        block.skip_time_act = True


@torch.no_grad()
def fold_encoder_output(vae: AutoencoderKL) -> None:
    """Fold ``quant_conv``'s mean and the latent scaling into the encoder's last convolution.

    Nothing is padded between the two, so it is exact: with W and b the rows of the 1x1
    ``quant_conv`` that give the mean and s the scaling factor, ``conv_out`` gets the weights
    ``s W conv_out`` and the bias ``s (W bias + b)``. It then gives the C channels of the scaled
    mean, not the 2 C of mean and variance.

    Args:
        vae: in float32; its encoder is changed in place.

    """
    conv_out: Any = vae.encoder.conv_out
    scale = vae.config["scaling_factor"]
    channels = vae.config["latent_channels"]
    if vae.config["use_quant_conv"]:
        quant_conv: Any = vae.quant_conv
        mix_CM = quant_conv.weight[:channels, :, 0, 0]
        offset_C = quant_conv.bias[:channels]
    else:
        mix_CM = torch.eye(channels, conv_out.out_channels)
        offset_C = torch.zeros(channels)

    # In float64 and rounded once, so that the order of the sums does not show in the weights.
    mix_CM = mix_CM.double()
    weight = scale * torch.einsum("om,mihw->oihw", mix_CM, conv_out.weight.double())
    bias = scale * (mix_CM @ conv_out.bias.double() + offset_C)
    dtype = conv_out.weight.dtype
    conv_out.weight = torch.nn.Parameter(weight.to(dtype), requires_grad=False)
    conv_out.bias = torch.nn.Parameter(bias.to(dtype), requires_grad=False)
    conv_out.out_channels = channels


@torch.no_grad()
def fold_decoder_input(vae: AutoencoderKL) -> torch.Tensor:
    """Fold latent scaling and ``post_quant_conv`` into the decoder's first convolution.

    With W and b the 1x1 ``post_quant_conv`` and s the scaling factor, ``conv_in(W z / s + b)``
    equals a convolution with weights ``conv_in W / s`` of ``z + d``, where ``d = s W^-1 b``. That
    is exact at the borders too, where a folded bias would not be: ``conv_in`` pads with zeros after
    the bias.

    Args:
        vae: in float32; its decoder is changed in place.

    Returns:
        d, float32 [1, C, 1, 1], to be added to the scaled latents.

    Raises:
        HipaError: the ``post_quant_conv`` cannot be inverted.

    """
    conv_in: Any = vae.decoder.conv_in
    scale = vae.config["scaling_factor"]
    if vae.config["use_post_quant_conv"]:
        post_quant_conv: Any = vae.post_quant_conv
        mix_CC = post_quant_conv.weight[:, :, 0, 0]
        # d needs W's inverse: a badly conditioned W would turn rounding into visible errors.
        if torch.linalg.cond(mix_CC) > MAX_CONDITION:
            raise HipaError(
                "the VAE's post_quant_conv cannot be inverted, so it cannot be folded. "
                "Use --layout generic."
            )
        offset_C = scale * torch.linalg.solve(mix_CC, post_quant_conv.bias)
    else:
        mix_CC = torch.eye(conv_in.in_channels)
        offset_C = torch.zeros(conv_in.in_channels)
    conv_in.weight.copy_(torch.einsum("omhw,mi->oihw", conv_in.weight, mix_CC) / scale)
    return offset_C.view(1, -1, 1, 1)

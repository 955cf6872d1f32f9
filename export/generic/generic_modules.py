"""The stages of layout generic as modules: nothing is folded, and optimum feeds them.

B batch   C latent channels   H, W height and width   L tokens   D text width   P pooled width
"""

from __future__ import annotations

from typing import ClassVar

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection


class GenericUNet(torch.nn.Module):
    """The UNet as optimum names it.

    sample [B, C, h, w], timestep int64 [1], encoder_hidden_states [B, L, D] -> out_sample.
    """

    places: ClassVar = {"unet": "unet"}

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self, sample_BCHW: torch.Tensor, timestep: torch.Tensor, context_BLD: torch.Tensor
    ) -> torch.Tensor:
        """The UNet's own output."""
        return self.unet(sample_BCHW, timestep, context_BLD, return_dict=False)[0]


class GenericPairUNet(torch.nn.Module):
    """The UNet of SDXL as optimum names it.

    The inputs of ``GenericUNet``, text_embeds [B, P] and time_ids [B, 6] -> out_sample.
    """

    places: ClassVar = {"unet": "unet"}

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self,
        sample_BCHW: torch.Tensor,
        timestep: torch.Tensor,
        context_BLD: torch.Tensor,
        pooled_BP: torch.Tensor,
        time_ids_B6: torch.Tensor,
    ) -> torch.Tensor:
        """The UNet's own output."""
        # diffusers joins both in float32. ONNX joins tensors of one type alone.
        added = {"text_embeds": pooled_BP.float(), "time_ids": time_ids_B6}
        return self.unet(
            sample_BCHW, timestep, context_BLD, added_cond_kwargs=added, return_dict=False
        )[0]


class GenericPairEncoder(torch.nn.Module):
    """One of SDXL's two text encoders as optimum names it.

    input_ids int64 [B, L] -> last_hidden_state and the hidden states [B, L, D], all in ``dtype``.
    The second encoder gives text_embeds [B, P] before them.

    optimum counts the hidden states from the last layer back, and takes the last of those that are
    given here as the context. The encoder's own last one is not among them: optimum puts
    last_hidden_state in its place.

    Args:
        part: 'text_encoder' or 'text_encoder_2'.
        encoder: that encoder.
        states: how many hidden states to give, from the embedding of the tokens on.
        dtype: of all outputs.

    """

    def __init__(
        self,
        part: str,
        encoder: CLIPTextModel | CLIPTextModelWithProjection,
        states: int,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.places = {"encoder": part}
        self.encoder = encoder
        self.states = states
        self.dtype = dtype

    def forward(self, tokens_BL: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The encoder's own outputs."""
        made = self.encoder(tokens_BL, output_hidden_states=True)
        outputs = [made.last_hidden_state, *made.hidden_states[: self.states]]
        if isinstance(self.encoder, CLIPTextModelWithProjection):
            outputs.insert(0, made.text_embeds)
        return tuple(output.to(self.dtype) for output in outputs)


class GenericDecoder(torch.nn.Module):
    """latent_sample [B, C, H, W] -> sample [B, 3, H, W] in [-1, 1]."""

    places: ClassVar = {"vae": "vae"}

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents_BCHW: torch.Tensor) -> torch.Tensor:
        """The decoder's own output."""
        return self.vae.decode(latents_BCHW, return_dict=False)[0]

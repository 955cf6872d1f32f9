"""A discriminator on noised latents: could these latents, under this noise, be the teacher's?

The student's and the teacher's latents are noised to one random timestep. The frozen UNet's encoder
and middle block see them, and small heads judge their features, place by place. Under much noise
the heads judge the layout, under little noise the detail. From:

- Sauer et al. 2024, 'Fast High-Resolution Image Synthesis with Latent Adversarial Diffusion
  Distillation' (LADD), arXiv 2403.12015: features of the frozen diffusion model at random
  timesteps, without decoding.
- Chen et al. 2024, 'NitroFusion', arXiv 2412.02030: the encoder and the middle block are enough.
- Sauer et al. 2023, 'Adversarial Diffusion Distillation', arXiv 2311.17042, equation 4: the penalty
  on the gradient of a head at its input (R1), on true latents.

Shape suffixes: B rows of a batch, L tokens, D width of the text context, C latent channels, H W
latent size, or the size of a feature map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hipa_deploy.train.losses.discriminator import Heads
from hipa_deploy.train.model.conditions import Conditions


class LatentDiscriminator(Heads):
    """One head for each map of ``encoder_maps``.

    Args:
        channels: Channels of each map.
        loss: hinge, or softplus (Goodfellow et al. 2014, the non-saturating loss).
        r1: Weight of the penalty on the gradient of each head at its input.
        seed: As for ``Heads``.

    """

    def __init__(
        self,
        channels: Sequence[int],
        loss: Literal["hinge", "softplus"] = "hinge",
        r1: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(channels, seed)
        self.loss = loss
        self.r1 = r1

    def own_loss(self, maps: Sequence[Tensor], target_maps: Sequence[Tensor]) -> Tensor:
        """L_D and its penalty, a scalar with a gradient for the heads alone.

        Args:
            maps: Of the student's latents.
            target_maps: Of true ones.

        """
        if self.loss == "hinge":
            total = self.hinge_loss(maps, target_maps)
        else:
            judged = self([features.detach() for features in maps])
            judged_targets = self([features.detach() for features in target_maps])
            losses = []
            for judgement, target_judgement in zip(judged, judged_targets, strict=True):
                losses.append(F.softplus(-target_judgement).mean() + F.softplus(judgement).mean())
            total = torch.stack(losses).mean()
        if self.r1:
            total = total + self.r1 * self.penalty(target_maps)
        return total

    def student_loss(self, maps: Sequence[Tensor]) -> Tensor:
        """L_G, a scalar with a gradient for the maps alone."""
        if self.loss == "hinge":
            return self.generator_loss(maps)
        judged = self.fixed(maps)
        return torch.stack([F.softplus(-judgement).mean() for judgement in judged]).mean()

    def penalty(self, target_maps: Sequence[Tensor]) -> Tensor:
        """Mean over heads and rows of |d judgement / d map|^2, a scalar.

        The judgement of a row is the mean over its places.
        """
        penalties = []
        for head, features in zip(self.heads, target_maps, strict=True):
            inputs = features.detach().requires_grad_(True)
            # A view, because torch's counter of operations cannot follow a leaf into a module.
            judgement_B = head(inputs.view_as(inputs)).mean(dim=(1, 2, 3))
            (gradient,) = torch.autograd.grad(judgement_B.sum(), inputs, create_graph=True)
            penalties.append(gradient.square().sum(dim=(1, 2, 3)).mean())
        return torch.stack(penalties).mean()


def encoder_maps(
    unet: Any, z_BCHW: Tensor, timestep_B: Tensor, conditions: Conditions
) -> list[Tensor]:
    """The features of a UNet's encoder and middle block, the decoder being left out.

    Args:
        unet: A UNet2DConditionModel of Stable Diffusion 1.x, 2.x or SDXL.
        z_BCHW: Noised latents.
        timestep_B: Their timesteps.
        conditions: Of the rows.

    Returns:
        The output of each level before it is halved, and that of the middle block, [B, C, H, W]
        each.

    """
    embedding = unet.time_embedding(unet.get_time_embed(sample=z_BCHW, timestep=timestep_B))
    added = unet.get_aug_embed(
        emb=embedding,
        encoder_hidden_states=conditions.context_BLD,
        added_cond_kwargs=conditions.added.get("added_cond_kwargs", {}),
    )
    if added is not None:
        embedding = embedding + added
    hidden = unet.conv_in(z_BCHW)
    maps = []
    for block in unet.down_blocks:
        attention = {}
        if getattr(block, "has_cross_attention", False):
            attention["encoder_hidden_states"] = conditions.context_BLD
        hidden, outputs = block(hidden_states=hidden, temb=embedding, **attention)
        # The outputs of a block are those of its layers, then that of its halving.
        maps.append(outputs[len(block.resnets) - 1])
    # The middle block of SSD-1B and Segmind-Vega is one ResNet block.
    attention = {}
    if getattr(unet.mid_block, "has_cross_attention", False):
        attention["encoder_hidden_states"] = conditions.context_BLD
    maps.append(unet.mid_block(hidden, embedding, **attention))
    return maps


def map_channels(unet: Any) -> list[int]:
    """Channels of each map of ``encoder_maps``."""
    widths = list(unet.config.block_out_channels)
    return [*widths, widths[-1]]

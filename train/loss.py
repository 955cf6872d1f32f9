"""The HiPA adaptation loss: spatial perceptual loss + high-frequency promoted loss (arXiv 2311.18158).

    L = perceptual_weight DISTS + hf_weight (L_Fourier + L_edge) + latent_weight MSE(latents)

The last term is ours: alone it is a cheap warm start (no decoding), added to the others it keeps colours in place.
The paper's weights are not public. A tiny decoder learns the image terms, with L1 of the pixels in place of latents.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from hipa_deploy.train.frequency import RADIUS, amplitude_loss, edge_loss, fourier_loss
from hipa_deploy.train.perceptual import DistsLike
from hipa_deploy.train.recipe import DecoderLossSettings, LossSettings

Terms = dict[str, Tensor]  # unweighted scalar of each term, by name


class HipaLoss(nn.Module):
    """Images are float [B, 3, H, W], [0, 1] where valid (the student may overshoot); latents [B, C, h, w], scaled."""

    def __init__(
        self,
        perceptual: nn.Module | None = None,
        *,
        perceptual_weight: float = 1.0,
        hf_weight: float = 1.0,
        latent_weight: float = 0.05,
        pixel_weight: float = 0.0,
        amplitude_weight: float = 0.0,
        radius: float = RADIUS,
    ) -> None:
        super().__init__()
        self.perceptual = perceptual or DistsLike()
        self.perceptual_weight, self.hf_weight, self.latent_weight = perceptual_weight, hf_weight, latent_weight
        self.pixel_weight, self.amplitude_weight = pixel_weight, amplitude_weight
        self.radius = radius

    def forward(self, image: Tensor, target: Tensor, latents: Tensor, target_latents: Tensor) -> tuple[Tensor, Terms]:
        """The weighted total and its unweighted terms, all scalars."""
        total, terms = self.of_images(image, target)
        terms["latent"] = F.mse_loss(latents, target_latents)
        return total + self.latent_weight * terms["latent"], terms

    def of_images(self, image: Tensor, target: Tensor) -> tuple[Tensor, Terms]:
        """The terms that need no latents: the weighted total and its unweighted terms, all scalars."""
        terms = {
            "perceptual": self.perceptual(image, target).mean(),
            "fourier": fourier_loss(image, target, self.radius),
            "edge": edge_loss(image, target),
        }
        total = self.perceptual_weight * terms["perceptual"] + self.hf_weight * (terms["fourier"] + terms["edge"])
        if self.amplitude_weight:
            terms["amplitude"] = amplitude_loss(image, target, self.radius)
            total = total + self.amplitude_weight * terms["amplitude"]
        if self.pixel_weight:
            terms["pixel"] = F.l1_loss(image, target)
            total = total + self.pixel_weight * terms["pixel"]
        return total, terms

    def latent_only(self, latents: Tensor, target_latents: Tensor) -> tuple[Tensor, Terms]:
        """The warm start's loss: latent mean squared error, no decoded image needed."""
        error = F.mse_loss(latents, target_latents)
        return error, {"latent": error}


def hipa_loss(settings: LossSettings | DecoderLossSettings) -> HipaLoss:
    """The loss a recipe describes, on EfficientNet-Lite0 features."""
    weights = settings.model_dump(exclude={"perceptual_size", "latent_warmup_steps"})
    return HipaLoss(DistsLike(size=settings.perceptual_size), **weights)

"""The HiPA adaptation loss: spatial perceptual loss + high-frequency promoted loss (arXiv 2311.18158).

    L = perceptual_weight D + hf_weight (fourier_weight L_F + edge_weight L_E)      of decoded images
        + amplitude_weight L_A + pixel_weight L_pixel + adversarial_weight L_G      of decoded images, ours
        + latent_weight L_latent + latent_hf_weight (L_F + L_E of latents)          of latents, ours

D is in perceptual.py or lpips.py, L_F and L_A in frequency.py, L_E in edge.py, L_G in discriminator.py, whose own loss
for its own weights comes on top; balance.py can scale the image's terms.

The latent error alone is a cheap warm start (no decoding), beside the others it keeps colours in place. The paper's
weights are not public. A tiny decoder learns the image terms.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hipa_deploy.errors import HipaError
from hipa_deploy.train.losses.discriminator import Discriminator
from hipa_deploy.train.losses.dists import perceptual_distance
from hipa_deploy.train.losses.edge import edge_loss, edge_similarity_loss
from hipa_deploy.train.losses.frequency import amplitude_loss, fourier_loss, fourier_similarity_loss
from hipa_deploy.train.losses.gradient_balance import GradientBalance
from hipa_deploy.train.recipes.recipe import DecoderLossSettings, LossSettings

Terms = dict[str, Tensor]  # unweighted scalar of each term, by name
Term = Callable[[Tensor, Tensor], Tensor]
HUBER = 0.03  # c of the pseudo-Huber loss, in scaled latents: square below, absolute above


class HipaLoss(nn.Module):
    """Images are float [B, 3, H, W], [0, 1] where valid (the student may overshoot); latents [B, C, h, w], scaled.

    Terms without weight are not computed. ``perceptual`` takes the place of the distance that the settings name.
    """

    def __init__(
        self, settings: LossSettings | DecoderLossSettings, perceptual: nn.Module | None = None
    ) -> None:
        super().__init__()
        s = settings
        self.weights = {name: weight for name, weight in image_weights(s).items() if weight}
        if "perceptual" in self.weights:
            self.perceptual = perceptual or perceptual_distance(
                s.perceptual, s.backbone, s.perceptual_size
            )
        self.discriminator = (
            Discriminator(self.perceptual.maps) if "adversarial" in self.weights else None
        )
        self.image_terms: dict[str, Term] = {
            **_high_frequency_terms(s),
            "amplitude": partial(amplitude_loss, radius=s.radius),
            "pixel": F.mse_loss if s.pixel == "mse" else F.l1_loss,
        }
        self.balance = (
            GradientBalance(len(self.weights), s.balance_every) if s.balance == "gradient" else None
        )
        self.latent_weight, self.latent_hf_weight = 0.0, 0.0
        self.latent_error: Term = F.mse_loss
        if isinstance(s, LossSettings):
            self.latent_weight, self.latent_hf_weight = s.latent_weight, s.latent_hf_weight
            self.latent_error = pseudo_huber if s.latent == "huber" else F.mse_loss
        self.latent_hf: Term = lambda x, y: (
            fourier_loss(x, y, s.radius, s.fourier_focal) + edge_loss(x, y, s.edge)
        )

    @property
    def decodes(self) -> bool:
        """Whether any term needs the decoded image."""
        return bool(self.weights)

    @property
    def state(self) -> dict[str, nn.Parameter]:
        """What a checkpoint must keep beside the weights, so that a resumed run takes the same steps."""
        balance = {} if self.balance is None else {"loss.balance": self.balance.state}
        return balance | {f"loss.{name}": weight for name, weight in self.trained.items()}

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The loss's own weights that train beside the student's."""
        return {
            name: weight
            for name, weight in self.named_parameters()
            if name.startswith("discriminator.")
        }

    def forward(
        self, image: Tensor, target: Tensor, latents: Tensor, target_latents: Tensor
    ) -> tuple[Tensor, Terms]:
        """The weighted total and its unweighted terms, all scalars."""
        total, terms = self.of_images(image, target)
        latent_total, latent_terms = self.of_latents(latents, target_latents)
        return total + latent_total, terms | latent_terms

    def of_images(self, image: Tensor, target: Tensor) -> tuple[Tensor, Terms]:
        """The terms that need no latents: the weighted total and its unweighted terms, all scalars."""
        terms = {
            name: term(image, target)
            for name, term in self.image_terms.items()
            if name in self.weights
        }
        own: Terms = {}
        if "perceptual" in self.weights:
            maps, target_maps = self.perceptual.maps(image), self.perceptual.maps(target)
            terms = {"perceptual": self.perceptual.between(maps, target_maps).mean(), **terms}
            if self.discriminator is not None:
                terms["adversarial"] = self.discriminator.adversarial(maps)
                own["discriminator"] = self.discriminator.loss(maps, target_maps)
        if not terms:
            return image.new_zeros(()), terms
        weights = image.new_tensor([self.weights[name] for name in terms])
        if self.balance is not None:
            weights = weights * self.balance(list(terms.values()), image)
        return (weights * torch.stack(list(terms.values()))).sum() + sum(own.values()), terms | own

    def of_latents(self, latents: Tensor, target_latents: Tensor) -> tuple[Tensor, Terms]:
        """The terms that need no decoded image: the weighted total and its unweighted terms, all scalars."""
        terms = {"latent": self.latent_error(latents, target_latents)}
        total = self.latent_weight * terms["latent"]
        if self.latent_hf_weight:
            terms["latent_hf"] = self.latent_hf(latents, target_latents)
            total = total + self.latent_hf_weight * terms["latent_hf"]
        return total, terms

    def latent_only(self, latents: Tensor, target_latents: Tensor) -> tuple[Tensor, Terms]:
        """The warm start's loss, whatever the weights: the latent error alone, no decoded image needed."""
        error = self.latent_error(latents, target_latents)
        return error, {"latent": error}


def _high_frequency_terms(s: LossSettings | DecoderLossSettings) -> dict[str, Term]:
    if s.high_frequency == "similarity":
        fourier: Term = partial(fourier_similarity_loss, radius=s.radius)
        return {"fourier": fourier, "edge": partial(edge_similarity_loss, operator=s.edge)}
    fourier = partial(fourier_loss, radius=s.radius, focal=s.fourier_focal)
    return {"fourier": fourier, "edge": partial(edge_loss, operator=s.edge)}


def image_weights(settings: LossSettings | DecoderLossSettings) -> dict[str, float]:
    """Weight of each image term, in the order in which they are reported and balanced."""
    s = settings
    return {
        "perceptual": 0.0 if s.perceptual == "none" else s.perceptual_weight,
        "fourier": s.hf_weight * s.fourier_weight,
        "edge": s.hf_weight * s.edge_weight,
        "amplitude": s.amplitude_weight,
        "pixel": s.pixel_weight,
        "adversarial": s.adversarial_weight,
    }


def pseudo_huber(x: Tensor, y: Tensor, c: float = HUBER) -> Tensor:
    """mean sqrt((x - y)^2 + c^2) - c, a scalar (Song & Dhariwal 2023, 'Improved Techniques …', eq. 8)."""
    return (((x - y).square() + c**2).sqrt() - c).mean()


def hipa_loss(settings: LossSettings | DecoderLossSettings) -> HipaLoss:
    """The loss that a recipe describes.

    Raises:
        HipaError: no term has a weight, or what the perceptual distance needs is not installed.

    """
    loss = HipaLoss(settings)
    if not (loss.decodes or loss.latent_weight or loss.latent_hf_weight):
        raise HipaError("recipe: every weight of its loss is 0. Expected at least one above 0.")
    return loss

"""The HiPA adaptation loss: a spatial perceptual loss and a high-frequency promoted loss.

    L = perceptual_weight D + hf_weight (fourier_weight L_F + edge_weight L_E)       (images)
        + amplitude_weight L_A + pixel_weight L_pixel + adversarial_weight L_G       (images, ours)
        + custom_weight L_custom                                                     (images, yours)
        + latent_weight L_latent + latent_hf_weight (L_F + L_E of latents)           (latents, ours)

The two losses of the first line are the paper's (arXiv 2311.18158). Its equations and weights are
not public: docs/explanation/hipa.md lists what is published and what this project chose.

    D           dists.py or lpips.py
    L_F, L_A    frequency.py
    L_E         edge.py
    L_custom    custom_loss.py
    L_G         discriminator.py, whose loss for its own weights, L_D, is added with weight 1

A recipe can have gradient_balance.py scale the image terms.
The latent error alone is a cheap warm start, since nothing is decoded; beside the other terms it
keeps colours in place. A tiny decoder (train_decoder.py) learns the image terms.

Images are float [B, 3, H, W], in [0, 1] but for the student's overshoot; latents are [B, C, h, w],
scaled as the VAE's are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hipa_deploy.errors import HipaError
from hipa_deploy.train.losses.custom_loss import load_custom_loss
from hipa_deploy.train.losses.discriminator import Discriminator
from hipa_deploy.train.losses.dists import DistsLike, perceptual_distance
from hipa_deploy.train.losses.edge import edge_loss, edge_similarity_loss
from hipa_deploy.train.losses.frequency import amplitude_loss, fourier_loss, fourier_similarity_loss
from hipa_deploy.train.losses.gradient_balance import GradientBalance
from hipa_deploy.train.losses.lpips import LpipsLike
from hipa_deploy.train.recipes.loss_settings import DecoderLossSettings, LossSettings

Terms = dict[str, Tensor]  # unweighted scalar of each term, by name
Term = Callable[[Tensor, Tensor], Tensor]  # (image, target) -> scalar
HUBER_C = 0.03  # c of the pseudo-Huber loss, in scaled latents: square below, absolute above


class HipaLoss(nn.Module):
    """The loss as a module; terms without weight are not computed.

    Args:
        settings: Weights and forms of the terms. DecoderLossSettings have no latent terms.
        perceptual: Takes the place of the perceptual distance that the settings name.

    Example:
        >>> loss = HipaLoss(LossSettings())
        >>> images = torch.rand(2, 1, 3, 64, 64)  # the student's and its target
        >>> latents = torch.rand(2, 1, 4, 8, 8)
        >>> total, terms = loss(images[0], images[1], latents[0], latents[1])
        >>> list(terms)
        ['perceptual', 'fourier', 'edge', 'latent']

    """

    def __init__(
        self,
        settings: LossSettings | DecoderLossSettings,
        perceptual: DistsLike | LpipsLike | None = None,
    ) -> None:
        super().__init__()
        self.settings = settings
        weights = image_weights(settings)
        self.weights = {name: weight for name, weight in weights.items() if weight}

        # The parts that hold networks or state are made only where they have a weight: loading a
        # backbone takes seconds, and may need a package that is not installed.
        if "perceptual" in self.weights:
            self.perceptual = perceptual or perceptual_distance(
                settings.perceptual, settings.backbone, settings.perceptual_size
            )
        self.discriminator: Discriminator | None = None
        if "adversarial" in self.weights:
            self.discriminator = Discriminator(self.perceptual.maps)
        self.balance: GradientBalance | None = None
        if settings.balance == "gradient":
            self.balance = GradientBalance(len(self.weights), settings.balance_every)

        # The terms of two images.
        self.image_terms: dict[str, Term] = {
            **_high_frequency_terms(settings),
            "amplitude": partial(amplitude_loss, radius=settings.radius),
            "pixel": F.mse_loss if settings.pixel == "mse" else F.l1_loss,
        }

        # A user's own; it has no weights that train.
        if "custom" in self.weights:
            assert settings.custom is not None
            with torch.device("cpu"):  # whichever is the default; it moves with the other terms
                self.custom = load_custom_loss(settings.custom)
            self.image_terms["custom"] = self.custom

        # The terms of two latents, which a decoder's loss does not have.
        self.latent_weight = 0.0
        self.latent_hf_weight = 0.0
        self.latent_error: Term = F.mse_loss
        if isinstance(settings, LossSettings):
            self.latent_weight = settings.latent_weight
            self.latent_hf_weight = settings.latent_hf_weight
            if settings.latent == "huber":
                self.latent_error = pseudo_huber

    @property
    def needs_images(self) -> bool:
        """Whether any term needs the decoded image."""
        return bool(self.weights)

    @property
    def state(self) -> dict[str, nn.Parameter]:
        """What a checkpoint must store, so that a resumed run takes the same steps."""
        state = {}
        if self.balance is not None:
            state["loss.balance"] = self.balance.state
        for name, weight in self.trained_parameters.items():
            state[f"loss.{name}"] = weight
        return state

    @property
    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """The loss's own weights that train beside the student's: the discriminator's."""
        if self.discriminator is None:
            return {}
        parameters = self.discriminator.named_parameters(prefix="discriminator")
        return dict(parameters)

    def forward(
        self, image: Tensor, target: Tensor, latents: Tensor, target_latents: Tensor
    ) -> tuple[Tensor, Terms]:
        """The weighted total and its unweighted terms, all scalars.

        Args:
            image: The student's, decoded from ``latents``.
            target: The teacher's.
            latents: The student's.
            target_latents: The teacher's.

        """
        total, terms = self.image_loss(image, target)
        latent_total, latent_terms = self.latent_loss(latents, target_latents)
        return total + latent_total, terms | latent_terms

    def image_loss(self, image: Tensor, target: Tensor) -> tuple[Tensor, Terms]:
        """The terms of decoded images: the weighted total and its unweighted terms, all scalars."""
        terms: Terms = {}
        for name, term in self.image_terms.items():
            if name in self.weights:
                terms[name] = term(image, target)

        # The perceptual maps are computed once, for the distance and for the discriminator. The
        # distance is reported first: it is the term that the others are balanced against.
        discriminator_loss = None
        if "perceptual" in self.weights:
            maps = self.perceptual.maps(image)
            target_maps = self.perceptual.maps(target)
            terms = {"perceptual": self.perceptual.distance(maps, target_maps).mean(), **terms}
            if self.discriminator is not None:
                terms["adversarial"] = self.discriminator.generator_loss(maps)
                discriminator_loss = self.discriminator.hinge_loss(maps, target_maps)
        if not terms:
            return image.new_zeros(()), terms

        weights = image.new_tensor([self.weights[name] for name in terms])
        if self.balance is not None:
            weights = weights * self.balance(list(terms.values()), image)
        total = (weights * torch.stack(list(terms.values()))).sum()

        # Neither weighted nor balanced: it has a gradient for the discriminator's weights alone.
        if discriminator_loss is not None:
            total = total + discriminator_loss
            terms["discriminator"] = discriminator_loss
        return total, terms

    def latent_loss(self, latents: Tensor, target_latents: Tensor) -> tuple[Tensor, Terms]:
        """The terms of latents: the weighted total and its unweighted terms, all scalars."""
        terms = {"latent": self.latent_error(latents, target_latents)}
        total = self.latent_weight * terms["latent"]
        if self.latent_hf_weight:
            # With the settings of the image's terms, but always as differences.
            settings = self.settings
            fourier = fourier_loss(latents, target_latents, settings.radius, settings.fourier_focal)
            terms["latent_hf"] = fourier + edge_loss(latents, target_latents, settings.edge)
            total = total + self.latent_hf_weight * terms["latent_hf"]
        return total, terms

    def warmup_loss(self, latents: Tensor, target_latents: Tensor) -> tuple[Tensor, Terms]:
        """The warm start's loss, whatever the weights: the latent error alone."""
        error = self.latent_error(latents, target_latents)
        return error, {"latent": error}


def _high_frequency_terms(settings: LossSettings | DecoderLossSettings) -> dict[str, Term]:
    """L_F and L_E, as differences or as similarities."""
    if settings.high_frequency == "similarity":
        return {
            "fourier": partial(fourier_similarity_loss, radius=settings.radius),
            "edge": partial(edge_similarity_loss, operator=settings.edge),
        }
    return {
        "fourier": partial(fourier_loss, radius=settings.radius, focal=settings.fourier_focal),
        "edge": partial(edge_loss, operator=settings.edge),
    }


def image_weights(settings: LossSettings | DecoderLossSettings) -> dict[str, float]:
    """Weight of each image term, in the order in which they are reported and balanced."""
    return {
        "perceptual": 0.0 if settings.perceptual == "none" else settings.perceptual_weight,
        "fourier": settings.hf_weight * settings.fourier_weight,
        "edge": settings.hf_weight * settings.edge_weight,
        "amplitude": settings.amplitude_weight,
        "pixel": settings.pixel_weight,
        "adversarial": settings.adversarial_weight,
        "custom": settings.custom_weight if settings.custom else 0.0,
    }


def pseudo_huber(x: Tensor, y: Tensor, c: float = HUBER_C) -> Tensor:
    """mean sqrt((x - y)^2 + c^2) - c, a scalar.

    Song & Dhariwal 2023, 'Improved Techniques for Training Consistency Models', equation 8.
    """
    return (((x - y).square() + c**2).sqrt() - c).mean()


def hipa_loss(settings: LossSettings | DecoderLossSettings, *, alone: bool = True) -> HipaLoss:
    """The loss that a recipe describes.

    Args:
        settings: Weights and forms of the terms.
        alone: Whether the recipe has no other terms, so that one of these must have a weight.

    Raises:
        HipaError: no term has a weight, or what the perceptual distance needs is not installed.

    """
    loss = HipaLoss(settings)
    if alone and not (loss.needs_images or loss.latent_weight or loss.latent_hf_weight):
        raise HipaError("recipe: every weight of its loss is 0. Expected at least one above 0.")
    return loss

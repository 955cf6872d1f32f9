from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from hipa_deploy.errors import HipaError
from hipa_deploy.train.losses.dists import DistsLike
from hipa_deploy.train.losses.edge import edge_loss, edge_similarity_loss
from hipa_deploy.train.losses.frequency import amplitude_loss, fourier_loss, fourier_similarity_loss
from hipa_deploy.train.losses.hipa_loss import HUBER_C, HipaLoss, hipa_loss, pseudo_huber
from hipa_deploy.train.recipes.loss_settings import DecoderLossSettings, LossSettings


@pytest.fixture
def images() -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    return tuple(torch.rand(2, 1, 3, 32, 32))


@pytest.fixture
def latents() -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1)
    return tuple(torch.rand(2, 1, 4, 8, 8))


def coarse(image: torch.Tensor) -> list[torch.Tensor]:
    return [F.pixel_unshuffle(image, 4)]


def plain(**settings: Any) -> HipaLoss:
    """A loss whose perceptual distance is DISTS of the image itself, without features."""
    return HipaLoss(LossSettings(**settings), DistsLike(lambda image: []))


def test_is_the_weighted_sum_of_its_terms(images, latents) -> None:
    loss = plain(
        perceptual_weight=2, hf_weight=3, fourier_weight=0.5, edge_weight=4, latent_weight=5
    )
    total, terms = loss(*images, *latents)
    assert terms.keys() == {"perceptual", "fourier", "edge", "latent"}
    expected = (
        2 * terms["perceptual"]
        + 3 * (0.5 * terms["fourier"] + 4 * terms["edge"])
        + 5 * terms["latent"]
    )
    assert torch.allclose(total, expected)
    warmup, terms = loss.warmup_loss(*latents)
    assert warmup == terms["latent"] == F.mse_loss(*latents)


def test_every_setting_reaches_its_term(images, latents) -> None:
    settings = {
        "fourier_focal": 1.0,
        "radius": 0.4,
        "edge": "laplacian",
        "pixel": "mse",
        "latent": "huber",
    }
    loss = plain(
        amplitude_weight=7, pixel_weight=11, latent_weight=2, latent_hf_weight=13, **settings
    )
    total, terms = loss(*images, *latents)
    hf = fourier_loss(*latents, 0.4, 1.0) + edge_loss(*latents, "laplacian")
    assert terms["fourier"] == fourier_loss(*images, 0.4, 1.0)
    assert terms["edge"] == edge_loss(*images, "laplacian")
    assert terms["amplitude"] == amplitude_loss(*images, 0.4)
    assert terms["pixel"] == F.mse_loss(*images)
    assert terms["latent"] == pseudo_huber(*latents)
    assert terms["latent_hf"] == hf
    expected = terms["perceptual"] + terms["fourier"] + terms["edge"]
    expected += 7 * terms["amplitude"] + 11 * terms["pixel"] + 2 * terms["latent"] + 13 * hf
    assert torch.allclose(total, expected)


def test_similarity_takes_the_place_of_both_differences(images, latents) -> None:
    loss = plain(high_frequency="similarity", radius=0.4, edge="laplacian")
    _, terms = loss(*images, *latents)
    assert terms["fourier"] == fourier_similarity_loss(*images, 0.4)
    assert terms["edge"] == edge_similarity_loss(*images, "laplacian")


def test_terms_without_weight_are_not_computed(images, latents) -> None:
    loss = HipaLoss(LossSettings(perceptual="none", fourier_weight=0, latent_weight=0))
    _, terms = loss(*images, *latents)
    assert terms.keys() == {"edge", "latent"}
    latent_terms = hipa_loss(LossSettings(perceptual_weight=0, hf_weight=0))
    assert not latent_terms.needs_images
    assert latent_terms.latent_loss(*latents)[0] == 0.05 * F.mse_loss(*latents)
    assert latent_terms(*images, *latents)[0] == 0.05 * F.mse_loss(*latents)
    assert not hasattr(latent_terms, "perceptual")


def test_a_discriminator_judges_the_perceptual_maps(images, latents) -> None:
    loss = HipaLoss(LossSettings(adversarial_weight=5, hf_weight=0), DistsLike(coarse))
    total, terms = loss(*images, *latents)
    maps = [images[0], *coarse(images[0])]
    target_maps = [images[1], *coarse(images[1])]
    assert terms["adversarial"] == loss.discriminator.generator_loss(maps)
    assert terms["discriminator"] == loss.discriminator.hinge_loss(maps, target_maps)
    expected = (
        terms["perceptual"]
        + 5 * terms["adversarial"]
        + terms["discriminator"]
        + 0.05 * terms["latent"]
    )
    assert torch.allclose(total, expected)
    names = [f"discriminator.{name}" for name, _ in loss.discriminator.named_parameters()]
    assert list(loss.trained_parameters) == names
    assert list(loss.state) == [f"loss.{name}" for name in names]
    assert plain().trained_parameters == plain().state == {}


def test_a_decoders_loss_has_no_latents(images) -> None:
    loss = HipaLoss(DecoderLossSettings(perceptual="none", hf_weight=0))
    total, terms = loss.image_loss(*images)
    assert total == terms["pixel"] == F.l1_loss(*images)


@pytest.mark.parametrize(
    "settings",
    [
        LossSettings(perceptual="none", hf_weight=0, latent_weight=0),
        DecoderLossSettings(perceptual_weight=0, hf_weight=0, pixel_weight=0),
    ],
)
def test_a_loss_without_weights_is_refused(settings) -> None:
    with pytest.raises(HipaError, match="every weight of its loss is 0"):
        hipa_loss(settings)


def test_pseudo_huber_is_square_below_and_absolute_above() -> None:
    zero = torch.zeros(1).double()
    assert pseudo_huber(zero + 1e-4, zero) == pytest.approx(1e-8 / (2 * HUBER_C), rel=1e-3)
    assert pseudo_huber(zero + 100, zero) == pytest.approx(100 - HUBER_C, rel=1e-5)
    assert torch.autograd.gradcheck(lambda x: pseudo_huber(x, zero), zero.clone().requires_grad_())


def test_balanced_terms_pull_as_their_weights_say(images) -> None:
    image = images[0].requires_grad_()
    target = images[1]
    loss = plain(
        balance="gradient",
        perceptual_weight=2,
        hf_weight=3,
        edge_weight=0.5,
        pixel_weight=0.25,
        latent_weight=0,
    )
    total, terms = loss.image_loss(image, target)
    (perceptual,) = torch.autograd.grad(terms["perceptual"], image, retain_graph=True)
    expected = torch.zeros_like(image)
    for name, weight in {"perceptual": 2, "fourier": 3, "edge": 1.5, "pixel": 0.25}.items():
        (gradient,) = torch.autograd.grad(terms[name], image, retain_graph=True)
        expected += weight * perceptual.norm() * gradient / gradient.norm()
    (got,) = torch.autograd.grad(total, image)
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-7)
    assert loss.state.keys() == {"loss.balance"}
    assert plain().state == {}

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hipa_deploy.errors import HipaError
from hipa_deploy.train.losses.discriminator import Discriminator
from tests.weights import differences


def backbone(image_BCHW: Tensor) -> list[Tensor]:
    """The image itself, which is too fine to be judged, and two coarse maps of its pixels."""
    return [
        image_BCHW,
        nn.functional.pixel_unshuffle(image_BCHW, 4),
        nn.functional.pixel_unshuffle(image_BCHW, 8),
    ]


@pytest.fixture
def discriminator() -> Discriminator:
    return Discriminator(backbone)


@pytest.fixture
def images() -> tuple[Tensor, Tensor]:
    """A flat image and a noisy one."""
    torch.manual_seed(0)
    return torch.full((2, 3, 16, 16), 0.5), torch.rand(2, 3, 16, 16)


def test_judges_every_place_of_coarse_maps(discriminator: Discriminator, images) -> None:
    shapes = [judged.shape for judged in discriminator(backbone(images[0]))]
    assert shapes == [(2, 1, 4, 4), (2, 1, 2, 2)]


def test_undecided_heads_have_the_closed_form(discriminator: Discriminator, images) -> None:
    for head in discriminator.heads:
        nn.init.zeros_(head[-1].weight)
        nn.init.constant_(head[-1].bias, 0.25)
    maps = backbone(images[0])
    target_maps = backbone(images[1])
    got = discriminator.hinge_loss(maps, target_maps).item()
    assert got == pytest.approx((1 - 0.25) + (1 + 0.25))
    assert discriminator.generator_loss(maps).item() == pytest.approx(-0.25)


def test_each_loss_has_a_gradient_for_its_own_side_alone(
    discriminator: Discriminator, images
) -> None:
    image = images[0].requires_grad_()
    discriminator.generator_loss(backbone(image)).backward()
    assert image.grad.abs().sum() > 0
    assert all(weight.grad is None for weight in discriminator.parameters())
    image.grad = None
    discriminator.hinge_loss(backbone(image), backbone(images[1])).backward()
    assert image.grad is None
    assert all(weight.grad is not None for weight in discriminator.parameters())


def test_an_image_follows_the_heads_to_the_target(discriminator: Discriminator, images) -> None:
    """A flat image becomes as rough as the target, although no pixel is compared with it."""
    target = images[1]
    image = images[0].clone().requires_grad_()
    optimizers = [
        torch.optim.Adam(discriminator.parameters(), 1e-2),
        torch.optim.Adam([image], 1e-2),
    ]
    for _ in range(60):
        heads_loss = discriminator.hinge_loss(backbone(image), backbone(target))
        loss = heads_loss + discriminator.generator_loss(backbone(image))
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    assert image.std() > 0.5 * target.std()


def test_heads_depend_on_the_seed_alone(discriminator: Discriminator) -> None:
    before = torch.random.get_rng_state()
    again = Discriminator(backbone)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not differences(again.state_dict(), discriminator.state_dict())
    other = Discriminator(backbone, seed=1)
    assert differences(other.state_dict(), discriminator.state_dict())


def test_a_backbone_of_fine_maps_alone_is_refused() -> None:
    with pytest.raises(HipaError, match="no map at a quarter of the image's size"):
        Discriminator(lambda image: [image])

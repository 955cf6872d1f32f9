"""The discriminator on noised latents: its features, its losses and where their gradients go."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hipa_deploy.train.distribution.latent_discriminator import (
    LatentDiscriminator,
    encoder_maps,
    map_channels,
)
from hipa_deploy.train.model.diffusion_model import DiffusionModel


def some_maps(seed: int, *, gradient: bool = False) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    maps = [
        torch.randn(3, 16, 4, 4, generator=generator),
        torch.randn(3, 32, 2, 2, generator=generator),
    ]
    return [features.requires_grad_(gradient) for features in maps]


def test_the_features_are_those_of_the_unets_own_forward_pass(model: DiffusionModel) -> None:
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str):
        def hook(module: nn.Module, args: object, output: object) -> None:
            # A block of the encoder returns its output and those of its layers.
            seen[name] = output[1] if isinstance(output, tuple) else output

        return hook

    for number, block in enumerate(model.unet.down_blocks):
        block.register_forward_hook(keep(str(number)))
    model.unet.mid_block.register_forward_hook(keep("mid"))
    z = torch.randn(2, *model.latent_shape_CHW)
    timestep = torch.tensor([3, 900])
    conditions = model.conditions(["a red apple", ""])
    model.unet(z, timestep, conditions.context_BLD)
    expected = [seen["0"][0], seen["1"][0], seen["mid"]]

    maps = encoder_maps(model.unet, z, timestep, conditions)
    assert [features.shape[1] for features in maps] == map_channels(model.unet)
    assert [features.shape[-1] for features in maps] == [8, 4, 4]
    for features, own in zip(maps, expected, strict=True):
        torch.testing.assert_close(features, own)


@pytest.mark.parametrize("loss", ["hinge", "softplus"])
def test_each_loss_teaches_one_side_alone(loss: str) -> None:
    discriminator = LatentDiscriminator([16, 32], loss, r1=1.0)
    maps = some_maps(0, gradient=True)
    target_maps = some_maps(1, gradient=True)
    discriminator.own_loss(maps, target_maps).backward()
    assert all(features.grad is None for features in (*maps, *target_maps))
    assert all(weight.grad is not None for weight in discriminator.parameters())
    discriminator.zero_grad()
    discriminator.student_loss(maps).backward()
    assert all(features.grad is not None for features in maps)
    assert all(weight.grad is None for weight in discriminator.parameters())


def test_softplus_is_the_cross_entropy_of_true_and_false() -> None:
    discriminator = LatentDiscriminator([16, 32], "softplus")
    maps = some_maps(0)
    target_maps = some_maps(1)
    losses = []
    cheated = []
    for judged, true in zip(discriminator(maps), discriminator(target_maps), strict=True):
        false_loss = F.binary_cross_entropy_with_logits(judged, torch.zeros_like(judged))
        true_loss = F.binary_cross_entropy_with_logits(true, torch.ones_like(true))
        losses.append(false_loss + true_loss)
        cheated.append(F.binary_cross_entropy_with_logits(judged, torch.ones_like(judged)))
    torch.testing.assert_close(discriminator.own_loss(maps, target_maps), sum(losses) / 2)
    torch.testing.assert_close(discriminator.student_loss(maps), sum(cheated) / 2)


def test_the_penalty_of_a_linear_head_is_its_weights() -> None:
    discriminator = LatentDiscriminator([16, 32], r1=2.0)
    for number, channels in enumerate((16, 32)):
        discriminator.heads[number] = nn.Conv2d(channels, 1, 1)
    # d (mean over n places of w . x) / dx is w / n at each place: |w|^2 / n.
    expected = 0.0
    for head, places in zip(discriminator.heads, (16, 4), strict=True):
        expected += head.weight.square().sum() / places / 2
    maps = some_maps(1)
    torch.testing.assert_close(discriminator.penalty(maps), expected)
    plain = LatentDiscriminator([16, 32])
    plain.heads = discriminator.heads
    difference = discriminator.own_loss(some_maps(0), maps) - plain.own_loss(some_maps(0), maps)
    torch.testing.assert_close(difference, 2.0 * expected)


def test_heads_learn_to_tell_and_a_student_learns_to_pass() -> None:
    discriminator = LatentDiscriminator([16, 32])
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-2)
    false = [features - 1 for features in some_maps(0)]
    true = [features + 1 for features in some_maps(1)]
    for _ in range(30):
        optimizer.zero_grad()
        discriminator.own_loss(false, true).backward()
        optimizer.step()
    assert discriminator.student_loss(true) < discriminator.student_loss(false) - 1

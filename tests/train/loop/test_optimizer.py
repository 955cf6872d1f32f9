from __future__ import annotations

import pytest
import torch
from torch import nn

from hipa_deploy.train.loop.optimizer import learning_rate, new_optimizer
from hipa_deploy.train.losses.dists import DistsLike
from hipa_deploy.train.losses.hipa_loss import HipaLoss
from hipa_deploy.train.recipes.loss_settings import LossSettings
from hipa_deploy.train.recipes.recipe import OptimiserSettings


def test_warm_up_and_cosine_decay() -> None:
    settings = OptimiserSettings(learning_rate=1.0, warmup_steps=4, decay="cosine")
    assert learning_rate(settings, 0, 104) == 0.25
    assert learning_rate(settings, 3, 104) == 1.0
    assert learning_rate(settings, 54, 104) == pytest.approx(0.505)
    assert learning_rate(settings, 104, 104) == pytest.approx(0.01)


def test_the_last_step_nears_a_hundredth_of_the_peak() -> None:
    settings = OptimiserSettings(learning_rate=1.0, decay="cosine")
    last = [learning_rate(settings, steps - 1, steps) for steps in (4, 40, 340)]
    assert last == pytest.approx([0.155, 0.0115, 0.01], rel=1e-2)


def test_constant_rate_is_the_default() -> None:
    assert learning_rate(OptimiserSettings(learning_rate=1.0), 50, 100) == 1.0


def test_weights_of_the_loss_have_a_group_without_momentum_or_decay() -> None:
    weight = nn.Parameter(torch.zeros(2))
    loss = HipaLoss(
        LossSettings(adversarial_weight=1), DistsLike(lambda image: [image[..., ::4, ::4]])
    )
    optimizer = new_optimizer({"a": weight}, loss, OptimiserSettings(weight_decay=0.5))
    student, discriminator = optimizer.param_groups
    assert student["params"] == [weight]
    assert student["betas"] == (0.9, 0.999)
    assert student["weight_decay"] == 0.5
    assert len(discriminator["params"]) == len(loss.trained_parameters)
    assert discriminator["betas"] == (0.0, 0.99)
    assert discriminator["weight_decay"] == 0.0

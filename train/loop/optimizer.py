"""The optimiser of a training run and its learning rate."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from hipa_deploy.train.distribution.terms import DistributionTerms
from hipa_deploy.train.losses.hipa_loss import HipaLoss
from hipa_deploy.train.recipes.recipe import OptimiserSettings


def new_optimizer(
    weights: dict[str, nn.Parameter],
    loss: HipaLoss,
    settings: OptimiserSettings,
    distribution: DistributionTerms | None = None,
) -> torch.optim.Optimizer:
    """AdamW with one parameter group for ``weights`` and one for each other kind of weights.

    Args:
        weights: The weights to train, by name.
        loss: Its ``trained_parameters``, the discriminator's, become the second group.
        settings: ``learning_rate`` is set at every step by the training loop, not here.
        distribution: Its heads join the discriminator's group. Its fake score has a group with a
            learning rate of its own, ``own_rate``, and takes steps of its own: AdamW leaves weights
            without a gradient alone.

    """
    groups: list[dict[str, Any]] = [{"params": list(weights.values())}]

    # A discriminator trains without momentum, as in Sauer et al. 2021 ('Projected GANs Converge
    # Faster'), and without decay.
    judges = list(loss.trained_parameters.values())
    if distribution is not None:
        judges += distribution.head_weights.values()
    if judges:
        groups.append({"params": judges, "betas": (0.0, 0.99), "weight_decay": 0.0})
    if distribution is not None and distribution.fake_weights:
        fake_group = {
            "params": list(distribution.fake_weights.values()),
            "weight_decay": 0.0,
            "own_rate": distribution.recipe.score.learning_rate,
        }
        groups.append(fake_group)
    return torch.optim.AdamW(groups, weight_decay=settings.weight_decay, fused=True)


def learning_rate(settings: OptimiserSettings, step: int, steps: int) -> float:
    """Learning rate of ``step``, 0 to ``steps`` - 1: a linear warm-up, then the recipe's decay.

    Example:
        >>> settings = OptimiserSettings(learning_rate=1.0, warmup_steps=4, decay="cosine")
        >>> learning_rate(settings, step=0, steps=104), learning_rate(settings, step=3, steps=104)
        (0.25, 1.0)

    """
    rate = settings.learning_rate * min(1.0, (step + 1) / max(settings.warmup_steps, 1))
    if settings.decay == "cosine":
        progress = max(0.0, step - settings.warmup_steps) / max(steps - settings.warmup_steps, 1)
        # Towards a hundredth of the peak, not to zero. It would be reached one step after the last:
        # the last of 4 steps has 0.155 of the peak, of 40 steps 0.0115. Runs that go on need the
        # same curve.
        rate *= 0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2
    return rate

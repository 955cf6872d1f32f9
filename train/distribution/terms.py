"""The terms that compare distributions, as a training calls them.

Both terms take their gradient at the student's latents by themselves, since each needs the frozen
UNet in another state than the student's backward pass does: without adaptors, or with the fake
score's. A backward pass through all of it would recompute checkpointed activations in the wrong
state.

Shape suffixes: B rows of a batch, T timesteps, C latent channels, H W latent size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hipa_deploy.train.distribution.draws import (
    DISCRIMINATOR_STREAM,
    FAKE_STREAM,
    REAL_STREAM,
    SCORE_STREAM,
    Draw,
    row_draws,
)
from hipa_deploy.train.distribution.fake_score import add_fake_score, as_fake_score, fake_weights
from hipa_deploy.train.distribution.latent_discriminator import (
    LatentDiscriminator,
    encoder_maps,
    map_channels,
)
from hipa_deploy.train.distribution.score_distillation import ScoreDistillation, noised
from hipa_deploy.train.losses.hipa_loss import Terms
from hipa_deploy.train.model.conditions import Conditions, predict
from hipa_deploy.train.model.diffusion_model import DiffusionModel
from hipa_deploy.train.model.mixed_precision import in_precision
from hipa_deploy.train.model.unet_adaptor import without_adaptor
from hipa_deploy.train.recipes.recipe import Recipe, check_distribution_terms

Timesteps = tuple[int, int]


@dataclass(frozen=True)
class RealLatents:
    """``count`` real images, as functions of row indices int64 [B].

    Attributes:
        count: How many there are.
        latents: Rows -> scaled latents, float32 [B, C, H, W].
        conditions: Rows -> what a UNet is told of their captions.

    """

    count: int
    latents: Callable[[Tensor], Tensor]
    conditions: Callable[[Tensor], Conditions]


class DistributionTerms:
    """Score distillation and the discriminator on noised latents, as far as a recipe has them.

    Args:
        unet: The UNet2DConditionModel, with the student's adaptor. The fake score's is added.
        recipe: Of the training.
        alpha_bar_T: Cumulative signal power of every timestep.
        prediction_type: What the UNet predicts: epsilon, v_prediction or sample.
        unguided: One row, which guidance leads away from: ``DiffusionModel.unguided``.
        draw: Where timesteps and noise come from.
        emulated: As of ``in_precision``.

    Attributes:
        score: Score distillation; None without a weight.
        discriminator: The heads on noised latents; None without a weight.
        real: Real images that the heads take for true beside the teacher's; None at first.

    """

    def __init__(
        self,
        unet: Any,
        recipe: Recipe,
        *,
        alpha_bar_T: Tensor,
        prediction_type: str,
        unguided: Conditions,
        draw: Draw = row_draws,
        emulated: bool = False,
    ) -> None:
        self.unet = unet
        self.recipe = recipe
        self.alpha_bar_T = alpha_bar_T
        self.draw = draw
        self.real: RealLatents | None = None
        self.score: ScoreDistillation | None = None
        self.discriminator: LatentDiscriminator | None = None

        # The student's latents of this step by their rows: what the fake score learns from.
        self._made: dict[tuple[int, ...], tuple[Tensor, Conditions]] = {}
        device = alpha_bar_T.device
        self._call = in_precision(unet, recipe.mixed_precision, device, emulated=emulated)
        # The gradient of the heads' verdict has no loss scale, which fp16 would need.
        precision = "no" if recipe.mixed_precision == "fp16" else recipe.mixed_precision
        self._maps = in_precision(partial(encoder_maps, unet), precision, device, emulated=emulated)
        if recipe.score.weight:
            if recipe.score.learns:
                add_fake_score(unet, recipe.score.rank, recipe.seed)
            self.score = ScoreDistillation(
                recipe.score,
                self._teacher,
                self._predict if recipe.score.learns else None,
                guidance=recipe.teacher.guidance,
                alpha_bar_T=alpha_bar_T,
                prediction_type=prediction_type,
                unguided=unguided,
            )
        if recipe.latent_discriminator.weight:
            settings = recipe.latent_discriminator
            self.discriminator = LatentDiscriminator(
                map_channels(unet), settings.loss, settings.r1, recipe.seed
            )
            self.discriminator.to(alpha_bar_T.device)

    @property
    def fake_weights(self) -> dict[str, nn.Parameter]:
        """The fake score's weights by name; none without one."""
        return fake_weights(self.unet) if self.recipe.score.learns else {}

    @property
    def head_weights(self) -> dict[str, nn.Parameter]:
        """The discriminator's weights by name; none without a discriminator."""
        if self.discriminator is None:
            return {}
        return dict(self.discriminator.named_parameters(prefix="latent_discriminator"))

    @property
    def state(self) -> dict[str, nn.Parameter]:
        """What a checkpoint must store beside the optimiser, so that a resumed run is exact."""
        own = {**self.fake_weights, **self.head_weights}
        return {f"distribution.{name}": weight for name, weight in own.items()}

    def __call__(
        self,
        latents_BCHW: Tensor,
        target_BCHW: Tensor | None,
        conditions: Conditions,
        rows: Tensor,
        step: int,
    ) -> tuple[Tensor, Terms]:
        """The weighted total of both terms, and the terms, all scalars.

        Args:
            latents_BCHW: The student's, with a gradient.
            target_BCHW: The teacher's; score distillation alone needs none.
            conditions: Of the prompts.
            rows: The examples, int64 [B].
            step: Of the training.

        """
        total = latents_BCHW.new_zeros(())
        terms: Terms = {}
        self.remember(latents_BCHW.detach(), conditions, rows)
        if self.score is not None and step >= self._first_score_step:
            terms["score"] = self._score_term(latents_BCHW, conditions, rows, step)
            total = total + self.recipe.score.weight * terms["score"]
        if self.discriminator is not None:
            assert target_BCHW is not None  # Recipe.needs_targets
            for_student, for_heads = self._judged(latents_BCHW, target_BCHW, conditions, rows, step)
            terms["latent_adversarial"] = for_student
            terms["latent_discriminator"] = for_heads
            # The heads' own loss has no weight, as that of the discriminator on images.
            total = total + self.recipe.latent_discriminator.weight * for_student + for_heads
        return total, terms

    def remember(self, latents_BCHW: Tensor, conditions: Conditions, rows: Tensor) -> None:
        """Keep the student's latents of these rows for the fake score, if there is one."""
        if self.recipe.score.learns:
            self._made[_key(rows)] = (latents_BCHW, conditions)

    @property
    def following_steps(self) -> int:
        """Steps that the fake score takes after this one of the student."""
        return self.recipe.score.steps if self._made else 0

    @contextmanager
    def following(self) -> Iterator[None]:
        """The fake score learns inside the block, from the images of the student's last step."""
        with as_fake_score(self.unet):
            yield
        self.forget()

    def forget(self) -> None:
        """Drop the student's latents that ``remember`` kept."""
        self._made.clear()

    def fake_loss(self, rows: Tensor, step: int, number: int) -> tuple[Tensor, Terms]:
        """The fake score's own loss, for ``following``.

        Args:
            rows: A piece of the step's rows, as ``__call__`` had it.
            step: Of the training.
            number: Of the fake score's step, from 0.

        """
        assert self.score is not None
        latents, conditions = self._made[_key(rows)]
        timesteps = self.recipe.score.timesteps
        timestep_B, noise = self._drawn(FAKE_STREAM + number, step, rows, timesteps, latents)
        loss = self.score.fake_loss(latents, conditions, timestep_B, noise)
        return loss, {"fake_score": loss}

    @property
    def _first_score_step(self) -> int:
        return self.recipe.loss.latent_warmup_steps + self.recipe.score.delay

    def _score_term(
        self, latents_BCHW: Tensor, conditions: Conditions, rows: Tensor, step: int
    ) -> Tensor:
        """Half the mean square of the gradient, as DMD's loss; its gradient is that gradient."""
        assert self.score is not None
        x0 = latents_BCHW.detach()
        timesteps = self.recipe.score.timesteps
        timestep_B, noise = self._drawn(SCORE_STREAM, step, rows, timesteps, x0)
        gradient = self.score.gradient(x0, conditions, timestep_B, noise)
        value = gradient.square().mean() / 2
        return with_gradient(value, latents_BCHW, gradient / gradient.numel())

    def _judged(
        self,
        latents_BCHW: Tensor,
        target_BCHW: Tensor,
        conditions: Conditions,
        rows: Tensor,
        step: int,
    ) -> tuple[Tensor, Tensor]:
        """The discriminator's loss for the student, and that for its heads."""
        assert self.discriminator is not None
        x0 = latents_BCHW.detach().requires_grad_(True)
        timesteps = self.recipe.latent_discriminator.timesteps
        timestep_B, noise = self._drawn(DISCRIMINATOR_STREAM, step, rows, timesteps, x0)
        alpha_bar_B111 = self.alpha_bar_T[timestep_B].view(-1, 1, 1, 1)
        true, true_conditions = self._true_latents(target_BCHW, conditions, rows, step)
        with without_adaptor(self.unet):
            z = noised(x0, alpha_bar_B111, noise)
            maps = [features.float() for features in self._maps(z, timestep_B, conditions)]
            for_student = self.discriminator.student_loss(maps)
            (gradient,) = torch.autograd.grad(for_student, x0)
            with torch.no_grad():
                z = noised(true, alpha_bar_B111, noise)
                true_maps = self._maps(z, timestep_B, true_conditions)
        for_heads = self.discriminator.own_loss(maps, [features.float() for features in true_maps])
        return with_gradient(for_student, latents_BCHW, gradient), for_heads

    def _true_latents(
        self, target_BCHW: Tensor, conditions: Conditions, rows: Tensor, step: int
    ) -> tuple[Tensor, Conditions]:
        """Latents that the heads take for true, with conditions: the teacher's, some real."""
        if self.real is None:
            return target_BCHW, conditions
        is_real = []
        chosen = []
        for row in rows.tolist():
            rng = np.random.default_rng((self.recipe.seed, REAL_STREAM, step, row))
            is_real.append(rng.random() < self.recipe.latent_discriminator.real_share)
            chosen.append(int(rng.integers(self.real.count)))
        is_real_B = torch.tensor(is_real, device=target_BCHW.device)
        real_rows = torch.tensor(chosen)
        real = self.real.latents(real_rows).to(target_BCHW.device)
        real_conditions = self.real.conditions(real_rows)
        latents = torch.where(is_real_B.view(-1, 1, 1, 1), real, target_BCHW)
        return latents, real_conditions.where(is_real_B, conditions)

    def _drawn(
        self, stream: int, step: int, rows: Tensor, timesteps: Timesteps, like_BCHW: Tensor
    ) -> tuple[Tensor, Tensor]:
        channels, height, width = like_BCHW.shape[1:]
        shape = (channels, height, width)
        timestep_B, noise = self.draw(self.recipe.seed, stream, step, rows, timesteps, shape)
        return timestep_B.to(like_BCHW.device), noise.to(like_BCHW.device)

    def _teacher(self, z_BCHW: Tensor, timestep_B: Tensor, conditions: Conditions) -> Tensor:
        with without_adaptor(self.unet):
            return self._output(z_BCHW, timestep_B, conditions)

    def _predict(self, z_BCHW: Tensor, timestep_B: Tensor, conditions: Conditions) -> Tensor:
        """The fake score's prediction; in ``following`` it is switched on already."""
        if torch.is_grad_enabled():
            return self._output(z_BCHW, timestep_B, conditions)
        with as_fake_score(self.unet):
            return self._output(z_BCHW, timestep_B, conditions)

    def _output(self, z_BCHW: Tensor, timestep_B: Tensor, conditions: Conditions) -> Tensor:
        return predict(self._call, z_BCHW, timestep_B, conditions).float()


def _key(rows: Tensor) -> tuple[int, ...]:
    return tuple(rows.tolist())


def with_gradient(value: Tensor, at: Tensor, gradient: Tensor) -> Tensor:
    """A scalar of that value, whose gradient at ``at`` is ``gradient``.

    Example:
        >>> at = torch.ones(2, requires_grad=True)
        >>> with_gradient(torch.tensor(5.0), at, torch.tensor([1.0, 2.0])).backward()
        >>> at.grad
        tensor([1., 2.])

    """
    pull = (at * gradient.detach()).sum()
    return value.detach() + pull - pull.detach()


def distribution_terms(model: DiffusionModel, recipe: Recipe) -> DistributionTerms | None:
    """The terms of a recipe; None if it has none.

    Args:
        model: The base model, with the student's adaptor in its UNet.
        recipe: Of the training.

    Raises:
        HipaError: the UNet was made for inpainting, or a timestep is none of the model's.

    """
    check_distribution_terms(recipe, model.config)
    if not recipe.compares_distributions:
        return None
    return DistributionTerms(
        model.unet,
        recipe,
        alpha_bar_T=model.alphas_cumprod,
        prediction_type=model.prediction_type,
        unguided=model.unguided(),
    )

"""Score distillation: where should the student's images move to be the teacher's distribution?

With z = a x0 + s eps, the student's latents x0 noised to a random timestep, both the frozen model
(with guidance) and a fake score that is trained on the student's images predict x0 from z. Their
difference is the gradient of KL(student || teacher) between the noised distributions, up to a
factor for each timestep::

    g = x0_fake - x0_teacher        d KL / d x0 = a^2 / s^2 E[g]        as score = (a x0 - z) / s^2

    dmd      g / mean |x0 - x0_teacher|     Yin et al. 2023, 'One-step Diffusion with Distribution
                                            Matching Distillation', arXiv 2311.18828, equation 8
    noise    a / s g                        the difference of the predicted noises: Wang et al.
                                            2023, 'ProlificDreamer' (VSD); SwiftBrush (2312.05239)

The fake score is an adaptor of its own, as in ProlificDreamer, SwiftBrush and WaDi (2603.08258); it
learns to predict the noise in the student's images. Nothing is decoded, and no images are needed
beside the student's. 'Guidance below a timestep' is that of 1.x-Distill (2604.04018): guidance at
high noise picks the modes before there is an image. Without a fake score what is left is guidance,
the part of the gradient that drives: 'CFG augmentation' of Decoupled DMD (2511.22677).

Shape suffixes: B rows of a batch, T timesteps, C latent channels, H W latent size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hipa_deploy.generate.x0 import predict_x0
from hipa_deploy.train.model.conditions import Conditions, joined_rows
from hipa_deploy.train.recipes.distribution_settings import ScoreSettings

# (z [B, C, H, W], timesteps [B], conditions) -> what a UNet predicts, [B, C, H, W].
Predict = Callable[[Tensor, Tensor, Conditions], Tensor]
SMALLEST_ERROR = 1e-6  # keeps the division finite where the student is already right


class ScoreDistillation:
    """Score distillation between two models that predict from noised latents.

    Args:
        settings: Guidance and form of the gradient.
        teacher: The frozen model.
        fake: The model of the student's images. None: the frozen model without guidance stands
            for it, and the gradient is guidance alone.
        guidance: Of the teacher, if the settings have none of their own.
        alpha_bar_T: Cumulative signal power of every timestep.
        prediction_type: What both predict: epsilon, v_prediction or sample.
        unguided: One row, which guidance leads away from: ``DiffusionModel.unguided``.

    Example:
        >>> score = ScoreDistillation(
        ...     ScoreSettings(weight=1), unet, unet, guidance=5.0, prediction_type="epsilon",
        ...     alpha_bar_T=model.alphas_cumprod, unguided=model.unguided(),
        ... )
        >>> score.gradient(latents, conditions, timestep_B, noise).shape
        torch.Size([2, 4, 64, 64])

    """

    def __init__(
        self,
        settings: ScoreSettings,
        teacher: Predict,
        fake: Predict | None,
        *,
        guidance: float,
        alpha_bar_T: Tensor,
        prediction_type: str,
        unguided: Conditions,
    ) -> None:
        self.settings = settings
        self.teacher = teacher
        self.fake = fake
        self.guidance = guidance if settings.guidance is None else settings.guidance
        self.alpha_bar_T = alpha_bar_T
        self.prediction_type = prediction_type
        self.unguided = unguided

    @torch.no_grad()
    def gradient(
        self, x0_BCHW: Tensor, conditions: Conditions, timestep_B: Tensor, noise_BCHW: Tensor
    ) -> Tensor:
        """The gradient of the distance at each row's latents, float32 [B, C, H, W].

        Args:
            x0_BCHW: The student's latents.
            conditions: Of its prompts.
            timestep_B: Timestep to which each row is noised.
            noise_BCHW: Standard normal.

        """
        alpha_bar_B111 = self._alpha_bar(timestep_B)
        z_BCHW = noised(x0_BCHW, alpha_bar_B111, noise_BCHW)
        unguided, guided = self._teacher_outputs(z_BCHW, timestep_B, conditions)
        output = unguided if self.fake is None else self.fake(z_BCHW, timestep_B, conditions)
        fake_BCHW = predict_x0(z_BCHW, output, alpha_bar_B111, self.prediction_type)
        teacher_BCHW = predict_x0(z_BCHW, guided, alpha_bar_B111, self.prediction_type)

        difference: Tensor = fake_BCHW - teacher_BCHW
        if self.settings.gradient == "noise":
            return (alpha_bar_B111 / (1 - alpha_bar_B111)).sqrt() * difference
        error_B111 = (x0_BCHW - teacher_BCHW).abs().mean(dim=(1, 2, 3), keepdim=True)
        return difference / error_B111.clamp_min(SMALLEST_ERROR)

    def fake_loss(
        self, x0_BCHW: Tensor, conditions: Conditions, timestep_B: Tensor, noise_BCHW: Tensor
    ) -> Tensor:
        """The loss that the fake score learns by: the error of its prediction, a scalar.

        Args:
            x0_BCHW: The student's latents, without a gradient.
            conditions: As for ``gradient``.
            timestep_B: As for ``gradient``.
            noise_BCHW: As for ``gradient``.

        """
        assert self.fake is not None  # ScoreSettings.learns
        alpha_bar_B111 = self._alpha_bar(timestep_B)
        z_BCHW = noised(x0_BCHW, alpha_bar_B111, noise_BCHW)
        output = self.fake(z_BCHW, timestep_B, conditions).float()
        target = prediction_target(x0_BCHW, alpha_bar_B111, noise_BCHW, self.prediction_type)
        return F.mse_loss(output, target)

    def _teacher_outputs(
        self, z_BCHW: Tensor, timestep_B: Tensor, conditions: Conditions
    ) -> tuple[Tensor, Tensor]:
        """The teacher's prediction without guidance and with it; both prompts are one batch."""
        if self.guidance == 1:
            output = self.teacher(z_BCHW, timestep_B, conditions).float()
            return output, output
        both = joined_rows([self.unguided.repeated(len(conditions)), conditions])
        twice_z = torch.cat([z_BCHW, z_BCHW])
        output = self.teacher(twice_z, torch.cat([timestep_B, timestep_B]), both).float()
        unconditional, conditional = output.chunk(2)
        is_guided_B = timestep_B < self.settings.guidance_below
        guidance_B = torch.where(is_guided_B, self.guidance, 1.0)
        towards = guidance_B.view(-1, 1, 1, 1) * (conditional - unconditional)
        return conditional, unconditional + towards

    def _alpha_bar(self, timestep_B: Tensor) -> Tensor:
        return self.alpha_bar_T[timestep_B].view(-1, 1, 1, 1)


def noised(x0_BCHW: Tensor, alpha_bar_B111: Tensor, noise_BCHW: Tensor) -> Tensor:
    """z = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) noise, [B, C, H, W] (Ho et al. 2020, eq. 4)."""
    return alpha_bar_B111.sqrt() * x0_BCHW + (1 - alpha_bar_B111).sqrt() * noise_BCHW


def prediction_target(
    x0_BCHW: Tensor, alpha_bar_B111: Tensor, noise_BCHW: Tensor, prediction_type: str
) -> Tensor:
    """What a model of that type should predict from ``noised``, [B, C, H, W].

    The converse of ``predict_x0``, whose sources it shares.
    """
    if prediction_type == "epsilon":
        return noise_BCHW
    if prediction_type == "v_prediction":
        return alpha_bar_B111.sqrt() * noise_BCHW - (1 - alpha_bar_B111).sqrt() * x0_BCHW
    return x0_BCHW

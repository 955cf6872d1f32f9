"""The tables of a recipe that compare distributions rather than images; none is the paper's."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from hipa_deploy.train.recipes.recipe_table import Settings

Timesteps = tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]]


class _NoisedSettings(Settings):
    """What both terms have: a weight, and how much noise they add."""

    weight: float = Field(0.0, ge=0)
    """Weight of the term; 0 switches it off."""
    timesteps: Timesteps = (20, 980)
    """First and last timestep to which the student's latents are noised, uniformly drawn."""

    @field_validator("timesteps")
    @classmethod
    def _ordered(cls, timesteps: Timesteps) -> Timesteps:
        if timesteps[0] > timesteps[1]:
            raise ValueError("expected the first timestep, then the last")
        return timesteps


class ScoreSettings(_NoisedSettings):
    """Score distillation with a second adaptor as the student's own score (ours).

    It needs prompts and no images; see hipa_deploy.train.distribution.score_distillation."""

    guidance: float | None = Field(None, ge=1.0, le=30.0)
    """Guidance of the frozen model's score; the default is teacher.guidance."""
    guidance_below: int = Field(1000, ge=0)
    """Guidance is used at timesteps below this one. Guidance at high noise makes the images of a
    prompt alike."""
    gradient: Literal["dmd", "noise"] = "dmd"
    """dmd: the difference of both predicted x0 over the size of the student's error, as DMD; noise:
    the difference of both predicted noises, as SwiftBrush."""
    rank: int = Field(32, ge=1, le=1024)
    """Rank of the second adaptor, on the layers of the preset full. It is thrown away in the
    end."""
    learning_rate: float = Field(1e-3, gt=0, le=1)
    """Learning rate of the second adaptor, which is constant."""
    steps: int = Field(1, ge=0, le=100)
    """Steps of the second adaptor for each step of the student. With 0 there is none: the frozen
    model without guidance stands for the student's score, and the gradient is guidance alone.
    Rank and learning rate then have no effect."""
    delay: int = Field(0, ge=0, le=10_000_000)
    """Steps after the latent warm-up in which the second adaptor learns, if there is one, and the
    student does not follow yet."""

    @property
    def learns(self) -> bool:
        """Whether there is a second adaptor."""
        return bool(self.weight and self.steps)


class LatentDiscriminatorSettings(_NoisedSettings):
    """A discriminator that judges noised latents by the frozen UNet's features (ours).

    See hipa_deploy.train.distribution.latent_discriminator."""

    loss: Literal["hinge", "softplus"] = "hinge"
    """Loss of the heads, and of the student."""
    r1: float = Field(0.0, ge=0)
    """Weight of the penalty on the gradient of each head at its input (R1)."""
    real_images: str | None = None
    """Folder of real images with captions, relative to the recipe, as source.images: a share of
    what the heads take for true. By default all of it is the teacher's."""
    real_share: float = Field(0.25, gt=0, le=1)
    """That share."""

    @model_validator(mode="after")
    def _images_need_a_weight(self) -> LatentDiscriminatorSettings:
        if self.real_images and not self.weight:
            raise ValueError("real_images needs a weight above 0")
        return self

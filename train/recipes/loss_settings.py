"""The settings of the loss, of an adaptor's recipe and of a decoder's."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from hipa_deploy.train.recipes.recipe_table import CODE, Settings

RADIUS = 0.2  # of the Nyquist frequency: there the high-pass is 1 - exp(-1/2) = 0.39


class ImageLossSettings(Settings):
    """The loss terms on decoded images, which recipes of both kinds have."""

    perceptual: Literal["dists", "lpips", "none"] = "dists"
    """Perceptual distance; none switches the term off."""
    backbone: str = Field("lite0", pattern=rf"^(lite0|vgg16|{CODE})$")
    """Network of the perceptual distance: lite0, vgg16 (torchvision's, with the published channel
    weights), or your own module:function."""
    perceptual_weight: float = Field(1.0, ge=0)
    """Weight of the perceptual distance."""
    perceptual_size: int | None = Field(None, ge=32, le=4096)
    """Size in pixels to which the short side is resized before the perceptual distance (DISTS
    evaluates at 256); by default it is not resized."""
    hf_weight: float = Field(1.0, ge=0)
    """Weight of the high-frequency terms together: it multiplies fourier_weight and edge_weight."""
    fourier_weight: float = Field(1.0, ge=0)
    """Weight of the Fourier term among the high-frequency terms."""
    edge_weight: float = Field(1.0, ge=0)
    """Weight of the edge term among the high-frequency terms."""
    high_frequency: Literal["difference", "similarity"] = "difference"
    """Form of both terms. difference: the L1 difference; similarity (ours): it rewards the target's
    energy in a band even where details lie elsewhere."""
    fourier_focal: float = Field(0.0, ge=0, le=10)
    """Of the difference: exponent of the focal weighting, which favours the frequencies with the
    largest error; 0 weighs all frequencies alike."""
    edge: Literal["sobel", "laplacian"] = "sobel"
    """Operator of the edge term."""
    amplitude_weight: float = Field(0.0, ge=0)
    """Weight of the difference of Fourier amplitudes, which ignores the phase (ours)."""
    custom: str | None = Field(None, pattern=rf"^{CODE}$")
    """A loss of your own, module:function (docs/how-to/your-own-loss.md); needs --allow-code."""
    custom_weight: float = Field(1.0, ge=0)
    """Weight of your own loss."""
    radius: float = Field(RADIUS, gt=0, le=2)
    """Radius of the Gaussian high-pass, in units of the Nyquist frequency."""
    pixel: Literal["l1", "mse"] = "l1"
    """Error of the pixel term."""
    adversarial_weight: float = Field(0.0, ge=0)
    """Weight of a discriminator that judges the perceptual distance's features (ours)."""
    balance: Literal["fixed", "gradient"] = "fixed"
    """gradient: scale the terms of the image so that the gradients of any two at the image are in
    the ratio of their weights, for one process without micro_batch; fixed: use the weights as they
    are."""
    balance_every: int = Field(50, ge=1, le=10_000_000)
    """Evaluations of the loss between two measurements of the gradients, with balance =
    gradient."""

    @property
    def has_image_terms(self) -> bool:
        """Whether any term needs the decoded image."""
        terms = [
            self.perceptual != "none" and self.perceptual_weight,
            self.hf_weight * (self.fourier_weight + self.edge_weight),
            self.amplitude_weight,
            getattr(self, "pixel_weight", 0.0),
            self.custom_weight if self.custom else 0.0,
        ]
        return any(terms)

    @model_validator(mode="after")
    def _judges_features(self) -> ImageLossSettings:
        if self.adversarial_weight and (self.perceptual == "none" or not self.perceptual_weight):
            raise ValueError(
                "adversarial_weight needs a perceptual distance with a weight: "
                "the discriminator judges the distance's features"
            )
        return self


class LossSettings(ImageLossSettings):
    """Weights of the terms of an adaptor's loss; see hipa_deploy.train.losses.hipa_loss."""

    pixel_weight: float = Field(0.0, ge=0)
    """Weight of the error of pixels in [0, 1]."""
    latent: Literal["mse", "huber"] = "mse"
    """Form of the error of the latents: mean square, or pseudo-Huber."""
    latent_weight: float = Field(0.05, ge=0)
    """Weight of the error of the latents, beside the losses of the decoded image."""
    latent_hf_weight: float = Field(0.0, ge=0)
    """Weight of the Fourier and edge terms on the latents, which need no decoding (ours)."""
    latent_warmup_steps: int = Field(0, ge=0, le=10_000_000)
    """Number of first steps that use the error of the latents alone; without decoding a step is
    about three times faster."""


class DecoderLossSettings(ImageLossSettings):
    """Weights of the terms of a decoder's loss; see hipa_deploy.train.losses.hipa_loss."""

    pixel_weight: float = Field(1.0, ge=0)
    """Weight of the error of pixels in [0, 1]."""

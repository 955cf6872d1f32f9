"""The settings of the held-out measure of a training."""

from __future__ import annotations

from pydantic import Field, model_validator

from hipa_deploy.train.recipes.recipe_table import Settings


class HeldOutSettings(Settings):
    """The measure on prompts that are not trained on; see hipa_deploy.train.held_out."""

    prompts: str | None = None
    """File of held-out prompts, as the key prompts; none switches the measure off. Prompts that are
    trained on as well are left out of it. 'included:held_out.txt' is the package's own list."""
    count: int = Field(32, ge=2, le=4096)
    """How many pairs of images to measure on: of teacher and student, or of full and tiny
    decoder."""
    every: int = Field(200, ge=1, le=10_000_000)
    """Steps between measurements."""
    patience: int = Field(0, ge=0, le=10_000_000)
    """Early stop: how many measurements in a row without a better one end the training; 0 never
    does."""
    min_delta: float = Field(0.0, ge=0)
    """By how much a measurement must be smaller than the best one to be better."""

    @model_validator(mode="after")
    def _patience_needs_a_measure(self) -> HeldOutSettings:
        if self.patience and not self.prompts:
            raise ValueError("patience needs held-out prompts: set held_out.prompts (--held-out)")
        return self

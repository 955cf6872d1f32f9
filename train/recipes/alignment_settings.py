"""The table of a recipe that holds images to their prompts; it is not the paper's."""

from __future__ import annotations

import re

from pydantic import Field, model_validator

from hipa_deploy.train.recipes.recipe_table import CODE, Settings


class AlignmentSettings(Settings):
    """A scorer of images and prompts as one more term of the loss (ours).

    See hipa_deploy.train.losses.alignment."""

    weight: float = Field(0.0, ge=0)
    """Weight of the term; 0 switches it off."""
    scorer: str | None = None
    """What scores: the folder of a CLIP of transformers, relative to the recipe, or your own
    module:function, which needs --allow-code."""
    below: float = Field(1.0, gt=-1, le=1)
    """Cosine above which an image fits its prompt well enough, and adds nothing. Without a limit
    the student learns to please the scorer."""

    @property
    def is_code(self) -> bool:
        """Whether the scorer is a 'module:function', and not a folder."""
        return is_code(self.scorer)

    @model_validator(mode="after")
    def _a_weight_needs_a_scorer(self) -> AlignmentSettings:
        if bool(self.weight) != bool(self.scorer):
            raise ValueError("weight above 0 and scorer go together: give both, or none")
        return self


def is_code(scorer: str | None) -> bool:
    """Whether a scorer is a 'module:function', and not a folder."""
    return scorer is not None and re.fullmatch(CODE, scorer) is not None

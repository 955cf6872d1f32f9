"""One image to make, checked and ready, and one image that was made.

Shapes: H, W height and width in pixels; C channels; h, w of the latent.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hipa_deploy.bundle.manifest import RefineSettings
from hipa_deploy.images.source import Source


@dataclass(frozen=True, eq=False)
class ImageJob:
    """One image to make: everything that can be wrong with it was checked.

    Attributes:
        prompt: what the image shows.
        seed: in [0, 2**63).
        prepared: the prompt as the bundle's prompt source wants it.
        latent_CHW: shape of the latents: latent channels, height and width.
        source: the image that it is made from; None for a bundle that makes images from text.
        facts: entries for the generation parameters.
        refine: how the base model makes the image, in many steps; None is the one step.

    """

    prompt: str
    seed: int
    prepared: Any = field(repr=False)
    latent_CHW: tuple[int, int, int]
    source: Source | None = field(default=None, repr=False)
    facts: Mapping[str, Any] = field(default_factory=dict, repr=False)
    refine: RefineSettings | None = None

    @property
    def company(self) -> Hashable:
        """What is equal for all jobs of a batch: shape, strength of an edit, way of refining."""
        step = self.source.step if self.source else None
        return self.latent_CHW, step, self.refine


@dataclass(frozen=True, eq=False)
class MadeImage:
    """An image as the stages gave it, and what it is of.

    Attributes:
        job: what was asked for.
        stage_image_HWC: uint8, as the decoder gave it.
        parameters: all that reproduces the image.

    """

    job: ImageJob
    stage_image_HWC: np.ndarray = field(repr=False)
    parameters: dict[str, Any] = field(repr=False)

    def finished(self) -> np.ndarray:
        """The user's image, uint8 [H, W, 3]: an inpainting is blended into its source.

        That can take milliseconds, and needs no device.
        """
        if self.job.source is None:
            return self.stage_image_HWC
        return self.job.source.finish(self.stage_image_HWC[None])[0]

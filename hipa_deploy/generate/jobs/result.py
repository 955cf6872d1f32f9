"""The images that a caller gets, with what each was made of.

Shapes: N images; H, W height and width in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from hipa_deploy.errors import brief
from hipa_deploy.generate.jobs.image_job import MadeImage
from hipa_deploy.generate.jobs.withheld import Flagged
from hipa_deploy.images.source import Upscaling


@dataclass(frozen=True, eq=False)
class GenerateResult:
    """Images with the prompt, the seed and the generation parameters of each.

    A result equals itself alone: ``==`` of two arrays is no single answer.

    Attributes:
        images_BHWC: uint8 [N, H, W, 3], RGB.
        prompts: N prompts.
        seeds: N seeds, each in [0, 2**63).
        parameters: N dictionaries: all that reproduces the image. A file carries its own as JSON.
        flagged: images that were asked for and are withheld, because a checker flagged them. They
            are not among the N.

    """

    images_BHWC: np.ndarray
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    parameters: tuple[dict[str, Any], ...]
    flagged: tuple[Flagged, ...] = ()

    def __repr__(self) -> str:
        """The shape, and the first prompt and seed: the pixels would fill the screen."""
        count, height, width = self.images_BHWC.shape[:3]
        first = f"{brief(self.prompts[0], 40)}, seed {self.seeds[0]}" if self.prompts else "none"
        more = ", …" if count > 1 else ""
        if self.flagged:
            more += f"; {len(self.flagged)} withheld"
        return f"GenerateResult({count} x {width}x{height}: {first}{more})"

    @property
    def images(self) -> list[Image.Image]:
        """The images as Pillow's, RGB."""
        return [Image.fromarray(image_HWC) for image_HWC in self.images_BHWC]

    @property
    def recipes(self) -> tuple[dict[str, Any], ...]:
        """The name that ``parameters`` had in version 0.1.0."""
        return self.parameters


def merge_tiles(enlargement: Upscaling, made: Sequence[MadeImage]) -> GenerateResult:
    """Put the tiles of ``OneStepPipeline.tile_jobs`` together: one image."""
    image_HWC = enlargement.merge([tile.stage_image_HWC for tile in made])
    size = {"height": enlargement.height, "width": enlargement.width}
    first = made[0]
    parameters = {**first.parameters, **size, **enlargement.facts}
    return GenerateResult(image_HWC[None], (first.job.prompt,), (0,), (parameters,))


def finished_result(made: Sequence[MadeImage]) -> GenerateResult:
    """The finished images of ``make``, of one size; ``guard`` has not seen them."""
    return GenerateResult(
        images_BHWC=np.stack([image.finished() for image in made]),
        prompts=tuple(image.job.prompt for image in made),
        seeds=tuple(image.job.seed for image in made),
        parameters=tuple(image.parameters for image in made),
    )


def joined(batches: Sequence[GenerateResult]) -> GenerateResult:
    """Several batches as one result."""
    prompts: list[str] = []
    seeds: list[int] = []
    parameters: list[dict[str, Any]] = []
    flagged: list[Flagged] = []
    asked = 0
    for batch in batches:
        prompts += batch.prompts
        seeds += batch.seeds
        parameters += batch.parameters
        for one in batch.flagged:
            flagged.append(replace(one, index=asked + one.index))
        asked += len(batch.seeds) + len(batch.flagged)
    images_BHWC = np.concatenate([batch.images_BHWC for batch in batches])
    return GenerateResult(
        images_BHWC, tuple(prompts), tuple(seeds), tuple(parameters), tuple(flagged)
    )

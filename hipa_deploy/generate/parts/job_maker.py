"""From requests to jobs: what was asked for is checked, before anything is computed.

Shapes: C, h, w of the latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hipa_deploy.bundle.folder import Bundle, latent_shape
from hipa_deploy.bundle.manifest import RefineSettings
from hipa_deploy.errors import HipaError, truth_value
from hipa_deploy.generate.jobs.image_job import ImageJob
from hipa_deploy.generate.prompts import PromptSource
from hipa_deploy.generate.request import check_prompts, plain_text
from hipa_deploy.images.read import ImageSource
from hipa_deploy.images.source import Source, Upscaling, require_task, trial_sources, upscaling
from hipa_deploy.marks.marker import ImageMarker


class JobMaker:
    """Checks requests against one bundle, and makes a job of each image.

    Args:
        bundle: that is to make the images.
        prompts: reads its prompts.
        marker: says which sizes are too small for the watermark.

    """

    def __init__(self, bundle: Bundle, prompts: PromptSource, marker: ImageMarker) -> None:
        self._bundle = bundle
        self._prompts = prompts
        self._marker = marker

    def jobs(
        self,
        pairs: Sequence[tuple[str, int]],
        *,
        source: Source | None = None,
        height: int | None = None,
        width: int | None = None,
        truncate: bool = False,
        prompt_weights: bool | None = None,
        refine: RefineSettings | None = None,
    ) -> list[ImageJob]:
        """Make a job of each pair of a prompt and a seed; see ``OneStepPipeline.jobs``.

        Args:
            pairs: as ``request.check_pairs`` gives them.
            source: what all images are made from.
            height: pixels; None is the bundle's own size, or that of ``source``.
            width: the same.
            truncate: cut prompts that are too long.
            prompt_weights: read weights; None is as the bundle says.
            refine: how the base model makes the images; None is the one step.

        Raises:
            HipaError: a prompt, a size or a task that the bundle does not take.

        """
        latent_CHW = self._latent_shape(source, height, width)
        truncate = truth_value(truncate, "truncate")
        weights = self._reads_weights(prompt_weights)
        texts = list(dict.fromkeys(text for text, _ in pairs))
        tokens = self._prepare(texts, latent_CHW, truncate=truncate, weights=weights)
        prepared = dict(zip(texts, tokens, strict=True))
        facts: dict[str, Any] = {"truncate": truncate, "prompt_weights": weights}
        if source:
            facts |= source.facts
        jobs = []
        for text, seed in pairs:
            jobs.append(ImageJob(text, seed, prepared[text], latent_CHW, source, facts, refine))
        return jobs

    def tile_jobs(
        self,
        image: ImageSource,
        prompt: str,
        *,
        overlap: int | None,
        truncate: bool,
        prompt_weights: bool | None,
        most_tiles: int,
    ) -> tuple[Upscaling, list[ImageJob]]:
        """Make a job of each tile of an image to enlarge; see ``OneStepPipeline.tile_jobs``."""
        check_prompts([prompt])
        prompt = plain_text(prompt)
        truncate = truth_value(truncate, "truncate")
        weights = self._reads_weights(prompt_weights)
        enlargement = upscaling(self._bundle, image, overlap=overlap, most_tiles=most_tiles)
        self._marker.check_size(enlargement.height, enlargement.width, "image")
        latent_CHW = latent_shape(self._bundle, None, None)
        (prepared,) = self._prepare([prompt], latent_CHW, truncate=truncate, weights=weights)
        facts = {"truncate": truncate, "prompt_weights": weights}
        jobs = []
        for tile in enlargement.tiles:
            jobs.append(ImageJob(prompt, 0, prepared, latent_CHW, tile, facts))
        return enlargement, jobs

    def trial_jobs(self, count: int) -> list[ImageJob]:
        """Different jobs of the bundle's own size, of its task."""
        texts = self._prompts.samples()
        weights = self._prompts.reads_weights(None)
        latent_CHW = latent_shape(self._bundle, None, None)
        prepared = self._prepare(texts, latent_CHW, truncate=True, weights=weights)
        sources: Sequence[Source | None] = trial_sources(self._bundle, count) or [None] * count
        jobs = []
        for seed, source in enumerate(sources):
            place = seed % len(texts)
            jobs.append(ImageJob(texts[place], seed, prepared[place], latent_CHW, source))
        return jobs

    def _reads_weights(self, asked: bool | None) -> bool:
        """Whether brackets are weights, for these requests."""
        if asked is not None:
            asked = truth_value(asked, "prompt_weights")
        return self._prompts.reads_weights(asked)

    def _latent_shape(
        self, source: Source | None, height: int | None, width: int | None
    ) -> tuple[int, int, int]:
        """[C, h, w] of what is asked for, after a check that this bundle makes it."""
        require_task(self._bundle, source.task if source else "generate")
        if source:
            own = source.image_HWC.shape[:2]
            for name, asked, has in zip(("height", "width"), (height, width), own, strict=True):
                if asked not in (None, has):
                    raise HipaError(
                        f"{name} is {asked}, and the source was prepared for {has} pixels. Prepare "
                        f"it for that {name}, or leave {name} out."
                    )
            height, width = own
        shape = latent_shape(self._bundle, height, width)
        step = self._bundle.manifest.one_step
        self._marker.check_size(height or step.height, width or step.width)
        return shape

    def _prepare(
        self,
        texts: Sequence[str],
        latent_CHW: tuple[int, int, int],
        *,
        truncate: bool,
        weights: bool,
    ) -> list[Any]:
        """The prompts as the bundle's prompt source wants them, for images of such latents."""
        step = self._bundle.manifest.one_step
        factor = step.height // step.latent_shape[1]
        size = (latent_CHW[1] * factor, latent_CHW[2] * factor)
        return self._prompts.prepare(list(texts), truncate=truncate, weights=weights, size=size)

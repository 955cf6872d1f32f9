"""The public pipeline: prompts in, images out, one UNet call each.

What a service needs of it, jobs and batches, is its base class ``BatchPipeline``. The modules of
``hipa_deploy.generate.parts`` do the work.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from hipa_deploy.bundle.adaptor_swap import AdaptorSwap
from hipa_deploy.bundle.manifest import RefineSettings
from hipa_deploy.errors import HipaError, brief
from hipa_deploy.generate.jobs.batch_sizes import cut
from hipa_deploy.generate.jobs.image_job import ImageJob
from hipa_deploy.generate.jobs.result import GenerateResult, finished_result, joined, merge_tiles
from hipa_deploy.generate.noise import check_seeds
from hipa_deploy.generate.parts.batch_pipeline import BatchPipeline
from hipa_deploy.generate.parts.open_parts import open_parts
from hipa_deploy.generate.prompts import CACHED_PROMPTS
from hipa_deploy.generate.refine.drafts import draft_choices
from hipa_deploy.generate.refine.refiner import Progress, refine_settings
from hipa_deploy.generate.request import check_count, check_prompts, listed
from hipa_deploy.generate.stages import Timer
from hipa_deploy.images.read import ImageSource
from hipa_deploy.images.source import Source, control_source, edit_source, inpaint_source
from hipa_deploy.marks.safety import Checker

__all__ = ["DEFAULT_FEATHER", "GenerateResult", "OneStepPipeline"]

DEFAULT_FEATHER = 8  # pixels


class OneStepPipeline(BatchPipeline):
    """A bundle, loaded on one backend: prompts in, images out, one UNet call each.

    Any thread may call it, several at once too. Backends that run one call at a time let the others
    wait. ``swap_adaptor`` and ``close`` wait for the batches that are under way, so the parameters
    of an image always name the adaptor that made it.

    A pipeline belongs to the process that loaded it. A fork of that process gets an error: each
    process loads its own.

    Example:
        >>> with OneStepPipeline.load("emoji") as pipe:
        ...     result = pipe("3d emoji of a red apple", seed=0, count=2)
        >>> result.images_BHWC.shape
        (2, 128, 128, 3)
        >>> result.images[0].save("apple.png")

    """

    @classmethod
    def load(
        cls,
        bundle: str | Path,
        backend: str = "auto",
        *,
        verify: bool = False,
        cache: bool = True,
        watermark: bool | int | None = None,
        checker: Checker | None = None,
        low_memory: bool = False,
    ) -> OneStepPipeline:
        """Open a bundle, check the hashes of its files and load its stages.

        Args:
            bundle: a folder that ``hipa-export`` wrote, or 'emoji' for the embedded bundle.
            backend: one of ``hipa_deploy.generate.runner.BACKENDS``. 'auto' is an engine that was
                built for this device, else ONNX Runtime on the CPU.
            verify: read and hash every file, and compile every stage. By default files that have
                not changed since an earlier start are not read again (``disk.remembered``).
            cache: take compiled stages that an earlier start left in this user's cache, and leave
                them there, on the CPU backends.
            watermark: whether images carry the invisible watermark; a number of 32 bits is what it
                says. None is as the bundle's owner chose.
            checker: a function of yours that sees every image, beside the bundle's own safety
                checker: uint8 [B, H, W, 3] in, and for each image False, True or a reason out.
                Flagged images are in ``GenerateResult.flagged``, not among the images.
            low_memory: hold less at once, and take longer: stages are loaded when they run, and
                released before others are loaded. The text encoder is always apart from the
                others. These stay loaded together on TensorRT and TensorRT-RTX if they fit, and
                else, as on all other backends, one at a time. The images are the same.

        Raises:
            HipaError: not a bundle, a corrupt file, or a backend that is unknown, not installed or
                without an engine. Never another backend in its place.

        """
        started = time.perf_counter()
        parts = open_parts(
            bundle,
            backend,
            verify=verify,
            cache=cache,
            watermark=watermark,
            checker=checker,
            low_memory=low_memory,
        )
        pipeline = cls(
            parts.bundle, parts.backend, parts.stages, parts.prompts, parts.marker, parts.safety
        )
        pipeline._verify = verify
        pipeline.load_seconds = time.perf_counter() - started
        return pipeline

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        source: Source | None = None,
        seed: int = 0,
        count: int = 1,
        height: int | None = None,
        width: int | None = None,
        truncate: bool = False,
        prompt_weights: bool | None = None,
        timer: Timer = nullcontext,
    ) -> GenerateResult:
        """Generate ``count`` images for each prompt, with seeds ``seed``, ``seed + 1``, …

        The same prompt, seed and size give the same image, whatever else is in the call.

        Args:
            prompt: one prompt, or several.
            source: what a task makes the images from; ``edit``, ``inpaint``, ``upscale`` and
                ``control`` make it.
            seed: of the first image, in [0, 2**63).
            count: images a prompt; at most 10,000 images in all.
            height: pixels; None is the bundle's own size, or that of ``source``.
            width: pixels; None is the bundle's own size, or that of ``source``.
            truncate: cut prompts that are too long, in place of refusing them.
            prompt_weights: read ``(word:1.3)`` as a weight, as
                ``hipa_deploy.generate.prompt_weights`` says; None is what the bundle was exported
                for, which is False by default: brackets are text.
            timer: called with a stage's name, gives a context to run the stage in.

        Raises:
            HipaError: no prompt, a prompt that is too long, a weight that is no number, a seed or
                count out of range, a size or a task that the bundle was not exported for, or
                another size than that of ``source``.

        """
        batches = self.stream(
            prompt,
            source=source,
            seed=seed,
            count=count,
            height=height,
            width=width,
            truncate=truncate,
            prompt_weights=prompt_weights,
            timer=timer,
        )
        return joined(list(batches))

    def generate(
        self,
        requests: Iterable[tuple[str, int]],
        *,
        source: Source | None = None,
        height: int | None = None,
        width: int | None = None,
        truncate: bool = False,
        prompt_weights: bool | None = None,
        timer: Timer = nullcontext,
    ) -> GenerateResult:
        """Generate one image for each (prompt, seed), as many at once as a batch holds.

        Each image is the one that a call of its own gives: the others do not change it.

        Args:
            requests: pairs of a prompt and a seed in [0, 2**63), at most 10,000.
            source: as a call takes it, for all of them.
            height: pixels; None is the bundle's own size, or that of ``source``.
            width: pixels; None is the bundle's own size, or that of ``source``.
            truncate: as a call takes it.
            prompt_weights: as a call takes it.
            timer: as a call takes it.

        Returns:
            The images in the order of ``requests``.

        Raises:
            HipaError: as a call does; or a request that is no pair of a prompt and a seed.

        Example:
            >>> result = pipe.generate([("3d emoji of a red apple", 3), ("flat emoji of a cat", 7)])
            >>> result.seeds
            (3, 7)

        """
        jobs = self.jobs(
            requests,
            source=source,
            height=height,
            width=width,
            truncate=truncate,
            prompt_weights=prompt_weights,
        )
        return joined(list(self._stream(jobs, timer)))

    def stream(
        self,
        prompt: str | Sequence[str],
        *,
        source: Source | None = None,
        seed: int = 0,
        count: int = 1,
        height: int | None = None,
        width: int | None = None,
        truncate: bool = False,
        prompt_weights: bool | None = None,
        timer: Timer = nullcontext,
        refine: RefineSettings | None = None,
        progress: Progress | None = None,
    ) -> Iterator[GenerateResult]:
        """The same as a call, a batch at a time.

        Everything is checked before the first image is made. With ``refine`` and ``progress``, as
        ``jobs`` and ``refine`` take them, the base model makes the images.

        Example:
            >>> for batch in pipe.stream("3d emoji of a red apple", count=1000):
            ...     save(batch.images)  # at most the bundle's largest batch in memory

        """
        prompts = listed(prompt)
        check_count(len(prompts), count)
        check_prompts(prompts)
        check_seeds(seed, count)
        # As Python's number: one of numpy's, of 8 bits, would begin again at 0.
        first = int(seed)
        pairs = [(text, first + i) for text in prompts for i in range(count)]
        jobs = self.jobs(
            pairs,
            source=source,
            height=height,
            width=width,
            truncate=truncate,
            prompt_weights=prompt_weights,
            refine=refine,
        )
        yield from self._stream(jobs, timer, progress)

    def _stream(
        self, jobs: Sequence[ImageJob], timer: Timer, progress: Progress | None = None
    ) -> Iterator[GenerateResult]:
        """Make jobs of one shape, a batch at a time."""
        # With little memory the text encoder is loaded once for as many prompts as are remembered.
        together = CACHED_PROMPTS if self.low_memory else len(jobs)
        groups = []
        for first in range(0, len(jobs), together):
            groups.append(list(cut(jobs[first : first + together], self.sizes_for(jobs[0]))))
        total = sum(len(batches) for batches in groups)
        number = 0
        for batches in groups:
            if self.low_memory:
                self._batches.encode_ahead([job for batch in batches for job in batch], timer)
            for batch in batches:
                report = partial(_report, progress, number, total) if progress else None
                yield self.guard(finished_result(self.make(batch, timer, report)))
                number += 1

    def refine(
        self,
        result: GenerateResult,
        steps: int | None = None,
        *,
        guidance: float | None = None,
        sampler: str | None = None,
        timer: Timer = nullcontext,
        progress: Progress | None = None,
    ) -> GenerateResult:
        """Make the base model's own images of drafts: many guided steps from the same noise.

        An adaptor learns to reach the end of these very steps at once. Each step runs the base UNet
        twice. docs/how-to/refine.md says how well a draft foretells the final image.

        Args:
            result: drafts of this bundle, made by any backend. What is used are their parameters.
            steps: 2 to 1000; None is as many as the adaptor's teacher took.
            guidance: of classifier-free guidance, 1 to 30; None is the teacher's.
            sampler: 'dpmsolver++' or 'ddim'; None is the teacher's.
            timer: called with a stage's name, gives a context to run the stage in.
            progress: called with the steps that are done and the steps in all, over all images.

        Returns:
            As many images. Their parameters have the drafts' entries, and ``refine``.

        Raises:
            HipaError: a bundle without the base model (``hipa-export --with-teacher``), or for
                another task; a value out of range; drafts of another base model, or made from
                another image; a backend that fails, or that has no engine of the base model
                (``hipa-build`` builds it).

        Example:
            >>> draft = pipe("3d emoji of a red apple", seed=3)
            >>> final = pipe.refine(draft, steps=15)

        """
        settings = refine_settings(self.bundle, steps, guidance, sampler, self.backend)
        if not isinstance(result, GenerateResult):
            raise HipaError(f"the drafts are {brief(result)}. Expected what a call returned.")
        jobs: list[ImageJob] = []
        drafts = zip(result.prompts, result.seeds, result.parameters, strict=True)
        for prompt, seed, parameters in drafts:
            choices = draft_choices(self.bundle, parameters)
            jobs += self.jobs([(prompt, seed)], refine=settings, **choices)
        check_count(len(jobs), 1)
        return joined(list(self._stream(jobs, timer, progress)))

    def edit(
        self,
        image: ImageSource,
        prompt: str | Sequence[str],
        *,
        strength: float | None = None,
        height: int | None = None,
        width: int | None = None,
        **options: Any,
    ) -> GenerateResult:
        """Edit ``image`` as ``prompt`` says.

        Args:
            image: a path, a Pillow image or an array; cropped and scaled to the bundle's size.
            prompt: what the image should become.
            strength: how much of the image may change, in (0, 1], one of the bundle's. None is the
                largest of them.
            height: pixels; None is the bundle's own size.
            width: pixels; None is the bundle's own size.
            options: ``seed``, ``count``, ``truncate``, ``prompt_weights`` and ``timer``, as a call
                takes them.

        Raises:
            HipaError: as a call does; no image; or a strength that the bundle does not have.

        Example:
            >>> pipe = OneStepPipeline.load("edit-bundle")
            >>> pipe.edit("apple.png", "flat emoji of a red apple", strength=0.6, seed=1)

        """
        source = edit_source(self.bundle, image, strength=strength, height=height, width=width)
        return self(prompt, source=source, **options)

    def inpaint(
        self,
        image: ImageSource,
        mask: ImageSource,
        prompt: str | Sequence[str],
        *,
        feather: int = DEFAULT_FEATHER,
        match: bool = True,
        height: int | None = None,
        width: int | None = None,
        **options: Any,
    ) -> GenerateResult:
        """Repaint what is white in ``mask``.

        Farther than ``feather`` pixels outside the mask the image, cropped and scaled to the
        bundle's size, is kept bit for bit.

        Args:
            image: a path, a Pillow image or an array.
            mask: the same, of the image's size; white is repainted.
            prompt: what the whole image should show.
            feather: pixels over which the seam is blended, 0 or more.
            match: shift the colours of the new part, so that they meet those around it. False
                shows them as they were generated.
            height: pixels; None is the bundle's own size.
            width: pixels; None is the bundle's own size.
            options: ``seed``, ``count``, ``truncate``, ``prompt_weights`` and ``timer``, as a call
                takes them.

        Raises:
            HipaError: as a call does; no image; a mask of another size, empty or full; or a
                negative ``feather``.

        Example:
            >>> pipe = OneStepPipeline.load("inpaint-bundle")
            >>> pipe.inpaint("room.png", "mask.png", "a room with a red sofa", seed=1)

        """
        source = inpaint_source(
            self.bundle, image, mask, feather=feather, match=match, height=height, width=width
        )
        return self(prompt, source=source, **options)

    def control(
        self,
        image: ImageSource,
        prompt: str | Sequence[str],
        *,
        scale: float = 1.0,
        height: int | None = None,
        width: int | None = None,
        **options: Any,
    ) -> GenerateResult:
        """Make images that follow a control image, with the bundle's ControlNet.

        Args:
            image: a path, a Pillow image or an array, as the ControlNet was trained to see: edges,
                depth, a pose. It is cropped and scaled to the bundle's size, and not changed
                otherwise.
            prompt: what the images show.
            scale: how strongly the image is followed, 0 to 2; diffusers'
                ``controlnet_conditioning_scale``.
            height: pixels; None is the bundle's own size.
            width: pixels; None is the bundle's own size.
            options: ``seed``, ``count``, ``truncate``, ``prompt_weights`` and ``timer``, as a call
                takes them.

        Raises:
            HipaError: as a call does; no image; or a scale out of range.

        Example:
            >>> pipe = OneStepPipeline.load("canny-bundle")
            >>> pipe.control("edges.png", "a house by the sea", scale=0.8, seed=1)

        """
        source = control_source(self.bundle, image, scale=scale, height=height, width=width)
        return self(prompt, source=source, **options)

    def upscale(
        self,
        image: ImageSource,
        prompt: str = "",
        *,
        overlap: int | None = None,
        truncate: bool = False,
        prompt_weights: bool | None = None,
        timer: Timer = nullcontext,
    ) -> GenerateResult:
        """Enlarge ``image`` by the bundle's factor, in tiles where it is larger than the bundle's.

        No noise goes into it: the same image and prompt give the same result.

        Args:
            image: a path, a Pillow image or an array, [H, W].
            prompt: what the image shows; may be empty.
            overlap: pixels of the result by which tiles overlap; None is an eighth of a tile.
            truncate: cut a prompt that is too long, in place of refusing it.
            prompt_weights: as a call takes it.
            timer: as a call takes it.

        Returns:
            One image, [factor * H, factor * W].

        Raises:
            HipaError: no image, a prompt that cannot be encoded, a bundle for another task, or an
                overlap out of range.

        Example:
            >>> pipe = OneStepPipeline.load("upscale-bundle")
            >>> pipe.upscale("small.png").images[0].save("large.png")

        """
        enlargement, jobs = self.tile_jobs(
            image, prompt, overlap=overlap, truncate=truncate, prompt_weights=prompt_weights
        )
        made = []
        # All tiles in one use: a swap between two would leave a seam in the image.
        with self._loaded.shared():
            for batch in cut(jobs, self.sizes_for(jobs[0])):
                made += self.make(batch, timer)
        return self.guard(merge_tiles(enlargement, made))

    def check_swaps(self) -> None:
        """Check that another adaptor could be taken: by its backend, and by its engine.

        With ``low_memory`` an engine is not looked at before it is loaded.

        Raises:
            HipaError: none could: OpenVINO takes none, and an engine only if it was built for it
                (``hipa-build --refit``).

        """
        self._loaded.check_swaps()

    def swap_adaptor(self, adaptor: str | Path | None) -> None:
        """Take another adaptor, without a rebuild.

        It may be called while other threads make images: their next batch has the new adaptor.

        Args:
            adaptor: a name in the bundle's ``adaptors`` folder, or a folder that
                ``hipa-export --swap-for`` wrote. None is the bundle's own again, exactly.

        Raises:
            HipaError: no such adaptor, one for another bundle, or an engine that cannot take it, as
                none takes another text encoder. The pipeline is as before; if an engine failed half
                way, it is closed.

        """
        swap = None
        if adaptor is not None:
            swap = AdaptorSwap.open(self.bundle, adaptor, remembered=not self._verify)
        self._loaded.swap(swap)


def _report(progress: Progress, batch: int, batches: int, done: int, steps: int) -> None:
    """The steps of one batch as a part of those of all batches."""
    progress(batch * steps + done, batches * steps)

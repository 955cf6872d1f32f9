"""From prompt to image in one step. ``OneStepPipeline._make_batch`` is the whole path.

Shape suffixes throughout the package: B batch, L tokens, D width of a context, C channels,
H W image size, h w latent size.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from hipa_deploy.bundle.adaptor_swap import TEXT_STAGE, TEXT_STAGE_2, AdaptorSwap, adapted_stage
from hipa_deploy.bundle.folder import Bundle, latent_shape
from hipa_deploy.bundle.manifest import Axis, RefineSettings
from hipa_deploy.embedded import BUNDLE as EMBEDDED_BUNDLE
from hipa_deploy.embedded import NAME as EMBEDDED_NAME
from hipa_deploy.embedded import resolve_bundle
from hipa_deploy.errors import HipaError, brief
from hipa_deploy.generate.jobs.batch_sizes import WarmUp, cut, prove, sizes_to_try
from hipa_deploy.generate.jobs.image_job import ImageJob, MadeImage
from hipa_deploy.generate.jobs.withheld import Flagged
from hipa_deploy.generate.noise import bundle_noise, check_seeds, initial_noise
from hipa_deploy.generate.open_stages import (
    Kept,
    StagesInTurn,
    open_runner,
    open_stages,
    resolve_backend,
)
from hipa_deploy.generate.prompts import CACHED_PROMPTS, Encode, PromptSource, open_prompts
from hipa_deploy.generate.refine.drafts import check_swap, draft_choices, refine_facts
from hipa_deploy.generate.refine.refiner import Progress, Refiner, refine_settings, refinement_of
from hipa_deploy.generate.request import check_count, check_pairs, check_prompts
from hipa_deploy.generate.runner import ENGINE_BACKENDS, ClosesAtExit, Runner, check_backend
from hipa_deploy.generate.stages import (
    Stages,
    Tensors,
    Timer,
    along_path,
    host_stages,
    input_names,
    join_context,
    output_names,
    split_context,
    stage_feed,
)
from hipa_deploy.images.read import ImageSource
from hipa_deploy.images.source import (
    EncodedImages,
    Source,
    Upscaling,
    batch_inputs,
    edit_source,
    inpaint_source,
    require_task,
    trial_sources,
    upscaling,
)
from hipa_deploy.marks.marker import ImageMarker, watermark_payload
from hipa_deploy.marks.safety import SAFETY_STAGE, Checker, SafetyChecker
from hipa_deploy.shared_use import SharedUse
from hipa_deploy.tasks import STEP_INPUTS

if TYPE_CHECKING:
    from hipa_deploy.engines.tensorrt.device_array import DeviceArray

DEFAULT_FEATHER = 8  # pixels


@dataclass(frozen=True)
class GenerateResult:
    """Images with the prompt, the seed and the generation parameters of each.

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


@dataclass(frozen=True)
class _Loaded:
    """The stages and whose weights they hold: one value, so that no call sees half a swap.

    Attributes:
        stages: every stage of the bundle, loaded.
        swap: the adaptor that was swapped in; None: the bundle's own.

    """

    stages: Stages
    swap: AdaptorSwap | None = None


class OneStepPipeline(ClosesAtExit):
    """A bundle, loaded on one backend: prompts in, images out, one UNet call each.

    Any thread may call it, several at once too. Backends that run one call at a time let the others
    wait. ``swap_adaptor`` and ``close`` wait for the batches that are under way, so the parameters
    of an image always name the adaptor that made it.

    Example:
        >>> with OneStepPipeline.load("emoji") as pipe:
        ...     result = pipe("3d emoji of a red apple", seed=0, count=2)
        >>> result.images_BHWC.shape
        (2, 64, 64, 3)
        >>> result.images[0].save("apple.png")

    """

    def __init__(
        self,
        bundle: Bundle,
        backend: str,
        stages: Stages,
        prompts: PromptSource | None = None,
        marker: ImageMarker = ImageMarker(),
        safety: Runner | None = None,
    ) -> None:
        self.bundle = bundle
        self.backend = backend
        self.load_seconds = 0.0
        self._verify = False
        self._loaded = _Loaded(stages)
        self._use = SharedUse()  # calls share what is loaded, a swap has it alone
        self._one_swap = threading.Lock()
        batch = bundle.manifest.batch
        self._batch = bundle.axes.get("batch", Axis(min=batch, opt=batch, max=batch))
        self._sizes: tuple[int, ...] = tuple(range(1, self._batch.max + 1))
        self._proven = False  # whether the sizes are those that a warm-up found
        self._prompts = open_prompts(bundle) if prompts is None else prompts
        self._encoded_images = EncodedImages()
        self._refiner = Refiner(bundle, backend)
        self._marker = marker
        self._safety = safety

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
        check_backend(backend)
        started = time.perf_counter()
        opened = Bundle.open(resolve_bundle(bundle))
        opened.verify(remembered=not verify)
        name = resolve_backend(backend, opened)
        # The tokenizer first: what is wrong with it is found before seconds of loading.
        prompts = open_prompts(opened)
        kept: Kept = "none"
        if cache:
            kept = "renew" if verify else "use"
        payload = _payload(opened, watermark)
        stages = open_stages(opened, name, low_memory=low_memory, kept=kept)
        safety = None
        try:
            if opened.manifest.safety is not None:
                if isinstance(stages, StagesInTurn):
                    safety = stages.runners[SAFETY_STAGE]
                else:
                    safety = open_runner(opened, SAFETY_STAGE, name, kept=kept)
            marker = ImageMarker(payload, _checkers(opened, safety, checker))
            pipeline = cls(opened, name, stages, prompts, marker, safety)
        except BaseException:
            stages.close()
            if safety is not None:
                safety.close()
            raise
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
            source: what a task makes the images from; ``edit``, ``inpaint`` and ``upscale`` make
                it.
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
                count out of range, a size or a task that the bundle was not exported for.

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
        return _joined(list(batches))

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
        return _joined(list(self._stream(jobs, timer)))

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
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        check_count(len(prompts), count)
        check_prompts(prompts)
        check_seeds(seed, count)
        pairs = [(text, seed + i) for text in prompts for i in range(count)]
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
        for first in range(0, len(jobs), together):
            some = jobs[first : first + together]
            if self.low_memory:
                self._encode_ahead(some, timer)
            batches = list(cut(some, self.sizes_for(jobs[0])))
            for number, batch in enumerate(batches):
                report = partial(_report, progress, number, len(batches)) if progress else None
                yield self.guard(finished_result(self.make(batch, timer, report)))

    def _encode_ahead(self, jobs: Sequence[ImageJob], timer: Timer) -> None:
        """Let the prompts of jobs be encoded and remembered."""
        with self._use.shared():
            self._prompts.feed([job.prepared for job in jobs], self._encode(self.stages, timer))

    def guard(self, result: GenerateResult) -> GenerateResult:
        """Withhold the images that a checker flags, and watermark the others.

        Every result of this pipeline has passed it. A program that takes images from ``make`` calls
        it before it shows them.

        Raises:
            HipaError: a checker fails.

        """
        marker = self._marker
        if marker.does_nothing:
            return result
        kept = []
        flagged = []
        for i, reason in enumerate(marker.reasons(result.images_BHWC)):
            if reason is None:
                kept.append(i)
            else:
                flagged.append(Flagged(i, result.prompts[i], result.seeds[i], reason))
        return GenerateResult(
            images_BHWC=marker.mark(result.images_BHWC[kept]),
            prompts=tuple(result.prompts[i] for i in kept),
            seeds=tuple(result.seeds[i] for i in kept),
            parameters=tuple({**result.parameters[i], **marker.facts} for i in kept),
            flagged=tuple(flagged),
        )

    def jobs(
        self,
        requests: Iterable[tuple[str, int]],
        *,
        source: Source | None = None,
        height: int | None = None,
        width: int | None = None,
        truncate: bool = False,
        prompt_weights: bool | None = None,
        refine: RefineSettings | None = None,
    ) -> list[ImageJob]:
        """Check requests and make a job of each, for ``make``. Nothing is computed yet.

        A program that collects the requests of many users into batches of its own, such as
        ``hipa-serve``, calls this for each request and ``make`` for each batch.

        Args:
            requests: pairs of a prompt and a seed.
            source: as a call takes it, for all of them.
            height: as a call takes it.
            width: as a call takes it.
            truncate: as a call takes it.
            prompt_weights: as a call takes it.
            refine: what ``refine_settings`` of ``hipa_deploy.generate.refine.refiner`` gave: the
                base model makes these images, in many steps.

        Raises:
            HipaError: as ``generate`` does; or ``refine`` for a bundle that does not refine.

        """
        pairs = check_pairs(requests)
        if refine is not None:
            refinement_of(self.bundle, self.backend, low_memory=self.low_memory)
        latent_CHW = self._latent_shape(source, height, width)
        weights = self._prompts.reads_weights(prompt_weights)
        texts = list(dict.fromkeys(text for text, _ in pairs))
        size = self._pixels(latent_CHW)
        tokens = self._prompts.prepare(texts, truncate=truncate, weights=weights, size=size)
        prepared = dict(zip(texts, tokens, strict=True))
        facts: dict[str, Any] = {"truncate": truncate, "prompt_weights": weights}
        if source:
            facts |= source.facts
        jobs = []
        for text, seed in pairs:
            jobs.append(ImageJob(text, seed, prepared[text], latent_CHW, source, facts, refine))
        return jobs

    def make(
        self,
        jobs: Sequence[ImageJob],
        timer: Timer = nullcontext,
        progress: Progress | None = None,
    ) -> list[MadeImage]:
        """Make one batch of jobs of this pipeline, whoever asked for them.

        Args:
            jobs: 1 to the bundle's largest batch, whose ``company`` is equal.
            timer: as a call takes it.
            progress: of jobs to refine: called with the steps that are done, and the steps in all.

        Returns:
            The images in the order of ``jobs``, not finished yet (``MadeImage.finished``).

        Raises:
            HipaError: too many jobs or none, jobs that cannot share a batch, or a backend that
                fails.

        """
        if not 1 <= len(jobs) <= self._batch.max:
            raise HipaError(f"got {len(jobs)} jobs. Expected 1 to {self._batch.max} in a batch.")
        if len({job.company for job in jobs}) > 1:
            raise HipaError(
                "the jobs differ in size, strength or refining. Make a batch of each kind."
            )
        with self._use.shared():
            loaded = self._loaded
            if jobs[0].refine is None:
                images_BHWC = self._make_batch(loaded.stages, jobs, timer)["images"]
            else:
                images_BHWC = self._refine_batch(loaded, jobs, timer, progress)
        height, width = images_BHWC.shape[1:3]
        made = []
        for job, image_HWC in zip(jobs, images_BHWC, strict=True):
            facts = {"height": height, "width": width, **job.facts}
            if job.refine is not None:
                facts["refine"] = refine_facts(self.bundle, job.refine)
            parameters = self._parameters(loaded.swap, job.prompt, job.seed, facts)
            made.append(MadeImage(job, image_HWC, parameters))
        return made

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """How many jobs a batch may have, ascending: all up to the largest, until ``warmup``."""
        return self._sizes

    def sizes_for(self, job: ImageJob) -> tuple[int, ...]:
        """How many jobs like this one a batch may have, ascending.

        After ``warmup`` these are ``batch_sizes`` for the bundle's own height and width. Kernels
        depend on the size, so jobs of another one are made one by one. So are jobs to refine: their
        many steps were not part of the proof.
        """
        if job.refine is not None:
            return (self._batch.min,)
        own = job.latent_CHW == latent_shape(self.bundle, None, None)
        return self._sizes if own or not self._proven else self._sizes[:1]

    def warmup(self, largest: int | None = None) -> WarmUp:
        """Make the first images, and find the batch sizes that are worth using.

        The first image of a size takes longer: kernels are compiled, and CUDA graphs captured. And
        only a measurement on this machine tells whether a batch changes an image, as
        ``hipa_deploy.generate.jobs.batch_sizes`` says. From now on the pipeline uses only sizes of
        which every image, at every place, was bit for bit that of the job alone, and that are
        faster an image than smaller ones.

        Args:
            largest: the most images that a batch should have; None is the bundle's largest.

        Raises:
            HipaError: a backend that fails, or ``largest`` below 1.

        Example:
            >>> pipe.warmup().sizes
            (1, 2, 4)

        """
        if largest is not None and largest < 1:
            raise HipaError(f"largest is {largest}. Expected 1 or more images in a batch.")
        sizes = sizes_to_try(self._batch, largest)
        found = prove(self._try_batch, self._trial_jobs(sizes[-1]), sizes)
        self._sizes = found.sizes
        self._proven = True
        return found

    def _trial_jobs(self, count: int) -> list[ImageJob]:
        """Different jobs of the bundle's own size, of its task."""
        texts = self._prompts.samples()
        weights = self._prompts.reads_weights(None)
        latent_CHW = latent_shape(self.bundle, None, None)
        size = self._pixels(latent_CHW)
        prepared = self._prompts.prepare(list(texts), truncate=True, weights=weights, size=size)
        sources: Sequence[Source | None] = trial_sources(self.bundle, count) or [None] * count
        jobs = []
        for seed, source in enumerate(sources):
            place = seed % len(texts)
            jobs.append(ImageJob(texts[place], seed, prepared[place], latent_CHW, source))
        return jobs

    def _try_batch(self, jobs: Sequence[ImageJob]) -> Tensors:
        """Images, and the latents before they are rounded to 8 bits where they are at hand."""
        also: list[str] = []
        for stage in self.bundle.manifest.stages:
            also += output_names(stage.spec, self.bundle.manifest.layout)
        with self._use.shared():
            wanted = ["latents"] if "latents" in also else []
            return self._make_batch(self.stages, jobs, nullcontext, wanted)

    def _make_batch(
        self, stages: Stages, jobs: Sequence[ImageJob], timer: Timer, also: Sequence[str] = ()
    ) -> Tensors:
        """The whole path, from prompts to images uint8 [B, H, W, 3], for one batch.

        Returns:
            'images' and the tensors that ``also`` names, an entry a job.

        """
        padded = self._padded(jobs)
        prompts = [job.prepared for job in padded]

        # context_BLD, or tokens_BL of one prompt that the text encoder has not seen lately.
        text = self._text_feed(prompts, stages, timer)
        # noise_BCHW; of a task with a source image also image_BHWC (or source_BCHW), mask and step.
        sources = [job.source for job in padded if job.source]
        start = self._start([job.seed for job in padded], jobs[0].latent_CHW, sources)

        # text_encoder: tokens_BL                -> context_BLD (of SDXL also conditioning_BSK)
        #   (of SDXL in the generic layout two encoders, and context_BLD with pooled_BP)
        # vae_encoder:  image_BHWC               -> source_BCHW
        # unet:         noise_BCHW, context_BLD  -> latents_BCHW, which are x0: the one step
        # vae_decoder:  latents_BCHW             -> images_BHWC
        outputs = ["images", *also, *self._worth_keeping(text | start)]
        made = stages.run(text | start, outputs, timer)

        # The next batch of these prompts, or from these images, starts from what is known now.
        if "context" in made:
            self._prompts.keep(prompts, {name: made[name] for name in self._text_outputs()})
        if "source" in made:
            self._encoded_images.keep(start["image"], made["source"])
        return {name: made[name][: len(jobs)] for name in ("images", *also)}

    def _refine_batch(
        self,
        loaded: _Loaded,
        jobs: Sequence[ImageJob],
        timer: Timer,
        progress: Progress | None,
    ) -> np.ndarray:
        """The base model's images uint8 [B, H, W, 3] of one batch, from the noise of the drafts."""
        settings = jobs[0].refine
        assert settings is not None
        check_swap(self.bundle, loaded.swap)
        padded = self._padded(jobs)
        prompts = [job.prepared for job in padded]
        encode = self._encode(loaded.stages, timer)
        text = self._prompts.feed(prompts, encode)
        if "context" not in text:
            text = encode(text)
            self._prompts.keep(prompts, text)
        noise_BCHW = initial_noise([job.seed for job in padded], jobs[0].latent_CHW)
        latents_BCHW = self._refiner.latents(noise_BCHW, text, settings, timer, progress)
        # The decoder alone runs: what the stages before it would give is there.
        feed = {name: text[name] for name in self._text_outputs()}
        feed["latents"] = latents_BCHW
        images_BHWC = loaded.stages.run(feed, ["images"], timer)["images"]
        return images_BHWC[: len(jobs)]

    def _text_feed(self, prompts: list[Any], stages: Stages, timer: Timer) -> Tensors:
        """What the stages of the one step start from of the text."""
        text = self._prompts.feed(prompts, self._encode(stages, timer))
        # Where no text stage gives it, none takes it either: it is for the base UNet.
        if TEXT_STAGE not in self.bundle.stages:
            text.pop("pooled", None)
        return text

    def _worth_keeping(self, feed: Mapping[str, np.ndarray]) -> list[str]:
        """Tensors to keep for the next batch: those that this batch must compute first."""
        names = self._text_outputs() if "tokens" in feed else []
        return [*names, "source"] if "image" in feed else names

    def _text_outputs(self) -> list[str]:
        """What the path calls the outputs of the text stage; nothing without one."""
        stages = self.bundle.stages
        if TEXT_STAGE_2 in stages:
            return ["context", "pooled"]
        if TEXT_STAGE not in stages:
            return []
        return list(output_names(stages[TEXT_STAGE].spec, self.bundle.manifest.layout))

    def _padded(self, jobs: Sequence[ImageJob]) -> list[ImageJob]:
        """As many jobs as the bundle's smallest batch: what is missing repeats the last one."""
        missing = max(0, self._batch.min - len(jobs))
        return [*jobs, *[jobs[-1]] * missing]

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
                another task; a value out of range; drafts of another base model; a backend that
                fails, or that has no engine of the base model (``hipa-build`` builds it).

        Example:
            >>> draft = pipe("3d emoji of a red apple", seed=3)
            >>> final = pipe.refine(draft, steps=15)

        """
        settings = refine_settings(self.bundle, steps, guidance, sampler, self.backend)
        jobs: list[ImageJob] = []
        drafts = zip(result.prompts, result.seeds, result.parameters, strict=True)
        for prompt, seed, parameters in drafts:
            choices = draft_choices(self.bundle, parameters)
            jobs += self.jobs([(prompt, seed)], refine=settings, **choices)
        check_count(len(jobs), 1)
        return _joined(list(self._stream(jobs, timer, progress)))

    def _encode(self, stages: Stages, timer: Timer) -> Encode:
        """The text encoder, for one prompt."""
        return partial(_encode, self.bundle, stages, timer, self._batch.min)

    def _start(
        self, seeds: Sequence[int], latent_CHW: tuple[int, int, int], sources: Sequence[Source]
    ) -> dict[str, np.ndarray]:
        """What the step starts from beside the text: noise, and the sources' images and masks."""
        manifest = self.bundle.manifest
        noise = {}
        if "noise" in STEP_INPUTS[manifest.task]:
            noise["noise"] = bundle_noise(seeds, latent_CHW, manifest.one_step, manifest.layout)
        return self._encoded_images.feed(noise | batch_inputs(sources))

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
            self.bundle, image, mask, feather=feather, height=height, width=width
        )
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
        with self._use.shared():
            for batch in cut(jobs, self.sizes_for(jobs[0])):
                made += self.make(batch, timer)
        return self.guard(merge_tiles(enlargement, made))

    def tile_jobs(
        self,
        image: ImageSource,
        prompt: str = "",
        *,
        overlap: int | None = None,
        truncate: bool = False,
        prompt_weights: bool | None = None,
    ) -> tuple[Upscaling, list[ImageJob]]:
        """Check a request to enlarge an image, and make a job of each tile; see ``upscale``.

        ``merge_tiles`` puts the tiles together. All of them must be made with one adaptor.

        Raises:
            HipaError: as ``upscale`` does.

        """
        check_prompts([prompt])
        enlargement = upscaling(self.bundle, image, overlap=overlap)
        self._marker.check_size(enlargement.height, enlargement.width)
        weights = self._prompts.reads_weights(prompt_weights)
        latent_CHW = latent_shape(self.bundle, None, None)
        (prepared,) = self._prompts.prepare(
            [prompt], truncate=truncate, weights=weights, size=self._pixels(latent_CHW)
        )
        facts = {"truncate": truncate, "prompt_weights": weights}
        jobs = []
        for tile in enlargement.tiles:
            jobs.append(ImageJob(prompt, 0, prepared, latent_CHW, tile, facts))
        return enlargement, jobs

    def generate_on_device(
        self,
        prompt: str,
        *,
        source: Source | None = None,
        seed: int = 0,
        count: int = 1,
        height: int | None = None,
        width: int | None = None,
        truncate: bool = False,
        prompt_weights: bool | None = None,
    ) -> DeviceArray:
        """One batch of images, uint8 [count, H, W, 3], left on the device.

        See ``DeviceArray`` for how long it lives. The images are as the decoder gives them: an
        inpainting's composite (``source.finish``) is left to the caller.

        Raises:
            HipaError: as a call does; a backend that gives host arrays; or more or fewer images
                than a batch holds.

        """
        if not self._marker.does_nothing:
            raise HipaError(
                "the images of this bundle are checked or watermarked, which is done on the host. "
                "Call the pipeline, or load it with watermark=False if its images are only "
                "watermarked."
            )
        check_seeds(seed, count)
        if count not in self._batch:
            raise HipaError(f"count is {count}, a batch of this bundle holds {self._batch}.")
        latent_CHW = self._latent_shape(source, height, width)
        sources = [source] * count if source else []
        weights = self._prompts.reads_weights(prompt_weights)
        size = self._pixels(latent_CHW)
        prepared = self._prompts.prepare([prompt], truncate=truncate, weights=weights, size=size)
        start = self._start(range(seed, seed + count), latent_CHW, sources)
        with self._use.shared():
            text = self._text_feed(prepared * count, self.stages, nullcontext)
            images: DeviceArray = self.stages.run_on_device(text | start)["images"]
        return images

    def tensors(
        self,
        prompt: str,
        *,
        source: Source | None = None,
        seed: int = 0,
        count: int = 1,
        prompt_weights: bool | None = None,
    ) -> Tensors:
        """Every tensor along the path of one batch, by name: for checks and profiles of a stage.

        The names and shapes are those of ``hipa_deploy.generate.stages``. Every stage runs: nothing
        that is cached is taken. Of a prompt with weights the context has them, and is then not what
        the text encoder gives for the tokens.

        Raises:
            HipaError: as a call does.

        """
        # With empty caches.
        fresh = OneStepPipeline(self.bundle, self.backend, self.stages)
        latent_CHW = self._latent_shape(source, None, None)
        weights = fresh._prompts.reads_weights(prompt_weights)
        size = self._pixels(latent_CHW)
        prepared = fresh._prompts.prepare([prompt], truncate=False, weights=weights, size=size)
        with self._use.shared():
            feed = fresh._text_feed(prepared * count, self.stages, nullcontext)
        sources = [source] * count if source else []
        feed |= fresh._start(range(seed, seed + count), latent_CHW, sources)

        # Everything that a stage takes or gives, and that is not in the feed already.
        layout = self.bundle.manifest.layout
        names: list[str] = []
        for stage in self.bundle.manifest.stages:
            names += input_names(stage.spec, layout)
            names += output_names(stage.spec, layout)
        computed = []
        for name in dict.fromkeys([*names, "images"]):
            if name not in feed and name not in ("tokens", "tokens_2", "sizes"):
                computed.append(name)
        parts: Tensors = {}
        if TEXT_STAGE_2 in self.bundle.stages and "context" in feed:
            parts = split_context(feed["context"], self.bundle.manifest.text_widths)
            computed = [name for name in computed if name not in parts]
        with self._use.shared():
            found = feed | parts | self.stages.run(feed, computed)
        # Of several images the text encoder was run by itself, so the tokens are not in the feed.
        if TEXT_STAGE in self.bundle.stages:
            for name, value in prepared[0].tensors().items():
                found.setdefault(name, np.repeat(value, count, axis=0))
        return found

    @property
    def stages(self) -> Stages:
        """The stages that are loaded now."""
        return self._loaded.stages

    @property
    def low_memory(self) -> bool:
        """Whether the stages are loaded in turn."""
        return isinstance(self.stages, StagesInTurn)

    @property
    def swapped(self) -> AdaptorSwap | None:
        """The adaptor that was swapped in; None: the bundle's own."""
        return self._loaded.swap

    @property
    def safety(self) -> Runner | None:
        """The safety checker's network; None where the bundle has none."""
        return self._safety

    @property
    def runners(self) -> dict[str, Runner]:
        """Each stage by itself, in the order in which they run."""
        return self.stages.runners

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
        from hipa_deploy.generate.swap_stage import swap_stage, swap_text_encoder  # the engines

        swap = (
            None
            if adaptor is None
            else AdaptorSwap.open(self.bundle, adaptor, remembered=not self._verify)
        )
        stage = adapted_stage(self.bundle)
        if isinstance(self.stages, StagesInTurn):
            with self._one_swap, self._use.alone():
                texts = _changed_texts(swap, self.swapped)
                self.stages.swap(swap)
                self._loaded = _Loaded(self.stages, swap)
                if texts:
                    self._prompts.forget()
            return
        with self._one_swap:
            runner = self.runners[stage]
            changed: dict[str, Runner] = {}
            texts = _changed_texts(swap, self.swapped)
            for name in texts:
                changed[name] = swap_text_encoder(self.bundle, self.backend, swap, name)
            if self.backend in ENGINE_BACKENDS:
                # An engine changes in place, so no call may be under way meanwhile.
                with self._use.alone():
                    swap_stage(self.bundle, runner, self.backend, swap)
                    self._loaded = _Loaded(self.stages, swap)
                return

            # ONNX Runtime gets new sessions. Calls go on with the old ones while they load.
            changed[stage] = swap_stage(self.bundle, runner, self.backend, swap)
            before = [self.runners[name] for name in changed]
            runners = {**self.runners, **changed}
            with self._use.alone():
                self._loaded = _Loaded(host_stages(self.bundle, self.backend, runners), swap)
                if texts:
                    self._prompts.forget()
                for old in before:
                    old.close()

    def _latent_shape(
        self, source: Source | None, height: int | None, width: int | None
    ) -> tuple[int, int, int]:
        """[C, h, w] of what is asked for, after a check that this bundle makes it."""
        require_task(self.bundle, source.task if source else "generate")
        if source:
            height, width = source.image_HWC.shape[:2]
        shape = latent_shape(self.bundle, height, width)
        step = self.bundle.manifest.one_step
        self._marker.check_size(height or step.height, width or step.width)
        return shape

    def _pixels(self, latent_CHW: tuple[int, int, int]) -> tuple[int, int]:
        """Height and width in pixels of the images of such latents."""
        step = self.bundle.manifest.one_step
        factor = step.height // step.latent_shape[1]
        return latent_CHW[1] * factor, latent_CHW[2] * factor

    def _parameters(
        self, swap: AdaptorSwap | None, prompt: str, seed: int, facts: Mapping[str, Any]
    ) -> dict[str, Any]:
        """All that reproduces an image: what a PNG carries."""
        manifest = self.bundle.manifest
        adaptor = manifest.adaptor
        loras = manifest.loras
        unet_sha256 = manifest.files[self.bundle.stages[adapted_stage(self.bundle)].path]
        if swap:
            adaptor = swap.manifest.adaptor
            loras = swap.manifest.loras
            unet_sha256 = swap.manifest.onnx_sha256
        # Images of a bundle without LoRAs have the parameters that they always had.
        added = {"loras": [lora.model_dump(mode="json") for lora in loras]} if loras else {}
        return {
            "producer": manifest.producer,
            "prompt": prompt,
            "seed": seed,
            **facts,
            "backend": self.backend,
            "precision": manifest.precision,
            "base_model": manifest.base_model.sha256,
            "adaptor": adaptor.sha256 if adaptor else None,
            **added,
            "unet": unet_sha256,
            "bundle": self.bundle.sha256,
            "bundle_name": _name_of(self.bundle),
        }

    def close(self) -> None:
        """Release every stage, after the batches that are under way.

        Calling it twice is harmless.
        """
        with self._use.alone():
            self.stages.close()
            self._refiner.close()
            if self._safety is not None:
                self._safety.close()


def _payload(bundle: Bundle, watermark: bool | int | None) -> int | None:
    """The watermark's number; None for no watermark."""
    unet = bundle.manifest.files[bundle.stages[adapted_stage(bundle)].path]
    return watermark_payload(bundle.manifest.marks, unet, watermark)


def bundle_marker(bundle: Bundle, safety: Runner | None) -> ImageMarker:
    """What a bundle's owner wants done to every image, for stages that another program runs.

    Args:
        bundle: the bundle.
        safety: its safety checker's network; None where it has none.

    """
    return ImageMarker(_payload(bundle, None), _checkers(bundle, safety, None))


def _checkers(bundle: Bundle, network: Runner | None, own: Checker | None) -> tuple[Checker, ...]:
    """What sees every image: the bundle's safety checker, then the user's."""
    checkers: list[Checker] = []
    safety = bundle.manifest.safety
    if safety is not None and network is not None:
        checkers.append(SafetyChecker(network, safety.settings))
    if own is not None:
        checkers.append(own)
    return tuple(checkers)


def _name_of(bundle: Bundle) -> str:
    """What a user calls the bundle, without the folder that it lies in."""
    root = bundle.root.resolve()
    return EMBEDDED_NAME if root == EMBEDDED_BUNDLE.resolve() else root.name


def _report(progress: Progress, batch: int, batches: int, done: int, steps: int) -> None:
    """The steps of one batch as a part of those of all batches."""
    progress(batch * steps + done, batches * steps)


def _changed_texts(*swaps: AdaptorSwap | None) -> list[str]:
    """The text encoders that one of these swaps changes, a stage each."""
    stages: dict[str, None] = {}
    for swap in swaps:
        if swap is not None:
            stages |= dict.fromkeys(swap.manifest.texts)
    return list(stages)


def _encode(
    bundle: Bundle, stages: Stages, timer: Timer, smallest: int, tokens: Tensors
) -> Tensors:
    """What the text stage alone gives for one prompt: the context [1, L, D] of tokens [1, L]."""
    layout = bundle.manifest.layout
    padded = {name: np.repeat(value, smallest, axis=0) for name, value in tokens.items()}
    made: Tensors = {}
    for name in (TEXT_STAGE, TEXT_STAGE_2):
        if name not in bundle.stages:
            continue
        encoder = stages.runners[name]
        with timer(name):
            outputs = encoder(**stage_feed(encoder.spec, padded, layout))
        made |= along_path(encoder.spec, outputs, layout)
    if TEXT_STAGE_2 in bundle.stages:
        made = {"context": join_context(made), "pooled": made["pooled"]}
    return {name: value[:1] for name, value in made.items()}


def merge_tiles(enlargement: Upscaling, made: Sequence[MadeImage]) -> GenerateResult:
    """Put the tiles of ``OneStepPipeline.tile_jobs`` together: one image."""
    image_HWC = enlargement.merge(np.stack([tile.stage_image_HWC for tile in made]))
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


def _joined(batches: Sequence[GenerateResult]) -> GenerateResult:
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

"""From jobs to images, a batch at a time. ``BatchMaker._one_step`` is the whole path of one batch.

Shape suffixes throughout the package: B batch, L tokens, D width of a context, C channels,
H W image size, h w latent size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from hipa_deploy.bundle.adaptor_swap import TEXT_STAGE, TEXT_STAGE_2
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.errors import HipaError
from hipa_deploy.generate.jobs.finite import check_finite
from hipa_deploy.generate.jobs.image_job import ImageJob, MadeImage
from hipa_deploy.generate.jobs.image_parameters import image_parameters
from hipa_deploy.generate.jobs.sizes_in_use import batch_axis
from hipa_deploy.generate.noise import bundle_noise, initial_noise
from hipa_deploy.generate.open_stages import StagesInTurn
from hipa_deploy.generate.parts.loaded_stages import Loaded, LoadedStages
from hipa_deploy.generate.prompts import Encode, PromptSource
from hipa_deploy.generate.refine.drafts import check_swap, refine_facts
from hipa_deploy.generate.refine.refiner import Progress, Refiner
from hipa_deploy.generate.stages import (
    Stages,
    Tensors,
    Timer,
    along_path,
    computed_names,
    join_context,
    output_names,
    stage_feed,
)
from hipa_deploy.images.source import EncodedImages, batch_inputs
from hipa_deploy.tasks import STEP_INPUTS

if TYPE_CHECKING:
    from hipa_deploy.engines.tensorrt.device_array import DeviceArray


class BatchMaker:
    """Makes batches of jobs on the stages that are loaded, and remembers what the next can use.

    Any thread may call it.

    Args:
        bundle: that makes the images.
        backend: that runs the stages, not 'auto'.
        loaded: the stages; they stay the caller's to close.
        prompts: the bundle's prompt source, with the contexts that it remembers.

    """

    def __init__(
        self, bundle: Bundle, backend: str, loaded: LoadedStages, prompts: PromptSource
    ) -> None:
        self._bundle = bundle
        self._backend = backend
        self._loaded = loaded
        self._prompts = prompts
        self._batch = batch_axis(bundle)
        self._encoded_images = EncodedImages()
        self._refiner = Refiner(bundle, backend)
        self._floats = _known_floats(bundle)

    def make(
        self, jobs: Sequence[ImageJob], timer: Timer, progress: Progress | None
    ) -> list[MadeImage]:
        """Make one batch; see ``OneStepPipeline.make``."""
        jobs = list(jobs)
        if not 1 <= len(jobs) <= self._batch.max:
            raise HipaError(f"got {len(jobs)} jobs. Expected 1 to {self._batch.max} in a batch.")
        if len({job.company for job in jobs}) > 1:
            raise HipaError(
                "the jobs differ in size, strength or refining. Make a batch of each kind."
            )
        with self._loaded.shared() as loaded:
            if jobs[0].refine is None:
                images_BHWC = self._checked_step(loaded.stages, jobs, timer)
            else:
                images_BHWC = self._refined(loaded, jobs, timer, progress)
        height, width = images_BHWC.shape[1:3]
        made = []
        for job, image_HWC in zip(jobs, images_BHWC, strict=True):
            facts = {"height": height, "width": width, **job.facts}
            if job.refine is not None:
                facts["refine"] = refine_facts(self._bundle, job.refine)
            parameters = image_parameters(
                self._bundle, self._backend, loaded.swap, job.prompt, job.seed, facts
            )
            made.append(MadeImage(job, image_HWC, parameters))
        return made

    def make_on_device(self, jobs: Sequence[ImageJob]) -> DeviceArray:
        """Make one batch and leave its images on the device, uint8 [B, H, W, 3].

        Nothing comes to the host, so NaN of a network that overflows is not noticed.

        Raises:
            HipaError: the backend gives host arrays, or fails.

        """
        start = self.start(jobs)
        with self._loaded.shared() as loaded:
            text = self.text_feed(jobs, loaded.stages, nullcontext)
            images: DeviceArray = loaded.stages.run_on_device(text | start)["images"]
        return images

    def try_batch(self, jobs: Sequence[ImageJob]) -> Tensors:
        """Images, and the latents before they are rounded to 8 bits where they are at hand.

        NaN is not refused: whoever asks wants to see it.
        """
        wanted = [name for name in self._floats if name == "latents"]
        with self._loaded.shared() as loaded:
            return self._one_step(loaded.stages, jobs, nullcontext, wanted)

    def encode_ahead(self, jobs: Sequence[ImageJob], timer: Timer) -> None:
        """Let the prompts of jobs be encoded and remembered."""
        with self._loaded.shared() as loaded:
            prompts = [job.prepared for job in jobs]
            self._prompts.feed(prompts, self._encode(loaded.stages, timer))

    def text_feed(self, jobs: Sequence[ImageJob], stages: Stages, timer: Timer) -> Tensors:
        """What the stages of the one step start from of the text."""
        prompts = [job.prepared for job in jobs]
        text = self._prompts.feed(prompts, self._encode(stages, timer))
        # Where no text stage gives it, none takes it either: it is for the base UNet.
        if TEXT_STAGE not in self._bundle.stages:
            text.pop("pooled", None)
        return text

    def start(self, jobs: Sequence[ImageJob]) -> Tensors:
        """What the step starts from beside the text: noise, and the sources' images and masks."""
        manifest = self._bundle.manifest
        noise = {}
        if "noise" in STEP_INPUTS[manifest.task]:
            seeds = [job.seed for job in jobs]
            shape_CHW = jobs[0].latent_CHW
            noise["noise"] = bundle_noise(seeds, shape_CHW, manifest.one_step, manifest.layout)
        sources = [job.source for job in jobs if job.source]
        return self._encoded_images.feed(noise | batch_inputs(sources))

    def close(self) -> None:
        """Release the base UNet that refines. Calling it twice is harmless."""
        self._refiner.close()

    def _checked_step(self, stages: Stages, jobs: Sequence[ImageJob], timer: Timer) -> np.ndarray:
        """The images of the one step, uint8 [B, H, W, 3].

        Raises:
            NotFiniteError: a network gave NaN or infinity for one of them.

        """
        made = self._one_step(stages, jobs, timer, list(self._floats))
        for name, what in self._floats.items():
            check_finite(made[name], jobs, what, self._backend)
        return made["images"]

    def _one_step(
        self, stages: Stages, jobs: Sequence[ImageJob], timer: Timer, also: Sequence[str] = ()
    ) -> Tensors:
        """The whole path, from prompts to images uint8 [B, H, W, 3], for one batch.

        Returns:
            'images' and the tensors that ``also`` names, an entry a job.

        """
        padded = self._padded(jobs)

        # context_BLD, or tokens_BL of one prompt that the text encoder has not seen lately.
        text = self.text_feed(padded, stages, timer)
        # noise_BCHW; of a task with a source image also image_BHWC (or source_BCHW), mask and step.
        start = self.start(padded)

        # text_encoder: tokens_BL                -> context_BLD (of SDXL also conditioning_BSK)
        #   (of SDXL in the generic layout two encoders, and context_BLD with pooled_BP)
        # vae_encoder:  image_BHWC               -> source_BCHW
        # unet:         noise_BCHW, context_BLD  -> latents_BCHW, which are x0: the one step
        # vae_decoder:  latents_BCHW             -> images_BHWC
        outputs = ["images", *also, *self._worth_keeping(text | start)]
        made = stages.run(text | start, outputs, timer)

        # The next batch of these prompts, or from these images, starts from what is known now.
        if "context" in made:
            prompts = [job.prepared for job in padded]
            self._prompts.keep(prompts, {name: made[name] for name in self._text_outputs()})
        if "source" in made:
            self._encoded_images.keep(start["image"], made["source"])
        return {name: made[name][: len(jobs)] for name in ("images", *also)}

    def _refined(
        self,
        loaded: Loaded,
        jobs: Sequence[ImageJob],
        timer: Timer,
        progress: Progress | None,
    ) -> np.ndarray:
        """The base model's images uint8 [B, H, W, 3] of one batch, from the noise of the drafts."""
        settings = jobs[0].refine
        assert settings is not None
        check_swap(self._bundle, loaded.swap)
        padded = self._padded(jobs)
        prompts = [job.prepared for job in padded]
        encode = self._encode(loaded.stages, timer)
        text = self._prompts.feed(prompts, encode)
        if "context" not in text:
            text = encode(text)
            self._prompts.keep(prompts, text)
        noise_BCHW = initial_noise([job.seed for job in padded], jobs[0].latent_CHW)
        with self._room_for_refiner(loaded.stages):
            latents_BCHW = self._refiner.latents(noise_BCHW, text, settings, timer, progress)
        check_finite(latents_BCHW[: len(jobs)], jobs, "the base model", self._backend)
        # The decoder alone runs: what the stages before it would give is there.
        feed = {name: text[name] for name in self._text_outputs()}
        feed["latents"] = latents_BCHW
        images_BHWC = loaded.stages.run(feed, ["images"], timer)["images"]
        return images_BHWC[: len(jobs)]

    @contextmanager
    def _room_for_refiner(self, stages: Stages) -> Iterator[None]:
        """Where stages are loaded in turn, the base UNet is one of them: nothing is beside it."""
        if not isinstance(stages, StagesInTurn):
            yield
            return
        with stages.one_call():
            stages.make_room()
            try:
                yield
            finally:
                self._refiner.release()

    def _worth_keeping(self, feed: Mapping[str, np.ndarray]) -> list[str]:
        """Tensors to keep for the next batch: those that this batch must compute first."""
        names = self._text_outputs() if "tokens" in feed else []
        return [*names, "source"] if "image" in feed else names

    def _text_outputs(self) -> list[str]:
        """What the path calls the outputs of the text stage; nothing without one."""
        stages = self._bundle.stages
        if TEXT_STAGE_2 in stages:
            return ["context", "pooled"]
        if TEXT_STAGE not in stages:
            return []
        return list(output_names(stages[TEXT_STAGE].spec, self._bundle.manifest.layout))

    def _padded(self, jobs: Sequence[ImageJob]) -> list[ImageJob]:
        """As many jobs as the bundle's smallest batch: what is missing repeats the last one."""
        missing = max(0, self._batch.min - len(jobs))
        return [*jobs, *[jobs[-1]] * missing]

    def _encode(self, stages: Stages, timer: Timer) -> Encode:
        """The text encoder, for one prompt."""
        return partial(_encode, self._bundle, stages, timer, self._batch.min)


def _known_floats(bundle: Bundle) -> dict[str, str]:
    """What is known of an image before it is uint8, and what makes it, for messages.

    In the onestep layout the decoder itself makes uint8. A bundle of one fused stage has nothing
    else.
    """
    made: set[str] = set()
    for stage in bundle.stages:
        made.update(computed_names(bundle, stage))
    known = {"latents": "the one step", "sample": "the decoder"}
    return {name: what for name, what in known.items() if name in made}


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

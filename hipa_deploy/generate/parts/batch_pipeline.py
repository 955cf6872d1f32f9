"""A loaded bundle that makes batches of jobs: for programs that make batches of their own.

A request becomes jobs (``JobMaker``), and a batch of jobs becomes images (``BatchMaker``, whose
``_one_step`` is the whole path), on stages that any number of calls share and a swap changes
(``LoadedStages``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

from hipa_deploy.bundle.adaptor_swap import AdaptorSwap
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.bundle.manifest import RefineSettings
from hipa_deploy.errors import HipaError, whole_number
from hipa_deploy.generate.jobs.batch_sizes import WarmUp
from hipa_deploy.generate.jobs.image_job import ImageJob, MadeImage
from hipa_deploy.generate.jobs.result import GenerateResult
from hipa_deploy.generate.jobs.sizes_in_use import SizesInUse
from hipa_deploy.generate.noise import check_seeds
from hipa_deploy.generate.parts.batch_maker import BatchMaker
from hipa_deploy.generate.parts.image_guard import guarded
from hipa_deploy.generate.parts.job_maker import JobMaker
from hipa_deploy.generate.parts.loaded_stages import LoadedStages
from hipa_deploy.generate.parts.path_tensors import path_tensors
from hipa_deploy.generate.prompts import PromptSource, open_prompts
from hipa_deploy.generate.refine.refiner import Progress, refinement_of
from hipa_deploy.generate.request import check_pairs
from hipa_deploy.generate.runner import ClosesAtExit, Runner
from hipa_deploy.generate.stages import Stages, Tensors, Timer
from hipa_deploy.images.read import ImageSource
from hipa_deploy.images.source import MAX_TILES, Source, Upscaling
from hipa_deploy.marks.marker import ImageMarker

if TYPE_CHECKING:
    from hipa_deploy.engines.tensorrt.device_array import DeviceArray


class BatchPipeline(ClosesAtExit):
    """What ``OneStepPipeline`` gives to programs that collect the requests of many users.

    ``jobs`` checks a request, ``make`` makes a batch, whoever asked, and ``guard`` sees every image
    before it is shown. Any thread may call it.

    Args:
        bundle: that makes the images.
        backend: that runs the stages, not 'auto'.
        stages: every stage of the bundle, loaded; they are closed with the pipeline.
        prompts: reads prompts; None opens the bundle's own.
        marker: what is done to every image.
        safety: the safety checker's network; it is closed with the pipeline.

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
        self._verify = False  # whether a swap reads files again that have not changed
        self._marker = marker
        self._safety = safety
        self._prompts = open_prompts(bundle) if prompts is None else prompts
        self._loaded = LoadedStages(bundle, backend, stages, self._prompts)
        self._sizes = SizesInUse(bundle)
        self._requests = JobMaker(bundle, self._prompts, marker)
        self._batches = BatchMaker(bundle, backend, self._loaded, self._prompts)

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
            refinement_of(self.bundle, self.backend)
        return self._requests.jobs(
            pairs,
            source=source,
            height=height,
            width=width,
            truncate=truncate,
            prompt_weights=prompt_weights,
            refine=refine,
        )

    def tile_jobs(
        self,
        image: ImageSource,
        prompt: str = "",
        *,
        overlap: int | None = None,
        truncate: bool = False,
        prompt_weights: bool | None = None,
        most_tiles: int = MAX_TILES,
    ) -> tuple[Upscaling, list[ImageJob]]:
        """Check a request to enlarge an image, and make a job of each tile; see ``upscale``.

        ``merge_tiles`` puts the tiles together. All of them must be made with one adaptor.

        Args:
            image: as ``upscale`` takes it.
            prompt: as ``upscale`` takes it.
            overlap: as ``upscale`` takes it.
            truncate: as ``upscale`` takes it.
            prompt_weights: as ``upscale`` takes it.
            most_tiles: that the image may take; one of more is refused before it is enlarged.

        Raises:
            HipaError: as ``upscale`` does.

        """
        return self._requests.tile_jobs(
            image,
            prompt,
            overlap=overlap,
            truncate=truncate,
            prompt_weights=prompt_weights,
            most_tiles=most_tiles,
        )

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
        return self._batches.make(jobs, timer, progress)

    def guard(self, result: GenerateResult) -> GenerateResult:
        """Withhold the images that a checker flags, and watermark the others.

        Every result of this pipeline has passed it. A program that takes images from ``make`` calls
        it before it shows them.

        Raises:
            HipaError: a checker fails.

        """
        return guarded(self._marker, result)

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """How many jobs a batch may have, ascending: all up to the largest, until ``warmup``."""
        return self._sizes.sizes

    def sizes_for(self, job: ImageJob) -> tuple[int, ...]:
        """How many jobs like this one a batch may have, ascending.

        After ``warmup`` these are ``batch_sizes`` for the bundle's own height and width. Kernels
        depend on the size, so jobs of another one are made one by one. So are jobs to refine: their
        many steps were not part of the proof.
        """
        return self._sizes.of(job)

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
        return self._sizes.warmup(self._batches.try_batch, self._requests.trial_jobs, largest)

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
        inpainting's composite (``source.finish``) is left to the caller, and NaN of a network that
        overflows is not noticed, which a call refuses.

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
        jobs = self.jobs(
            self._one_batch(prompt, seed, count),
            source=source,
            height=height,
            width=width,
            truncate=truncate,
            prompt_weights=prompt_weights,
        )
        return self._batches.make_on_device(jobs)

    def tensors(
        self,
        prompt: str,
        *,
        source: Source | None = None,
        seed: int = 0,
        count: int = 1,
        truncate: bool = False,
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
        prompts = open_prompts(self.bundle)
        requests = JobMaker(self.bundle, prompts, self._marker)
        batches = BatchMaker(self.bundle, self.backend, self._loaded, prompts)
        pairs = check_pairs(self._one_batch(prompt, seed, count))
        jobs = requests.jobs(pairs, source=source, truncate=truncate, prompt_weights=prompt_weights)
        return path_tensors(self.bundle, self._loaded, batches, jobs)

    def _one_batch(self, prompt: str, seed: int, count: int) -> list[tuple[str, int]]:
        """The pairs of prompt and seed of one batch.

        Raises:
            HipaError: a batch does not hold so many, or a seed is out of range.

        """
        count = whole_number(count, "count")
        if count not in self._sizes.axis:
            raise HipaError(f"count is {count}, a batch of this bundle holds {self._sizes.axis}.")
        check_seeds(seed, count)
        # As Python's number: one of numpy's, of 8 bits, would begin again at 0.
        first = int(seed)
        return [(prompt, first + i) for i in range(count)]

    @property
    def stages(self) -> Stages:
        """The stages that are loaded now."""
        return self._loaded.now.stages

    @property
    def low_memory(self) -> bool:
        """Whether the stages are loaded in turn."""
        return self._loaded.in_turn

    @property
    def swapped(self) -> AdaptorSwap | None:
        """The adaptor that was swapped in; None: the bundle's own."""
        return self._loaded.now.swap

    @property
    def safety(self) -> Runner | None:
        """The safety checker's network; None where the bundle has none."""
        return self._safety

    @property
    def runners(self) -> dict[str, Runner]:
        """Each stage by itself, in the order in which they run."""
        return self.stages.runners

    def close(self) -> None:
        """Release every stage, after the batches that are under way.

        Calling it twice is harmless. In a fork of the process that loaded them it does nothing.
        """
        # They are the parent's: ONNX Runtime waits for threads that a fork does not have, and
        # crashes (microsoft/onnxruntime#31961).
        if self._loaded.is_of_parent:
            return
        self._loaded.close()
        self._batches.close()
        if self._safety is not None:
            self._safety.close()

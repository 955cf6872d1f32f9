"""The image service: an order comes in, image files go out. A web framework calls it.

Pixels are decoded, blended and encoded in a few threads, images are made in one thread a bundle,
and the caller's event loop does neither.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from hipa_deploy.bundle.manifest import RefineSettings
from hipa_deploy.generate.jobs.image_job import ImageJob, MadeImage
from hipa_deploy.generate.jobs.result import finished_result, merge_tiles
from hipa_deploy.generate.jobs.withheld import Flagged
from hipa_deploy.generate.pipeline import DEFAULT_FEATHER, OneStepPipeline
from hipa_deploy.images.source import (
    Source,
    Upscaling,
    control_source,
    edit_source,
    inpaint_source,
)
from hipa_deploy.marks.content_credentials import ContentSigner
from hipa_deploy.marks.marker import encode_marked, require_signer
from hipa_deploy.marks.safety import Checker
from hipa_deploy.serve.batcher import Batcher, Work
from hipa_deploy.serve.file_wait import FileWait
from hipa_deploy.serve.image_files import BEST, Format, mask_of_alpha, open_upload
from hipa_deploy.serve.serve_metrics import ServeMetrics
from hipa_deploy.serve.served import Model, Models
from hipa_deploy.serve.settings import Limits

Result = TypeVar("Result")
Uploaded = Any  # a binary file object


class NotReadyError(Exception):
    """The bundles are still loading."""


class TimeLimitError(Exception):
    """The images were not ready within the time limit."""


class GoneError(Exception):
    """Whoever asked has gone away."""


@dataclass(frozen=True)
class Order:
    """What a request asks for, its values checked as far as that needs no bundle.

    Attributes:
        model: a bundle, perhaps with another adaptor.
        prompt: what the images show.
        seeds: one an image.
        image: the uploaded source or control image; None to make images from text.
        mask: the uploaded mask, white where the image is repainted.
        alpha_mask: the mask is in the alpha channel of ``mask``, or of ``image`` without one.
        strength: of an edit; None is the bundle's largest.
        scale: how strongly a control image is followed, 0 to 2.
        feather: of an inpainting, in pixels.
        match: of an inpainting: the new part's colours are shifted to meet those around it.
        overlap: of an upscaling, in pixels; None is the default.
        height: in pixels; None is the bundle's own.
        width: in pixels; None is the bundle's own.
        truncate: cut a prompt that is too long.
        prompt_weights: read ``(word:1.3)`` as a weight; None is as the bundle says.
        refine: how the base model makes the images, in many steps; None is the one step.
        format: of the files.
        quality: of a JPEG or WebP.

    """

    model: Model
    prompt: str = field(repr=False)
    seeds: Sequence[int]
    image: Uploaded | None = field(default=None, repr=False)
    mask: Uploaded | None = field(default=None, repr=False)
    alpha_mask: bool = False
    strength: float | None = None
    scale: float = 1.0
    feather: int = DEFAULT_FEATHER
    match: bool = True
    overlap: int | None = None
    height: int | None = None
    width: int | None = None
    truncate: bool = False
    prompt_weights: bool | None = None
    refine: RefineSettings | None = None
    format: Format = "png"
    quality: int = BEST


@dataclass(frozen=True)
class Delivery:
    """The images of an order.

    Attributes:
        files: the encoded images, without those that a safety checker withheld.
        parameters: of each of these.
        flagged: the images that were withheld, and why.
        height: of the images, in pixels.
        width: of the images, in pixels.
        queue_ms: that the order waited for its first batch.
        make_ms: from the begin of the first batch to the end of the last.
        encode_ms: for blending and encoding.
        batches: size of the batch that each image was in; an enlarged image has one a tile.

    """

    files: list[bytes] = field(repr=False)
    parameters: list[dict[str, Any]] = field(repr=False)
    flagged: tuple[Flagged, ...]
    height: int
    width: int
    queue_ms: float
    make_ms: float
    encode_ms: float
    batches: list[int]


@dataclass(frozen=True)
class _Files:
    files: list[bytes]
    parameters: list[dict[str, Any]]
    flagged: tuple[Flagged, ...]
    height: int
    width: int
    seconds: float  # without the wait for a thread


class ImageService:
    """Models, limits, metrics, and the way from an order to its images.

    Args:
        models: what is served.
        limits: what is allowed.
        signer: signs a C2PA manifest into every file; None signs nothing.
        checker: a function of yours that sees every image of every model, beside a bundle's own
            safety checker; as ``OneStepPipeline.load`` takes it. Several threads may call it at
            once.

    Raises:
        HipaError: the owner of a bundle wants signed images, and there is no signer.

    Example:
        >>> service = ImageService(Models(["emoji"]), Limits(), checker=too_dark)

    """

    def __init__(
        self,
        models: Models,
        limits: Limits,
        signer: ContentSigner | None = None,
        checker: Checker | None = None,
    ) -> None:
        for served in models.served:
            require_signer(served.bundle.manifest.marks, signer)
        self.models = models
        self.limits = limits
        self.signer = signer
        self.checker = checker
        self.metrics = ServeMetrics()
        self.stopping = False
        self.metrics.ready.set_function(lambda: self.ready)
        # Pillow and zlib let other threads run. More threads than cores would only take memory.
        threads = max(2, min(8, os.cpu_count() or 2))
        self._threads = ThreadPoolExecutor(threads, "images")
        # Threads of their own: uploads that take long to decode would keep everybody's files back.
        self._readers = ThreadPoolExecutor(threads, "uploads")

    def load(self, backend: str) -> None:
        """Load every bundle and make its first image.

        Raises:
            HipaError: as ``OneStepPipeline.load``.

        """
        for served in self.models.served:
            if not self.stopping:
                served.load(backend, self.limits, self.metrics, self.checker)

    @property
    def ready(self) -> bool:
        """Whether requests are answered with images, as far as is known."""
        return self.models.ready and not self.stopping

    def full(self, arriving: int) -> int | None:
        """Whether requests that have arrived, and wait in no queue yet, will fill all queues.

        Args:
            arriving: how many.

        Returns:
            Seconds after which to try again; None where there is a place for another image.

        """
        free = 0
        seconds = []
        for served in self.models.served:
            if served.batcher is None:
                return None
            free += served.batcher.free
            seconds.append(served.batcher.retry_after())
        return None if arriving < free else min(seconds)

    def close(self) -> None:
        """Make what was accepted, and release everything."""
        self.stopping = True
        self.models.close()
        self._readers.shutdown()
        self._threads.shutdown()

    async def deliver(self, order: Order, gone: Callable[[], Awaitable[None]]) -> Delivery:
        """Make the images of an order.

        Args:
            order: what to make.
            gone: returns when whoever asked has gone away.

        Raises:
            RequestError: something is wrong with the order.
            HipaError: something is wrong with the bundle, with a checker or with what signs its
                files.
            NotFiniteError: a network gave NaN or infinity.
            BackendFailedError: a backend or an adaptor failed.
            NotReadyError: the bundles are loading.
            QueueFullError: too many images wait.
            StoppingError: the service is stopping.
            TimeLimitError: it took too long.
            GoneError: nobody waits for it any more.

        """
        pipe = order.model.served.pipe
        batcher = order.model.served.batcher
        if pipe is None or batcher is None:
            raise NotReadyError
        started = time.perf_counter()
        places = len(order.seeds)
        batcher.reserve(places)
        work: Work | None = None
        try:
            jobs, merge = await self._prepared(pipe, order, started)
            # An enlarged image is as many jobs as it has tiles.
            more = len(jobs) - places
            if more > 0:
                batcher.reserve(more)
                places += more
            work = Work(jobs, order.model.adaptor)
        finally:
            if work is None:
                batcher.release(places)
        encode = partial(_encoded, pipe, merge=merge, order=order, signer=self.signer)
        encoded = self._encoded_after(work, encode)
        batcher.submit(work, places)
        files = await self._waited_for(encoded, work, batcher, started, gone)
        assert work.begun is not None
        assert work.ended is not None
        self.metrics.encode_seconds.labels(order.format).observe(files.seconds)
        self.metrics.images.labels(order.model.name).inc(len(files.files))
        return Delivery(
            files=files.files,
            parameters=files.parameters,
            flagged=files.flagged,
            height=files.height,
            width=files.width,
            queue_ms=(work.begun - work.queued) * 1000,
            make_ms=(work.ended - work.begun) * 1000,
            encode_ms=files.seconds * 1000,
            batches=work.batches,
        )

    async def _prepared(
        self, pipe: OneStepPipeline, order: Order, started: float
    ) -> tuple[list[ImageJob], Upscaling | None]:
        """The jobs of an order; for an enlargement also what merges its tiles."""
        if order.image is None:
            # Microseconds: a thread would take longer.
            return _jobs(pipe, order, None), None
        return await self._in_thread(started, _jobs_from_image, pipe, order, self.limits)

    async def _in_thread(
        self, started: float, function: Callable[..., Result], *arguments: Any
    ) -> Result:
        """What a function of uploads returns; nobody waits for it beyond the time limit."""
        loop = asyncio.get_running_loop()
        result = loop.run_in_executor(self._readers, partial(function, *arguments))
        try:
            await asyncio.wait({result}, timeout=self._left(started))
            if result.done():
                return result.result()
            raise TimeLimitError
        finally:
            # A function that no thread has begun is never called.
            result.cancel()

    def _left(self, started: float) -> float:
        """Seconds that are left of the time limit."""
        return max(0, self.limits.seconds - (time.perf_counter() - started))

    def _encoded_after(
        self, work: Work, encode: Callable[[list[MadeImage]], _Files]
    ) -> Future[_Files]:
        """The files of a work; one of the threads makes them as soon as its images are made.

        The event loop has no part in it: a change of threads takes a tenth of a millisecond.
        """
        files: Future[_Files] = Future()

        def fill(made: Future[list[MadeImage]]) -> None:
            if not files.set_running_or_notify_cancel():
                return
            try:
                files.set_result(encode(made.result()))
            except BaseException as error:
                files.set_exception(error)

        def begin(made: Future[list[MadeImage]]) -> None:
            # A work is cancelled when nobody waits for its files either.
            if made.cancelled():
                return
            try:
                self._threads.submit(fill, made)
            except RuntimeError as error:  # the system starts no thread
                if files.set_running_or_notify_cancel():
                    files.set_exception(error)

        work.done.add_done_callback(begin)
        return files

    async def _waited_for(
        self,
        files: Future[_Files],
        work: Work,
        batcher: Batcher,
        started: float,
        gone: Callable[[], Awaitable[None]],
    ) -> _Files:
        """The files of a work; it is cancelled when nobody waits for it any more."""
        wait = FileWait(files, gone, self._left(started))
        try:
            await wait.ended
            if files.done():
                return files.result()
            raise GoneError if wait.has_left else TimeLimitError
        finally:
            wait.close()
            if not files.done():
                # Files that no thread has begun are never made.
                files.cancel()
                batcher.cancel(work)


def _jobs(pipe: OneStepPipeline, order: Order, source: Source | None) -> list[ImageJob]:
    return pipe.jobs(
        [(order.prompt, seed) for seed in order.seeds],
        source=source,
        height=order.height,
        width=order.width,
        truncate=order.truncate,
        prompt_weights=order.prompt_weights,
        refine=order.refine,
    )


def _jobs_from_image(
    pipe: OneStepPipeline, order: Order, limits: Limits
) -> tuple[list[ImageJob], Upscaling | None]:
    """Decode the uploaded images, and make jobs of them."""
    assert order.image is not None
    image = open_upload(order.image, "image", limits.pixels)
    task = pipe.bundle.manifest.task
    if task == "upscale":
        enlargement, jobs = pipe.tile_jobs(
            image,
            order.prompt,
            overlap=order.overlap,
            truncate=order.truncate,
            prompt_weights=order.prompt_weights,
            most_tiles=limits.queue,
        )
        return jobs, enlargement
    if task == "edit":
        source = edit_source(
            pipe.bundle, image, strength=order.strength, height=order.height, width=order.width
        )
        return _jobs(pipe, order, source), None
    if task == "control":
        source = control_source(
            pipe.bundle, image, scale=order.scale, height=order.height, width=order.width
        )
        return _jobs(pipe, order, source), None
    uploaded = image if order.mask is None else open_upload(order.mask, "mask", limits.pixels)
    mask: Image.Image | np.ndarray = uploaded
    if order.alpha_mask:
        mask = mask_of_alpha(uploaded, "image" if order.mask is None else "mask")
    source = inpaint_source(
        pipe.bundle,
        image,
        mask,
        feather=order.feather,
        match=order.match,
        height=order.height,
        width=order.width,
    )
    return _jobs(pipe, order, source), None


def _encoded(
    pipe: OneStepPipeline,
    made: Sequence[MadeImage],
    merge: Upscaling | None,
    order: Order,
    signer: ContentSigner | None,
) -> _Files:
    """Finish the images of an order, let the checkers see them, mark and encode them."""
    begun = time.perf_counter()
    result = finished_result(made) if merge is None else merge_tiles(merge, made)
    height, width = result.images_BHWC.shape[1:3]
    shown = pipe.guard(result)

    # OpenAI's scale has a 0, files do not. A WebP of the best quality is lossless: None.
    quality = max(1, order.quality)
    lossless = order.format == "png" or (order.format == "webp" and quality == BEST)
    files = []
    for image_HWC, facts in zip(shown.images_BHWC, shown.parameters, strict=True):
        content = encode_marked(
            image_HWC,
            facts,
            order.format,
            quality=None if lossless else quality,
            marks=pipe.bundle.manifest.marks,
            signer=signer,
        )
        files.append(content)
    seconds = time.perf_counter() - begun
    return _Files(files, list(shown.parameters), shown.flagged, height, width, seconds)

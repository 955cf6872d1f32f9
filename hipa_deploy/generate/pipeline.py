"""From prompt to image in one step. ``OneStepPipeline._make_batch`` is the whole path.

Shape suffixes throughout the package: B batch, L tokens, D width of a context, C channels,
H W image size, h w latent size.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from hipa_deploy.bundle.adaptor_swap import TEXT_STAGE, AdaptorSwap, adapted_stage
from hipa_deploy.bundle.folder import Bundle, latent_shape
from hipa_deploy.bundle.manifest import Axis
from hipa_deploy.embedded import resolve_bundle
from hipa_deploy.errors import HipaError
from hipa_deploy.generate.noise import bundle_noise, check_seeds
from hipa_deploy.generate.open_stages import Kept, open_stages, resolve_backend
from hipa_deploy.generate.prompts import Prepared, PromptSource, open_prompts
from hipa_deploy.generate.request import check_count, check_prompts
from hipa_deploy.generate.runner import ENGINE_BACKENDS, ClosesAtExit, Runner, check_backend
from hipa_deploy.generate.stages import (
    Stages,
    Tensors,
    Timer,
    host_stages,
    input_names,
    output_names,
    stage_feed,
)
from hipa_deploy.images.read import ImageSource
from hipa_deploy.images.source import (
    EncodedImages,
    Source,
    batch_inputs,
    edit_source,
    inpaint_source,
    require_task,
    upscaling,
)
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
        parameters: N dictionaries: all that reproduces the image. A PNG carries its own as JSON.

    """

    images_BHWC: np.ndarray
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    parameters: tuple[dict[str, Any], ...]

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
        self._prompts = open_prompts(bundle) if prompts is None else prompts
        self._encoded_images = EncodedImages()

    @classmethod
    def load(
        cls,
        bundle: str | Path,
        backend: str = "auto",
        *,
        verify: bool = False,
        cache: bool = True,
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
        stages = open_stages(opened, name, kept=kept)
        try:
            pipeline = cls(opened, name, stages, prompts)
        except BaseException:
            stages.close()
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
        batches = list(
            self.stream(
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
        )
        return GenerateResult(
            images_BHWC=np.concatenate([batch.images_BHWC for batch in batches]),
            prompts=tuple(chain.from_iterable(batch.prompts for batch in batches)),
            seeds=tuple(chain.from_iterable(batch.seeds for batch in batches)),
            parameters=tuple(chain.from_iterable(batch.parameters for batch in batches)),
        )

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
    ) -> Iterator[GenerateResult]:
        """The same as a call, a batch at a time.

        Everything is checked before the first image is made.

        Example:
            >>> for batch in pipe.stream("3d emoji of a red apple", count=1000):
            ...     save(batch.images)  # at most the bundle's largest batch in memory

        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        check_count(len(prompts), count)
        check_prompts(prompts)
        check_seeds(seed, count)
        latent_CHW = self._latent_shape(source, height, width)
        weights = self._prompts.reads_weights(prompt_weights)
        prepared = self._prompts.prepare(prompts, truncate=truncate, weights=weights)

        # One entry an image: which prompt, and which seed.
        images = [(index, seed + i) for index in range(len(prompts)) for i in range(count)]
        for batch in _batches(images, self._batch.max):
            texts = [prompts[index] for index, _ in batch]
            seeds = [number for _, number in batch]
            with self._use.shared():
                loaded = self._loaded
                images_BHWC = self._make_batch(
                    loaded.stages,
                    [prepared[index] for index, _ in batch],
                    seeds,
                    latent_CHW,
                    [source] * len(batch) if source else [],
                    timer,
                )
            size = {"height": images_BHWC.shape[1], "width": images_BHWC.shape[2]}
            facts = {**size, "truncate": truncate, "prompt_weights": weights}
            if source:
                images_BHWC = source.finish(images_BHWC)
                facts |= source.facts
            parameters = [
                self._parameters(loaded.swap, text, number, facts)
                for text, number in zip(texts, seeds, strict=True)
            ]
            yield GenerateResult(images_BHWC, tuple(texts), tuple(seeds), tuple(parameters))

    def _make_batch(
        self,
        stages: Stages,
        prompts: list[Prepared],
        seeds: list[int],
        latent_CHW: tuple[int, int, int],
        sources: list[Source],
        timer: Timer,
    ) -> np.ndarray:
        """The whole path, from prompts to images uint8 [B, H, W, 3], for one batch."""
        # A bundle has a smallest batch: what is missing repeats the last image, and is dropped.
        missing = max(0, self._batch.min - len(seeds))
        padded = prompts + prompts[-1:] * missing

        # tokens_BL, or context_BLD where the text encoder has seen these prompts lately.
        text = self._prompts.feed(padded, partial(_encode, self.bundle, stages, timer))
        # noise_BCHW; of a task with a source image also image_BHWC (or source_BCHW), mask and step.
        start = self._start(
            seeds + seeds[-1:] * missing, latent_CHW, sources + sources[-1:] * missing
        )

        # text_encoder: tokens_BL                -> context_BLD
        # vae_encoder:  image_BHWC               -> source_BCHW
        # unet:         noise_BCHW, context_BLD  -> latents_BCHW, which are x0: the one step
        # vae_decoder:  latents_BCHW             -> images_BHWC
        outputs = ["images", *_worth_keeping(text | start)]
        made = stages.run(text | start, outputs, timer)

        # The next batch of these prompts, or from these images, starts from what is known now.
        if "context" in made:
            self._prompts.keep(padded, made["context"])
        if "source" in made:
            self._encoded_images.keep(start["image"], made["source"])
        return made["images"][: len(seeds)]

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
        enlargement = upscaling(self.bundle, image, overlap=overlap)
        weights = self._prompts.reads_weights(prompt_weights)
        prepared = self._prompts.prepare([prompt], truncate=truncate, weights=weights)
        latent_CHW = latent_shape(self.bundle, None, None)
        made = []
        # All tiles in one use: a swap between two would leave a seam in the image.
        with self._use.shared():
            loaded = self._loaded
            for tiles in _batches(list(enlargement.tiles), self._batch.max):
                prompts = prepared * len(tiles)
                seeds = [0] * len(tiles)
                made.append(
                    self._make_batch(loaded.stages, prompts, seeds, latent_CHW, tiles, timer)
                )
        image_HWC = enlargement.merge(np.concatenate(made))
        size = {"height": enlargement.height, "width": enlargement.width}
        facts = {**size, "truncate": truncate, "prompt_weights": weights, **enlargement.facts}
        parameters = self._parameters(loaded.swap, prompt, 0, facts)
        return GenerateResult(image_HWC[None], (prompt,), (0,), (parameters,))

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
        check_seeds(seed, count)
        if count not in self._batch:
            raise HipaError(f"count is {count}, a batch of this bundle holds {self._batch}.")
        latent_CHW = self._latent_shape(source, height, width)
        sources = [source] * count if source else []
        weights = self._prompts.reads_weights(prompt_weights)
        prepared = self._prompts.prepare([prompt], truncate=truncate, weights=weights)
        start = self._start(range(seed, seed + count), latent_CHW, sources)
        with self._use.shared():
            encode = partial(_encode, self.bundle, self.stages, nullcontext)
            text = self._prompts.feed(prepared * count, encode)
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
        that is cached is taken. Of a prompt with weights the tokens are left out.

        Raises:
            HipaError: as a call does.

        """
        # With empty caches.
        fresh = OneStepPipeline(self.bundle, self.backend, self.stages)
        latent_CHW = self._latent_shape(source, None, None)
        weights = fresh._prompts.reads_weights(prompt_weights)
        prepared = fresh._prompts.prepare([prompt], truncate=False, weights=weights)
        encode = partial(_encode, self.bundle, self.stages, nullcontext)
        with self._use.shared():
            feed = fresh._prompts.feed(prepared * count, encode)
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
            if name not in feed and name != "tokens":
                computed.append(name)
        with self._use.shared():
            return feed | self.stages.run(feed, computed)

    @property
    def stages(self) -> Stages:
        """The stages that are loaded now."""
        return self._loaded.stages

    @property
    def swapped(self) -> AdaptorSwap | None:
        """The adaptor that was swapped in; None: the bundle's own."""
        return self._loaded.swap

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
        with self._one_swap:
            runner = self.runners[stage]
            changed: dict[str, Runner] = {}
            if _changes_text(swap) or _changes_text(self.swapped):
                changed[TEXT_STAGE] = swap_text_encoder(self.bundle, self.backend, swap)
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
                if TEXT_STAGE in changed:
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
        return latent_shape(self.bundle, height, width)

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
        }

    def close(self) -> None:
        """Release every stage, after the batches that are under way.

        Calling it twice is harmless.
        """
        with self._use.alone():
            self.stages.close()


def _changes_text(swap: AdaptorSwap | None) -> bool:
    return swap is not None and swap.manifest.text is not None


def _encode(bundle: Bundle, stages: Stages, timer: Timer, tokens_BL: np.ndarray) -> np.ndarray:
    """The context [B, L, D] of tokens, from the text encoder alone."""
    encoder = stages.runners["text_encoder"]
    feed = stage_feed(encoder.spec, {"tokens": tokens_BL}, bundle.manifest.layout)
    with timer("text_encoder"):
        return encoder(**feed)[encoder.spec.outputs[0].name]


def _worth_keeping(feed: Mapping[str, np.ndarray]) -> list[str]:
    """Tensors to keep for the next batch: those that this batch must compute first."""
    first_computed = {"tokens": "context", "image": "source"}
    return [computed for start, computed in first_computed.items() if start in feed]


def _batches(items: list[Any], size: int) -> Iterator[list[Any]]:
    for first in range(0, len(items), size):
        yield items[first : first + size]

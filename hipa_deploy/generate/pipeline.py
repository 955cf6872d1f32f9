"""From prompt to image in one step. ``OneStepPipeline._generate`` is the whole path."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from hipa_deploy.bundle.adaptor_swap import AdaptorSwap, adapted_stage
from hipa_deploy.bundle.manifest import Axis, Bundle, latent_shape
from hipa_deploy.embedded import resolve_bundle
from hipa_deploy.errors import HipaError
from hipa_deploy.generate.noise import check_seeds, initial_noise, predict_x0
from hipa_deploy.generate.prompts import Timer, open_prompts
from hipa_deploy.generate.runner import Chain, Runner, check_backend, open_stages, resolve_backend
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
from hipa_deploy.tasks import STEP_INPUTS

if TYPE_CHECKING:
    from hipa_deploy.engines.tensorrt.device_array import DeviceArray

MAX_IMAGES = 10_000
DEFAULT_FEATHER = 8  # pixels


@dataclass(frozen=True)
class GenerateResult:
    """Images uint8 [N, H, W, 3] with the prompt, seed and recipe of each."""

    images_BHWC: np.ndarray
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    recipes: tuple[dict[str, Any], ...]

    @property
    def images(self) -> list[Image.Image]:
        """The images as PIL, RGB."""
        return [Image.fromarray(image_HWC) for image_HWC in self.images_BHWC]


class OneStepPipeline:
    """A bundle, loaded on one backend.

    >>> with OneStepPipeline.load("emoji") as pipe:
    ...     pipe("3d emoji of a red apple", seed=0).images[0].save("apple.png")
    """

    def __init__(
        self, bundle: Bundle, backend: str, runners: dict[str, Runner], chain: Chain | None = None
    ) -> None:
        self.bundle = bundle
        self.backend = backend
        self.runners = runners
        self.chain = chain  # every stage on the device, as one; None where the host carries tensors between them
        self.load_seconds = 0.0
        self.swapped: AdaptorSwap | None = None  # None: the bundle's own adaptor
        batch = bundle.manifest.batch
        self._batch = bundle.axes.get("batch", Axis(min=batch, opt=batch, max=batch))
        self._prompts = open_prompts(bundle, lambda tokens_BL: self._run("text_encoder", tokens_BL))
        self._images = EncodedImages()

    @classmethod
    def load(cls, bundle: str | Path, backend: str = "auto") -> OneStepPipeline:
        """Open a bundle ('emoji', or a folder), check its hashes and load its stages.

        Raises:
            HipaError: not a bundle, a corrupt file, or a backend that is unknown, absent or without an engine.

        """
        check_backend(backend)
        started = time.perf_counter()
        opened = Bundle.open(resolve_bundle(bundle))
        opened.verify()
        name = resolve_backend(backend, opened)
        runners, chain = open_stages(opened, name)
        with ExitStack() as stack:
            for runner in runners.values():
                stack.callback(runner.close)
            pipeline = cls(opened, name, runners, chain)
            stack.pop_all()
        pipeline.load_seconds = time.perf_counter() - started
        return pipeline

    def swap_adaptor(self, adaptor: str | Path | None) -> None:
        """Take another adaptor, a name in the bundle's ``adaptors`` or a folder; None: the bundle's own again, exactly.

        Raises:
            HipaError: no such adaptor, one for another bundle, or an engine that cannot take it; the pipeline is as
                before, or, if an engine failed half way, closed.

        """
        from hipa_deploy.engines.tensorrt.refit import swap_stage

        swap = None if adaptor is None else AdaptorSwap.open(self.bundle, adaptor)
        stage = adapted_stage(self.bundle)
        self.runners[stage] = swap_stage(self.bundle, self.runners[stage], self.backend, swap)
        self.swapped = swap

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
        timer: Timer = nullcontext,
    ) -> GenerateResult:
        """Generate ``count`` images for each prompt, with seeds ``seed``, ``seed + 1``, …

        The same prompt, seed and size give the same image whatever else is in the call. ``height`` and ``width`` are
        pixels; None is the bundle's own size, or that of ``source``, what a task makes the images from.

        Raises:
            HipaError: no prompt, a prompt that is too long, a seed or count out of range, a size or a task that the
                bundle was not exported for.

        """
        options: dict[str, Any] = {
            "height": height,
            "width": width,
            "truncate": truncate,
            "timer": timer,
        }
        parts = list(self.stream(prompt, source=source, seed=seed, count=count, **options))
        return GenerateResult(
            images_BHWC=np.concatenate([part.images_BHWC for part in parts]),
            prompts=tuple(chain.from_iterable(part.prompts for part in parts)),
            seeds=tuple(chain.from_iterable(part.seeds for part in parts)),
            recipes=tuple(chain.from_iterable(part.recipes for part in parts)),
        )

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
        """Edit ``image`` (a path, Pillow's or an array) as ``prompt`` says; ``options`` are those of a call.

        ``strength`` in (0, 1] is how much of the image may change, one of the bundle's; None is the largest of them.

        Raises:
            HipaError: as a call does, no image, or a strength that the bundle does not have.

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
        """Repaint what is white in ``mask``, of the image's size; ``options`` are those of a call.

        Farther than ``feather`` pixels outside the mask the image, cropped and scaled to the bundle's size, is kept
        bit for bit.

        Raises:
            HipaError: as a call does, no image, a mask of another size, empty or full, or a negative ``feather``.

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
        timer: Timer = nullcontext,
    ) -> GenerateResult:
        """Enlarge ``image`` by the bundle's factor, in tiles where it is larger than the bundle's images.

        There is no noise in it: the same image and prompt give the same result. ``overlap`` of the tiles is in pixels
        of the result, an eighth of a tile by default.

        Raises:
            HipaError: no image, a prompt that cannot be encoded, a bundle for another task, an overlap out of range.

        """
        job = upscaling(self.bundle, image, overlap=overlap)
        handle = self._prompts.prepare([prompt], truncate=truncate)
        latent_CHW = latent_shape(self.bundle, None, None)
        made = [
            self._generate(handle * len(part), [0] * len(part), latent_CHW, timer, part)
            for part in _chunks(list(job.tiles), self._batch.max)
        ]
        image_HWC = job.merge(np.concatenate(made))
        facts = {"height": job.height, "width": job.width, "truncate": truncate, **job.facts}
        return GenerateResult(image_HWC[None], (prompt,), (0,), (self._recipe(prompt, 0, facts),))

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
        timer: Timer = nullcontext,
    ) -> Iterator[GenerateResult]:
        """The same, a batch at a time. Everything is checked before the first image is made."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        check_count(len(prompts), count)
        check_seeds(seed, count)
        latent_CHW = self._latent_shape(source, height, width)
        prepared = self._prompts.prepare(prompts, truncate=truncate)
        jobs = [(index, seed + i) for index in range(len(prompts)) for i in range(count)]
        for part in _chunks(jobs, self._batch.max):
            texts, seeds = [prompts[index] for index, _ in part], [number for _, number in part]
            handles, sources = (
                [prepared[index] for index, _ in part],
                [source] * len(part) if source else [],
            )
            images_BHWC = self._generate(handles, seeds, latent_CHW, timer, sources)
            facts = {
                "height": images_BHWC.shape[1],
                "width": images_BHWC.shape[2],
                "truncate": truncate,
            }
            if source:
                images_BHWC, facts = source.finish(images_BHWC), {**facts, **source.facts}
            recipes = [
                self._recipe(text, number, facts) for text, number in zip(texts, seeds, strict=True)
            ]
            yield GenerateResult(images_BHWC, tuple(texts), tuple(seeds), tuple(recipes))

    def _latent_shape(
        self, source: Source | None, height: int | None, width: int | None
    ) -> tuple[int, int, int]:
        """[C, h, w] of what is asked for, after a check that this bundle makes it."""
        require_task(self.bundle, source.task if source else "generate")
        return latent_shape(
            self.bundle, *(source.image_HWC.shape[:2] if source else (height, width))
        )

    def _generate(
        self,
        prompts: list[Any],
        seeds: list[int],
        latent_CHW: tuple[int, int, int],
        timer: Timer,
        sources: list[Source],
    ) -> np.ndarray:
        """One batch, uint8 [len(seeds), H, W, 3]. A batch that is too small repeats its last job."""
        padding = max(0, self._batch.min - len(seeds))
        handles = prompts + prompts[-1:] * padding
        given = self._given(
            seeds + seeds[-1:] * padding, latent_CHW, sources + sources[-1:] * padding
        )
        if self.chain is not None:  # all stages on the device, one CUDA graph
            with timer("pipeline"):
                return self._through(self.chain, handles, given)[: len(seeds)]
        given["context"] = self._prompts.contexts(handles, timer)
        if "image" in given:
            given["source"] = self._encode(given["image"], timer)
        if "generator" in self.runners:  # UNet and decoder in one graph
            with timer("generator"):
                return self._run_named("generator", given)[: len(seeds)]
        with timer("unet"):
            latents_BCHW = self._predict(given)
        with timer("vae_decoder"):
            return self._decode(latents_BCHW)[: len(seeds)]

    def _given(
        self, seeds: Sequence[int], latent_CHW: tuple[int, int, int], sources: Sequence[Source]
    ) -> dict[str, np.ndarray]:
        """What a batch starts from beside its prompts, by name: noise, and the sources' images, masks and step."""
        noisy = "noise" in STEP_INPUTS[self.bundle.manifest.task]
        given = {"noise": initial_noise(seeds, latent_CHW)} if noisy else {}
        return self._images.feed(given | batch_inputs(sources))

    def _through(
        self, chain: Chain, handles: list[Any], given: dict[str, np.ndarray]
    ) -> np.ndarray:
        """Noise, image and token ids (or what they give, once it is known) go to the device, images come back."""
        feed = given | self._prompts.feed(handles)
        wanted = [
            made for start, made in (("tokens", "context"), ("image", "source")) if start in feed
        ]
        made = chain.run(feed, ("images", *wanted))
        if "context" in made:
            self._prompts.keep(handles, made["context"])
        if "source" in made:
            self._images.keep(feed["image"], made["source"])
        return made["images"]

    def _encode(self, image_BHWC: np.ndarray, timer: Timer) -> np.ndarray:
        with timer("vae_encoder"):
            source_BCHW = self._run("vae_encoder", image_BHWC)
        self._images.keep(image_BHWC, source_BCHW)
        return source_BCHW

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
    ) -> DeviceArray:
        """One batch of images, uint8 [count, H, W, 3], left on the device: see ``DeviceArray`` for how long it lives.

        They are as the decoder gives them: an inpainting's composite (``source.finish``) is left to the caller.

        Raises:
            HipaError: as a call does; a backend that gives host arrays; more or fewer images than a batch holds.

        """
        if self.chain is None:
            raise HipaError(
                f"backend {self.backend} gives host arrays. Use tensorrt or rtx, and the onestep layout."
            )
        check_seeds(seed, count)
        if count not in self._batch:
            raise HipaError(f"count is {count}, a batch of this bundle holds {self._batch}.")
        latent_CHW = self._latent_shape(source, height, width)
        given = self._given(
            range(seed, seed + count), latent_CHW, [source] * count if source else []
        )
        handles = self._prompts.prepare([prompt], truncate=truncate) * count
        array: DeviceArray = self.chain.run_device(**given, **self._prompts.feed(handles))["images"]
        return array

    def _predict(self, given: dict[str, np.ndarray]) -> np.ndarray:
        """Latents as the decoder takes them. A generic UNet leaves timestep, x0 and latent scaling to us."""
        if self.bundle.manifest.layout == "onestep":
            return self._run_named("unet", given)
        step, noise_BCHW, context_BLD = (
            self.bundle.manifest.one_step,
            given["noise"],
            given["context"],
        )
        sample_dtype, timestep = (
            self.runners["unet"].spec.inputs[0].dtype,
            np.asarray([step.timestep], np.int64),
        )
        output_BCHW = self._run("unet", noise_BCHW.astype(sample_dtype), timestep, context_BLD)
        latents_BCHW = (
            predict_x0(noise_BCHW, output_BCHW, step.alpha_bar, step.prediction_type)
            / step.scaling_factor
        )
        return latents_BCHW.astype(self.runners["vae_decoder"].spec.inputs[0].dtype)

    def _decode(self, latents_BCHW: np.ndarray) -> np.ndarray:
        """uint8 [B, H, W, 3]. A generic decoder leaves the conversion of [-1, 1] [B, 3, H, W] to us."""
        images = self._run("vae_decoder", latents_BCHW)
        if self.bundle.manifest.layout == "onestep":
            return images
        levels = np.round((images.astype(np.float32).clip(-1, 1) + 1) * 127.5)
        return levels.astype(np.uint8).transpose(0, 2, 3, 1)

    def _run(self, stage: str, *inputs: np.ndarray) -> np.ndarray:
        """Run a stage on inputs in its specified order; its first output."""
        runner = self.runners[stage]
        named = {
            tensor.name: value for tensor, value in zip(runner.spec.inputs, inputs, strict=True)
        }
        return runner(**named)[runner.spec.outputs[0].name]

    def _run_named(self, stage: str, given: dict[str, np.ndarray]) -> np.ndarray:
        """Run a stage on those of ``given`` that it takes; its first output."""
        return self._run(stage, *(given[tensor.name] for tensor in self.runners[stage].spec.inputs))

    def _recipe(self, prompt: str, seed: int, facts: dict[str, Any]) -> dict[str, Any]:
        manifest, swap = self.bundle.manifest, self.swapped
        adaptor = swap.manifest.adaptor if swap else manifest.adaptor
        path = self.bundle.stages[adapted_stage(self.bundle)].path
        return {
            "producer": manifest.producer,
            "prompt": prompt,
            "seed": seed,
            **facts,
            "backend": self.backend,
            "precision": manifest.precision,
            "base_model": manifest.base_model.sha256,
            "adaptor": adaptor.sha256 if adaptor else None,
            "unet": swap.manifest.onnx_sha256 if swap else manifest.files[path],
        }

    def close(self) -> None:
        """Release every stage."""
        for runner in self.runners.values():
            runner.close()

    def __enter__(self) -> OneStepPipeline:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def check_count(prompts: int, count: int) -> None:
    """Raise HipaError unless there is something to make, and not absurdly much."""
    if prompts < 1 or count < 1 or prompts * count > MAX_IMAGES:
        raise HipaError(
            f"got {prompts} prompts, count {count}. Expected 1 to {MAX_IMAGES} images in all."
        )


def _chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]

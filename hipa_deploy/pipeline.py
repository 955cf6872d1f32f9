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

from hipa_deploy.bundle import Axis, Bundle
from hipa_deploy.embedded import resolve_bundle
from hipa_deploy.errors import HipaError
from hipa_deploy.one_step import check_seeds, initial_noise, predict_x0
from hipa_deploy.prompts import Timer, open_prompts
from hipa_deploy.runners import Chain, Runner, check_backend, open_stages, resolve_backend

if TYPE_CHECKING:
    from hipa_deploy.engines.device_array import DeviceArray

MAX_IMAGES = 10_000


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

    def __init__(self, bundle: Bundle, backend: str, runners: dict[str, Runner], chain: Chain | None = None) -> None:
        self.bundle = bundle
        self.backend = backend
        self.runners = runners
        self.chain = chain  # every stage on the device, as one; None where the host carries tensors between them
        self.load_seconds = 0.0
        batch = bundle.manifest.batch
        self._batch = bundle.axes.get("batch", Axis(min=batch, opt=batch, max=batch))
        self._prompts = open_prompts(bundle, lambda tokens_BL: self._run("text_encoder", tokens_BL))

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

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        seed: int = 0,
        count: int = 1,
        height: int | None = None,
        width: int | None = None,
        truncate: bool = False,
        timer: Timer = nullcontext,
    ) -> GenerateResult:
        """Generate ``count`` images for each prompt, with seeds ``seed``, ``seed + 1``, …

        The same prompt, seed and size give the same image whatever else is in the call. ``height`` and ``width`` are
        pixels; None is the bundle's own size.

        Raises:
            HipaError: no prompt, a prompt that is too long, a seed or count out of range, a size that the bundle
                was not exported for.

        """
        options: dict[str, Any] = {"height": height, "width": width, "truncate": truncate, "timer": timer}
        parts = list(self.stream(prompt, seed=seed, count=count, **options))
        return GenerateResult(
            images_BHWC=np.concatenate([part.images_BHWC for part in parts]),
            prompts=tuple(chain.from_iterable(part.prompts for part in parts)),
            seeds=tuple(chain.from_iterable(part.seeds for part in parts)),
            recipes=tuple(chain.from_iterable(part.recipes for part in parts)),
        )

    def stream(
        self,
        prompt: str | Sequence[str],
        *,
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
        latent_CHW = latent_shape(self.bundle, height, width)
        prepared = self._prompts.prepare(prompts, truncate=truncate)
        jobs = [(index, seed + i) for index in range(len(prompts)) for i in range(count)]
        for part in _chunks(jobs, self._batch.max):
            texts, seeds = [prompts[index] for index, _ in part], [number for _, number in part]
            images_BHWC = self._generate([prepared[index] for index, _ in part], seeds, latent_CHW, timer)
            facts = {"height": images_BHWC.shape[1], "width": images_BHWC.shape[2], "truncate": truncate}
            recipes = [self._recipe(text, number, facts) for text, number in zip(texts, seeds, strict=True)]
            yield GenerateResult(images_BHWC, tuple(texts), tuple(seeds), tuple(recipes))

    def _generate(
        self, prompts: list[Any], seeds: list[int], latent_CHW: tuple[int, int, int], timer: Timer
    ) -> np.ndarray:
        """One batch, uint8 [len(seeds), H, W, 3]. A batch that is too small repeats its last job."""
        padding = max(0, self._batch.min - len(seeds))
        handles = prompts + prompts[-1:] * padding
        noise_BCHW = initial_noise(seeds + seeds[-1:] * padding, latent_CHW)
        if self.chain is not None:  # all stages on the device, one CUDA graph
            with timer("pipeline"):
                return self._through(self.chain, handles, noise_BCHW)[: len(seeds)]
        context_BLD = self._prompts.contexts(handles, timer)
        if "generator" in self.runners:  # UNet and decoder in one graph
            with timer("generator"):
                return self._run("generator", noise_BCHW, context_BLD)[: len(seeds)]
        with timer("unet"):
            latents_BCHW = self._predict(noise_BCHW, context_BLD)
        with timer("vae_decoder"):
            return self._decode(latents_BCHW)[: len(seeds)]

    def _through(self, chain: Chain, handles: list[Any], noise_BCHW: np.ndarray) -> np.ndarray:
        """Noise and token ids (or their context, once it is known) go to the device, images come back."""
        feed = self._prompts.feed(handles)
        made = chain.run({"noise": noise_BCHW, **feed}, ("images", "context") if "tokens" in feed else ("images",))
        if "context" in made:
            self._prompts.keep(handles, made["context"])
        return made["images"]

    def generate_on_device(
        self,
        prompt: str,
        *,
        seed: int = 0,
        count: int = 1,
        height: int | None = None,
        width: int | None = None,
        truncate: bool = False,
    ) -> DeviceArray:
        """One batch of images, uint8 [count, H, W, 3], left on the device: see ``DeviceArray`` for how long it lives.

        Raises:
            HipaError: as a call does; a backend that gives host arrays; more or fewer images than a batch holds.

        """
        if self.chain is None:
            raise HipaError(f"backend {self.backend} gives host arrays. Use tensorrt or rtx, and the onestep layout.")
        check_seeds(seed, count)
        if count not in self._batch:
            raise HipaError(f"count is {count}, a batch of this bundle holds {self._batch}.")
        noise_BCHW = initial_noise(range(seed, seed + count), latent_shape(self.bundle, height, width))
        handles = self._prompts.prepare([prompt], truncate=truncate) * count
        array: DeviceArray = self.chain.run_device(noise=noise_BCHW, **self._prompts.feed(handles))["images"]
        return array

    def _predict(self, noise_BCHW: np.ndarray, context_BLD: np.ndarray) -> np.ndarray:
        """x0 latents as the decoder takes them. A generic UNet leaves timestep, x0 and latent scaling to us."""
        step = self.bundle.manifest.one_step
        if self.bundle.manifest.layout == "onestep":
            return self._run("unet", noise_BCHW, context_BLD)
        sample_dtype, timestep = self.runners["unet"].spec.inputs[0].dtype, np.asarray([step.timestep], np.int64)
        output_BCHW = self._run("unet", noise_BCHW.astype(sample_dtype), timestep, context_BLD)
        latents_BCHW = predict_x0(noise_BCHW, output_BCHW, step.alpha_bar, step.prediction_type) / step.scaling_factor
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
        named = {tensor.name: value for tensor, value in zip(runner.spec.inputs, inputs, strict=True)}
        return runner(**named)[runner.spec.outputs[0].name]

    def _recipe(self, prompt: str, seed: int, facts: dict[str, Any]) -> dict[str, Any]:
        manifest = self.bundle.manifest
        return {
            "producer": manifest.producer,
            "prompt": prompt,
            "seed": seed,
            **facts,
            "backend": self.backend,
            "precision": manifest.precision,
            "base_model": manifest.base_model.sha256,
            "adaptor": manifest.adaptor.sha256 if manifest.adaptor else None,
            "unet": manifest.files[self.bundle.stages["generator" if "generator" in self.runners else "unet"].path],
        }

    def close(self) -> None:
        """Release every stage."""
        for runner in self.runners.values():
            runner.close()

    def __enter__(self) -> OneStepPipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def latent_shape(bundle: Bundle, height: int | None, width: int | None) -> tuple[int, int, int]:
    """[C, h, w] of the latents for an image of ``height`` x ``width`` pixels; None is the bundle's own size.

    Raises:
        HipaError: the bundle does not make images of that size; the message says which it makes.

    """
    step = bundle.manifest.one_step
    asked = {"height": height, "width": width}
    sizes = {name: getattr(step, name) if size is None else size for name, size in asked.items()}
    for name, size in sizes.items():
        usual = getattr(step, name)
        allowed = bundle.axes.get(name, Axis(min=usual, opt=usual, max=usual))
        if size not in allowed:
            expected = str(allowed) if name in bundle.axes else f"{usual}; export with --dynamic for more"
            raise HipaError(f"{name} {size} is not a size of this bundle. Expected {expected}.")
    factor = step.height // step.latent_shape[1]
    return step.latent_shape[0], sizes["height"] // factor, sizes["width"] // factor


def check_count(prompts: int, count: int) -> None:
    """Raise HipaError unless there is something to make, and not absurdly much."""
    if prompts < 1 or count < 1 or prompts * count > MAX_IMAGES:
        raise HipaError(f"got {prompts} prompts, count {count}. Expected 1 to {MAX_IMAGES} images in all.")


def _chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]

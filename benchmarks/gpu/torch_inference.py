"""One-step images with PyTorch: diffusers as installed, and through torch.compile.

A query is one call of the pipeline: a new prompt, one step without guidance, images on the host.

Shapes: B batch, H W image size, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from PIL import Image

from benchmarks.gpu.costs import share_facts, workload_costs
from benchmarks.gpu.figures import Figure
from benchmarks.gpu.job import Job
from benchmarks.gpu.models import (
    inference_precision,
    inference_size,
    model_folder,
    tiny_decoder_folder,
)
from hipa_deploy.images.example_source import example_image
from hipa_deploy.tasks import Task

EAGER = "diffusers eager"
COMPILED = "diffusers, torch.compile"
UPSCALE = 4
DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
# torch.compile of UNet and decoder at SD 1.5's size takes about a minute before the first image.
COMPILE_SECONDS = 60.0


@dataclass(frozen=True)
class Case:
    """One figure: what is computed, by what, how many images at once."""

    task: Task
    engine: str
    batch: int
    tiny_decoder: bool = False

    @property
    def workload(self) -> str:
        """What is computed, in words."""
        return f"{self.task}, tiny decoder" if self.tiny_decoder else self.task

    @property
    def name(self) -> str:
        """The case's name."""
        return f"{self.workload}, {self.engine}, batch {self.batch}"


# In the order of their worth: the time budget may cut the last ones.
CASES = (
    Case("generate", EAGER, 1),
    Case("generate", EAGER, 8),
    Case("generate", COMPILED, 1),
    Case("generate", EAGER, 1, tiny_decoder=True),
    Case("edit", EAGER, 1),
    Case("inpaint", EAGER, 1),
    Case("upscale", EAGER, 1),
    Case("generate", COMPILED, 8),
    Case("generate", EAGER, 8, tiny_decoder=True),
    Case("generate", EAGER, 4),
    Case("generate", EAGER, 2),
    Case("generate", COMPILED, 4),
    Case("generate", COMPILED, 2),
)
TINY_CASES = (
    Case("generate", EAGER, 1),
    Case("generate", COMPILED, 2),
    Case("generate", EAGER, 2, tiny_decoder=True),
    Case("edit", EAGER, 1),
    Case("inpaint", EAGER, 1),
    Case("upscale", EAGER, 1),
)


def run(job: Job) -> None:
    """Measure every case."""
    cases = TINY_CASES if job.tiny else CASES
    job.file.plan([case.name for case in cases])
    model = model_folder(job, inference_size(job))
    for case in cases:
        least = job.effort.least_case
        if case.engine == COMPILED and not job.tiny:
            least += COMPILE_SECONDS
        job.file.attempt(case.name, partial(_measure, job, model, case), least_seconds=least)


def _measure(job: Job, model: Path, case: Case) -> Figure:
    job.release()
    precision = inference_precision(job)
    call = prepare(job, model, case)
    stats, validity = job.time_call(call)
    costs = workload_costs(
        model, case.task, case.batch, tiny_decoder=case.tiny_decoder, precision=precision
    )
    facts = share_facts(job.out, stats.p50_ms, costs, precision)
    peak = job.peak_mib()
    if peak is not None:
        facts["peak_device_mib"] = round(peak)
    del call
    job.release()
    return Figure(
        name=case.name,
        model=inference_size(job),
        workload=case.workload,
        engine=case.engine,
        precision=precision,
        batch=case.batch,
        unit="images/s",
        per_second=1e3 * case.batch / stats.p50_ms,
        stats=stats,
        validity=validity,
        facts=facts,
    )


def prepare(job: Job, model: Path, case: Case) -> Callable[[int], np.ndarray]:
    """Load the pipeline of a case.

    Returns:
        A function from a number to images uint8 [B, H, W, 3], with another prompt each time.

    """
    dtype = DTYPES[inference_precision(job)]
    pipe = _load(model, case.task, dtype)
    if case.tiny_decoder:
        # Typed as the full VAE there; both decode alike.
        pipe.vae = AutoencoderTiny.from_pretrained(tiny_decoder_folder(job), torch_dtype=dtype)
    pipe.to(job.device)
    pipe.set_progress_bar_config(disable=True)
    if case.engine == COMPILED:
        # A tiny run checks that the calls go through; the compiler itself would take its time.
        backend = "eager" if job.tiny else "inductor"
        pipe.unet = torch.compile(pipe.unet, backend=backend)
        pipe.vae.decode = torch.compile(pipe.vae.decode, backend=backend)
    sources = _sources(pipe, case)
    options: dict[str, Any] = {"num_inference_steps": 1, "guidance_scale": 0, "output_type": "np"}

    def call(number: int) -> np.ndarray:
        prompts = [f"a photo of a red apple, number {number}, {row}" for row in range(case.batch)]
        images = pipe(prompts, **sources(number), **options).images
        return (images * 255).round().astype(np.uint8)

    return call


def _load(model: Path, task: Task, dtype: torch.dtype) -> Any:
    kind: Any = StableDiffusionImg2ImgPipeline
    if task == "generate":
        kind = StableDiffusionPipeline
    elif task == "inpaint":
        kind = StableDiffusionInpaintPipeline
    pipe = kind.from_pretrained(model, safety_checker=None, torch_dtype=dtype)
    # 'trailing' puts the only step at the last timestep, and the step goes all the way to x0.
    one_step = {"timestep_spacing": "trailing", "set_alpha_to_one": True}
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **one_step)
    return pipe


def _sources(pipe: Any, case: Case) -> Callable[[int], dict[str, Any]]:
    """What a pipeline takes besides prompts, by the number of the query.

    diffusers' upscaler is another model, so an upscale is what ours is: the small image enlarged,
    then one step from it.
    """
    size = pipe.unet.config.sample_size * pipe.vae_scale_factor

    def of(number: int) -> dict[str, Any]:
        if case.task == "generate":
            return {}
        image = Image.fromarray(example_image(size, size, number))
        if case.task == "upscale":
            small = image.resize((size // UPSCALE, size // UPSCALE))
            image = small.resize((size, size), Image.Resampling.BICUBIC)
        inputs = {"image": [image] * case.batch, "strength": 1.0}
        if case.task == "inpaint":
            mask = Image.new("L", (size, size), 0)
            mask.paste(255, (size // 4, size // 4, size // 2, size // 2))
            inputs["mask_image"] = [mask] * case.batch
        return inputs

    return of

"""Base model (+ adaptor) -> bundle: merge, specialise, export, compare, list. ``export_bundle`` is the whole path."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from hipa_deploy import __version__
from hipa_deploy.bundle.folder import MANIFEST, SCHEMA, Bundle
from hipa_deploy.bundle.manifest import MAX_BATCH, Manifest
from hipa_deploy.errors import HipaError
from hipa_deploy.export.builders import (
    decoder_stage,
    encoder_stage,
    generator_stage,
    generic_decoder_stage,
    generic_unet_stage,
    text_encoder_stage,
    unet_stage,
)
from hipa_deploy.export.export_options import ExportOptions
from hipa_deploy.export.graph.axes import stage_axes
from hipa_deploy.export.graph.modules import stage_specs
from hipa_deploy.export.job import REFERENCE_PROMPT, ExportJob
from hipa_deploy.export.model_parts import BaseModel
from hipa_deploy.export.task import plan_task
from hipa_deploy.files import new_folder
from hipa_deploy.generate.noise import initial_noise
from hipa_deploy.generate.prompts import BAKED_CONTEXTS, BAKED_PROMPTS, read_closed_set
from hipa_deploy.generate.tokenizer import PromptTokenizer
from hipa_deploy.hashing import file_sha256
from hipa_deploy.images.example_source import example_inputs

__all__ = ["ExportJob", "ExportOptions", "export_bundle", "write_unet"]

REFERENCE_SEED = 0
ENCODED_AT_ONCE = 64


def export_bundle(options: ExportOptions, console: Console | None = None) -> Bundle:
    """Export ``options.model`` (+ adaptor) to a bundle at ``options.out``, whole or not at all.

    Raises:
        HipaError: an unsupported model, an adaptor or decoder that does not fit, a size out of range, options that
            exclude each other, an output folder in use, or a stage that does not agree with PyTorch.

    """
    _check(options)
    base = BaseModel.open(options.model)
    plan = plan_task(options, base)
    step = base.one_step(plan.timestep, options.size("height"), options.size("width"))
    axes = stage_axes(options.dynamic, step, base.size_multiple)
    with new_folder(options.out) as root, _progress(console) as say:
        job = ExportJob(options, base, root, step, axes, plan)
        say("text")
        _text(job)
        if plan.task != "generate":
            say("encoder")
            _write_encoder(job)
        say("UNet")
        write_unet(job)
        if not options.fuse:
            say("decoder")
            _write_decoder(job)
        if options.layout == "generic":
            _write_diffusers_index(job)
        say("manifest")
        _write_manifest(job)
    return Bundle.open(options.out)


def _check(options: ExportOptions) -> None:
    if not 1 <= options.batch <= MAX_BATCH:
        raise HipaError(
            f"batch {options.batch} is out of range. Expected 1 <= batch <= {MAX_BATCH}."
        )
    special = [name for name in ("fuse", "decoder", "prompts", "dynamic") if getattr(options, name)]
    if options.layout == "generic" and special:
        raise HipaError(
            f"--{special[0]} needs --layout onestep: the generic layout is what optimum can load."
        )


@contextmanager
def _progress(console: Console | None) -> Iterator[Callable[[str], None]]:
    """A line that says what is being exported, and for how long."""
    with Progress(
        TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console
    ) as progress:
        task = progress.add_task("", total=None)
        yield lambda what: progress.update(task, description=f"export: {what}")


def write_unet(job: ExportJob) -> str:
    """Write the stage that holds the UNet; the name of the tensor that it gives."""
    inputs = job.plan.inputs
    if job.options.fuse:
        name, build, output = "generator", generator_stage, "images"
    elif job.options.layout == "onestep":
        name, build, output = "unet", unet_stage, "latents"
    else:
        name, build, output = "unet", generic_unet_stage, "output"
        inputs = ("noise", "timestep", "context")
    job.write(name, partial(build, job), inputs, output)
    return output


def _write_decoder(job: ExportJob) -> None:
    if job.options.layout == "onestep":
        job.write("vae_decoder", partial(decoder_stage, job), ("latents",), "images")
    else:
        job.write("vae_decoder", partial(generic_decoder_stage, job), ("latent_sample",), "sample")


def _text(job: ExportJob) -> None:
    """Text encoder and tokenizer, or the contexts of a closed set of prompts; and the reference noise."""
    options, batch = job.options, job.batch
    prompts = read_closed_set(options.prompts) if options.prompts else [REFERENCE_PROMPT]
    tokenizer = _write_tokenizer(job.base, job.root / "tokenizer/tokenizer.json")
    tokens_NL = tokenizer(prompts)
    job.prompt = prompts[0]
    length, width = tokens_NL.shape[1], job.base.text_width
    job.specs = stage_specs(
        options.layout, options.dtype, batch, job.step, length, width, job.axes, job.plan.inputs
    )
    noise_BCHW = initial_noise([REFERENCE_SEED + i for i in range(batch)], job.step.latent_shape)
    job.reference |= {"tokens": tokens_NL[:1].repeat(batch, 0), "noise": noise_BCHW}
    job.given |= job.reference
    if options.prompts:
        _bake(job, tokens_NL, prompts)
    else:
        job.write("text_encoder", partial(text_encoder_stage, job), ("tokens",), "context")


def _write_tokenizer(base: BaseModel, path: Path) -> PromptTokenizer:
    """Write ``tokenizer.json``, padding and length inside, and read it as the runtime will."""
    fast = base.tokenizer()
    length = fast.model_max_length
    rust = fast.backend_tokenizer
    rust.enable_truncation(length)
    rust.enable_padding(length=length, pad_id=fast.pad_token_id, pad_token=fast.pad_token)
    path.parent.mkdir()
    rust.save(str(path))
    ours = PromptTokenizer(path)
    expected = fast(
        [REFERENCE_PROMPT], padding="max_length", max_length=length, return_tensors="np"
    ).input_ids
    if not np.array_equal(ours([REFERENCE_PROMPT]), expected):
        raise HipaError(
            f"{base.folder}/tokenizer: tokenizer.json does not agree with transformers. Please report this."
        )
    return ours


@torch.no_grad()
def _bake(job: ExportJob, tokens_NL: np.ndarray, prompts: list[str]) -> None:
    """Contexts in place of text encoder and tokenizer."""
    encoder = job.base.text_encoder()
    chunks = torch.from_numpy(tokens_NL).split(ENCODED_AT_ONCE)
    contexts_NLD = torch.cat([encoder(tokens_BL).last_hidden_state for tokens_BL in chunks]).numpy()
    job.reference["context"] = contexts_NLD[:1].repeat(job.batch, 0)
    stored_NLD = contexts_NLD.astype(np.float16 if job.options.dtype == "fp16" else np.float32)
    job.given["context"] = stored_NLD[:1].repeat(job.batch, 0)
    path = job.root / BAKED_CONTEXTS
    path.parent.mkdir()
    np.save(path, stored_NLD)
    (job.root / BAKED_PROMPTS).write_text("\n".join(prompts) + "\n", encoding="utf-8")
    shutil.rmtree(job.root / "tokenizer")


def _write_encoder(job: ExportJob) -> None:
    """The encoder of the source image, and what else of the reference the task takes."""
    step, plan = job.step, job.plan
    given = example_inputs(
        plan.task, step.height, step.width, step.height // step.latent_shape[1], plan.upscale or 1
    )
    job.reference |= {name: value[None].repeat(job.batch, 0) for name, value in given.items()}
    if "step" in plan.inputs:
        job.reference["step"] = np.asarray([0])
    job.given |= {
        name: value for name, value in job.reference.items() if name in ("image", "mask", "step")
    }
    job.write("vae_encoder", partial(encoder_stage, job), ("image",), "source")


def _write_diffusers_index(job: ExportJob) -> None:
    """``model_index.json``, configurations and the one-step scheduler: what optimum's ORTDiffusionPipeline reads."""
    index = {
        "_class_name": "StableDiffusionPipeline",
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
    }
    (job.root / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    for part, folder in (
        ("text_encoder", "text_encoder"),
        ("unet", "unet"),
        ("vae", "vae_decoder"),
    ):
        config = json.loads((job.base.folder / part / "config.json").read_text())
        (job.root / folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    ours = (
        job.root / "tokenizer/tokenizer.json"
    )  # save_pretrained writes its own, without padding and length
    content = ours.read_bytes()
    job.base.tokenizer().save_pretrained(ours.parent)
    ours.write_bytes(content)
    config = {
        "timestep_spacing": "trailing",
        "set_alpha_to_one": True,
        "clip_sample": False,
        "steps_offset": 0,
    }
    DDIMScheduler.from_config(job.base.scheduler().config, **config).save_pretrained(
        job.root / "scheduler"
    )


def _write_manifest(job: ExportJob) -> None:
    """Reference tensors and ``hipa.json``, which lists the hash of everything else."""
    _write_reference(job)
    files = sorted(path for path in job.root.rglob("*") if path.is_file())
    manifest = Manifest(
        schema_version=SCHEMA,
        producer=f"hipa-deploy {__version__}",
        layout=job.options.layout,
        precision=job.options.dtype,
        batch=job.batch,
        base_model=job.base.info,
        adaptor=job.adaptor,
        decoder=job.decoder,
        encoder=job.encoder,
        task=job.plan.task,
        strengths=job.plan.strengths,
        upscale=job.plan.upscale,
        one_step=job.step,
        stages=tuple(job.stages),
        end_to_end=job.stages[-1].parity,
        files={path.relative_to(job.root).as_posix(): file_sha256(path) for path in files},
    )
    (job.root / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n")


def _write_reference(job: ExportJob) -> None:
    folder = job.root / "reference"
    folder.mkdir()
    np.savez_compressed(folder / "tensors.npz", **job.reference)  # type: ignore[arg-type]  # numpy's stub
    seeds = list(range(REFERENCE_SEED, REFERENCE_SEED + job.batch))
    (folder / "prompts.json").write_text(
        json.dumps({"prompts": [job.prompt], "seeds": seeds}) + "\n"
    )

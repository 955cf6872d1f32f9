"""Base model (+ adaptor) -> bundle: merge, specialise, export, compare, list. ``export_bundle`` is the whole path."""

from __future__ import annotations

import gc
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from hipa_deploy import __version__
from hipa_deploy.adaptor import METADATA, read_metadata
from hipa_deploy.bundle import (
    MANIFEST,
    MAX_BATCH,
    SCHEMA,
    AdaptorInfo,
    Bundle,
    Layout,
    Manifest,
    OneStep,
    Parity,
    Precision,
    Stage,
    StageSpec,
)
from hipa_deploy.errors import HipaError
from hipa_deploy.export import parity
from hipa_deploy.export.base_model import BaseModel
from hipa_deploy.export.fold import fold_timestep
from hipa_deploy.export.merge import merge_adaptor
from hipa_deploy.export.stages import (
    GenericDecoder,
    GenericUNet,
    OneStepDecoder,
    OneStepUNet,
    TextEncoderStage,
    stage_specs,
    x0_from,
)
from hipa_deploy.export.to_onnx import OPSET, export_stage
from hipa_deploy.files import new_folder
from hipa_deploy.hashing import file_sha256
from hipa_deploy.one_step import initial_noise
from hipa_deploy.pipeline import OneStepPipeline
from hipa_deploy.tokenizer import PromptTokenizer

LAST_TIMESTEP = 999
REFERENCE_PROMPT, REFERENCE_SEED = "3d emoji of a red apple", 0


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What to export.

    ``dtype`` is the precision of weights and arithmetic inside the graphs; ``height`` and ``width`` are pixels
    (None: the size the model was trained for); ``batch`` is the images a call makes, static.
    """

    model: str
    out: Path
    adaptor: Path | None = None
    adaptor_scale: float = 1.0
    dtype: Precision = "fp16"
    layout: Layout = "onestep"
    height: int | None = None
    width: int | None = None
    batch: int = 1


@dataclass
class _Export:
    """The state that the stages share: constants, specifications, and the reference tensors so far."""

    options: ExportOptions
    base: BaseModel
    root: Path
    step: OneStep
    specs: dict[str, StageSpec]
    reference: dict[str, np.ndarray]
    stages: list[Stage] = field(default_factory=list)

    def write(self, name: str, module: torch.nn.Module, inputs: tuple[str, ...], expected: np.ndarray) -> None:
        """Export ``module`` in the asked precision, run it, and compare with PyTorch's float32 ``expected``."""
        spec = self.specs[name]
        module = module.half() if self.options.dtype == "fp16" else module
        export_stage(module, spec, self.root / name)
        del module
        gc.collect()
        feed = {t.name: self.reference[key].astype(t.dtype) for t, key in zip(spec.inputs, inputs, strict=True)}
        got = _run_once(self.root / name / "model.onnx", spec, feed)
        result = parity.check(name, got, expected, self.options.dtype)
        entry = Stage(spec=spec, path=f"{name}/model.onnx", precision=self.options.dtype, opset=OPSET, parity=result)
        self.stages.append(entry)


def export_bundle(options: ExportOptions, console: Console | None = None) -> Bundle:
    """Export ``options.model`` (+ adaptor) to a bundle at ``options.out``, whole or not at all.

    Raises:
        HipaError: an unsupported model, an adaptor that does not fit, a size out of range, an output folder in
            use, or a stage that does not agree with PyTorch.

    """
    if not 1 <= options.batch <= MAX_BATCH:
        raise HipaError(f"batch {options.batch} is out of range. Expected 1 <= batch <= {MAX_BATCH}.")
    base = BaseModel.open(options.model)
    step = base.one_step(_adaptor_timestep(options, base), options.height, options.width)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with new_folder(options.out) as root, Progress(*columns, console=console) as progress:
        task = progress.add_task("tokenizer", total=6)

        def say(what: str) -> None:
            progress.update(task, description=what, advance=1)

        tokens_BL = _write_tokenizer(base, root, options.batch)
        say("text encoder")
        job = _text_encoder(options, base, root, step, tokens_BL)
        say("UNet")
        adaptor = _unet(job)
        say("VAE decoder")
        _vae_decoder(job)
        if options.layout == "generic":
            _write_diffusers_index(job)
        say("manifest")
        _write_manifest(job, adaptor)
        say("end to end")
        _check_end_to_end(job, adaptor)
        say("done")
    return Bundle.open(options.out)


def _adaptor_timestep(options: ExportOptions, base: BaseModel) -> int:
    """The timestep that the adaptor was trained for (999 unless it says otherwise)."""
    if options.adaptor is None:
        return LAST_TIMESTEP
    if not options.adaptor.is_dir():
        raise HipaError(f"{options.adaptor} does not exist. Expected an adaptor folder, as hipa-train writes it.")
    if not (options.adaptor / METADATA).exists():  # another tool's LoRA says nothing of base or timestep
        return LAST_TIMESTEP
    return read_metadata(options.adaptor, base.folder).timestep


def _write_tokenizer(base: BaseModel, root: Path, batch: int) -> np.ndarray:
    """Write ``tokenizer.json``, padding and length inside; the reference prompt's tokens int64 [B, L]."""
    fast = base.tokenizer()
    length, path = fast.model_max_length, root / "tokenizer/tokenizer.json"
    rust = fast.backend_tokenizer
    rust.enable_truncation(length)
    rust.enable_padding(length=length, pad_id=fast.pad_token_id, pad_token=fast.pad_token)
    path.parent.mkdir()
    rust.save(str(path))
    tokens_BL = PromptTokenizer(path)([REFERENCE_PROMPT] * batch)
    expected = fast([REFERENCE_PROMPT], padding="max_length", max_length=length, return_tensors="np").input_ids
    if not np.array_equal(tokens_BL[:1], expected):
        raise HipaError(
            f"{base.folder}/tokenizer: tokenizer.json does not agree with transformers. Please report this."
        )
    return tokens_BL


@torch.no_grad()
def _text_encoder(options: ExportOptions, base: BaseModel, root: Path, step: OneStep, tokens_BL: np.ndarray) -> _Export:
    encoder = base.text_encoder()
    context_BLD = encoder(torch.from_numpy(tokens_BL)).last_hidden_state.numpy()
    specs = stage_specs(options.layout, options.dtype, options.batch, step, tokens_BL.shape[1], context_BLD.shape[2])
    noise_BCHW = initial_noise([REFERENCE_SEED + i for i in range(options.batch)], step.latent_shape)
    reference = {"tokens": tokens_BL, "context": context_BLD, "noise": noise_BCHW}
    job = _Export(options, base, root, step, specs, reference)
    job.write("text_encoder", TextEncoderStage(encoder), ("tokens",), context_BLD)
    return job


@torch.no_grad()
def _unet(job: _Export) -> AdaptorInfo | None:
    """Merge, keep the general UNet's answer as the reference, then specialise and export."""
    unet, adaptor = job.base.unet(), None
    if job.options.adaptor:
        adaptor = merge_adaptor(unet, job.options.adaptor, job.options.adaptor_scale)
    noise, context = (torch.from_numpy(job.reference[key]) for key in ("noise", "context"))
    output = unet(noise, job.step.timestep, context, return_dict=False)[0]
    job.reference["latents"] = (x0_from(noise, output, job.step) / job.step.scaling_factor).numpy()
    if job.options.layout == "onestep":
        fold_timestep(unet, job.step.timestep)
        job.write("unet", OneStepUNet(unet, job.step), ("noise", "context"), job.reference["latents"])
    else:
        job.reference["timestep"] = np.asarray([job.step.timestep])
        job.write("unet", GenericUNet(unet), ("noise", "timestep", "context"), output.numpy())
    return adaptor


@torch.no_grad()
def _vae_decoder(job: _Export) -> None:
    vae = job.base.vae()
    latents = torch.from_numpy(job.reference["latents"])
    sample_BCHW = vae.decode(latents, return_dict=False)[0]
    job.reference["images"] = OneStepDecoder(vae)(latents).numpy()
    if job.options.layout == "onestep":
        job.write("vae_decoder", OneStepDecoder(vae), ("latents",), job.reference["images"])
    else:
        job.write("vae_decoder", GenericDecoder(vae), ("latents",), sample_BCHW.numpy())


def _run_once(path: Path, spec: StageSpec, feed: dict[str, np.ndarray]) -> np.ndarray:
    from hipa_deploy.engines.onnxruntime_runner import OnnxRuntimeRunner

    with OnnxRuntimeRunner(path, spec, "onnxruntime") as runner:
        return runner(**feed)[spec.outputs[0].name]


def _write_diffusers_index(job: _Export) -> None:
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
    for part, folder in (("text_encoder", "text_encoder"), ("unet", "unet"), ("vae", "vae_decoder")):
        config = json.loads((job.base.folder / part / "config.json").read_text())
        (job.root / folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    ours = job.root / "tokenizer/tokenizer.json"  # save_pretrained writes its own, without padding and length
    content = ours.read_bytes()
    job.base.tokenizer().save_pretrained(ours.parent)
    ours.write_bytes(content)
    config = {"timestep_spacing": "trailing", "set_alpha_to_one": True, "clip_sample": False, "steps_offset": 0}
    DDIMScheduler.from_config(job.base.scheduler().config, **config).save_pretrained(job.root / "scheduler")


def _write_manifest(job: _Export, adaptor: AdaptorInfo | None, end_to_end: Parity | None = None) -> None:
    """Reference tensors and ``hipa.json``, which lists the hash of everything else."""
    reference = job.root / "reference"
    reference.mkdir(exist_ok=True)
    np.savez_compressed(reference / "tensors.npz", **job.reference)  # type: ignore[arg-type]  # numpy's stub
    seeds = list(range(REFERENCE_SEED, REFERENCE_SEED + job.options.batch))
    (reference / "prompts.json").write_text(json.dumps({"prompts": [REFERENCE_PROMPT], "seeds": seeds}) + "\n")
    files = sorted(path for path in job.root.rglob("*") if path.is_file() and path.name != MANIFEST)
    manifest = Manifest(
        schema_version=SCHEMA,
        producer=f"hipa-deploy {__version__}",
        layout=job.options.layout,
        precision=job.options.dtype,
        batch=job.options.batch,
        base_model=job.base.info(),
        adaptor=adaptor,
        one_step=job.step,
        stages=tuple(job.stages),
        end_to_end=end_to_end or job.stages[-1].parity,
        files={path.relative_to(job.root).as_posix(): file_sha256(path) for path in files},
    )
    (job.root / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n")


def _check_end_to_end(job: _Export, adaptor: AdaptorInfo | None) -> None:
    """Run the written bundle as a user would, prompt to image, and compare with PyTorch's image."""
    with OneStepPipeline.load(job.root, backend="onnxruntime") as pipe:
        images = pipe(REFERENCE_PROMPT, seed=REFERENCE_SEED, count=job.options.batch).images_BHWC
    _write_manifest(job, adaptor, parity.check("prompt to image", images, job.reference["images"], job.options.dtype))

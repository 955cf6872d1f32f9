"""Base model (+ adaptor) -> bundle: merge, specialise, export, compare, list. ``export_bundle`` is the whole path."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from hipa_deploy import __version__
from hipa_deploy.adaptor import METADATA, read_metadata
from hipa_deploy.bundle import (
    MANIFEST,
    MAX_BATCH,
    SCHEMA,
    AdaptorInfo,
    Axis,
    Bundle,
    DecoderInfo,
    Layout,
    Manifest,
    OneStep,
    Precision,
    Stage,
    StageSpec,
)
from hipa_deploy.decoder import vae_sha256
from hipa_deploy.errors import HipaError
from hipa_deploy.export import parity
from hipa_deploy.export.axes import stage_axes
from hipa_deploy.export.base_model import BaseModel
from hipa_deploy.export.cost import stage_cost
from hipa_deploy.export.fold import fold_timestep
from hipa_deploy.export.merge import merge_adaptor
from hipa_deploy.export.precision import Ranges, fewest_islands, to_half
from hipa_deploy.export.run_apart import run_apart
from hipa_deploy.export.stages import (
    TORCH_DTYPES,
    Generator,
    GenericDecoder,
    GenericUNet,
    OneStepDecoder,
    OneStepUNet,
    TextEncoderStage,
    TinyDecoder,
    stage_specs,
    to_uint8,
)
from hipa_deploy.export.to_onnx import OPSET, export_stage
from hipa_deploy.files import new_folder
from hipa_deploy.hashing import file_sha256, folder_sha256
from hipa_deploy.one_step import initial_noise, predict_x0
from hipa_deploy.prompts import BAKED_CONTEXTS, BAKED_PROMPTS, read_closed_set
from hipa_deploy.tokenizer import PromptTokenizer

LAST_TIMESTEP = 999
REFERENCE_PROMPT, REFERENCE_SEED = "3d emoji of a red apple", 0
ENCODED_AT_ONCE = 64
WHOLE_TEXT_ENCODER = ("encoder",)


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What to export.

    ``dtype`` is the precision of weights and arithmetic inside the graphs; ``height`` and ``width`` are pixels
    (None: the size the model was trained for); ``batch`` is the images a call makes, static. ``fuse`` puts UNet and
    decoder into one stage, 'generator'. ``decoder`` None is the model's own; otherwise an AutoencoderTiny folder.
    ``prompts`` is a text file, one prompt a line: the bundle then holds their text contexts in place of the text
    encoder, and takes no others. ``dynamic`` has the axes 'batch', 'height' and 'width' that are not static, in
    images and pixels.
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
    fuse: bool = False
    decoder: Path | None = None
    prompts: Path | None = None
    dynamic: Mapping[str, Axis] = field(default_factory=dict)

    def size(self, name: Literal["batch", "height", "width"]) -> int | None:
        """The size to reference: a dynamic axis' usual one, or the static one that was asked for."""
        return self.dynamic[name].opt if name in self.dynamic else getattr(self, name)


def export_bundle(options: ExportOptions, console: Console | None = None) -> Bundle:
    """Export ``options.model`` (+ adaptor) to a bundle at ``options.out``, whole or not at all.

    Raises:
        HipaError: an unsupported model, an adaptor or decoder that does not fit, a size out of range, options that
            exclude each other, an output folder in use, or a stage that does not agree with PyTorch.

    """
    _check(options)
    base = BaseModel.open(options.model)
    step = base.one_step(_adaptor_timestep(options, base), options.size("height"), options.size("width"))
    axes = stage_axes(options.dynamic, step, base.size_multiple)
    with new_folder(options.out) as root, _progress(console) as say:
        job = _Export(options, base, root, step, axes)
        say("text")
        _text(job)
        if options.fuse:
            say("generator")
            job.write("generator", partial(_generator, job), ("noise", "context"), "images")
        elif options.layout == "onestep":
            say("UNet")
            job.write("unet", partial(_unet, job), ("noise", "context"), "latents")
            say("decoder")
            job.write("vae_decoder", partial(_decoder, job), ("latents",), "images")
        else:
            say("UNet")
            job.write("unet", partial(_generic_unet, job), ("noise", "timestep", "context"), "output")
            say("decoder")
            job.write("vae_decoder", partial(_generic_decoder, job), ("latent_sample",), "sample")
            _write_diffusers_index(job)
        say("manifest")
        _write_manifest(job)
    return Bundle.open(options.out)


def _check(options: ExportOptions) -> None:
    if not 1 <= options.batch <= MAX_BATCH:
        raise HipaError(f"batch {options.batch} is out of range. Expected 1 <= batch <= {MAX_BATCH}.")
    special = [name for name in ("fuse", "decoder", "prompts", "dynamic") if getattr(options, name)]
    if options.layout == "generic" and special:
        raise HipaError(f"--{special[0]} needs --layout onestep: the generic layout is what optimum can load.")


@contextmanager
def _progress(console: Console | None) -> Iterator[Callable[[str], None]]:
    """A line that says what is being exported, and for how long."""
    with Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task("", total=None)
        yield lambda what: progress.update(task, description=f"export: {what}")


@dataclass
class _Export:
    """What the stages share. ``reference`` holds PyTorch's float32 tensors, ``given`` those of the ONNX stages."""

    options: ExportOptions
    base: BaseModel
    root: Path
    step: OneStep
    axes: dict[str, Axis]
    specs: dict[str, StageSpec] = field(default_factory=dict)
    reference: dict[str, np.ndarray] = field(default_factory=dict)
    given: dict[str, np.ndarray] = field(default_factory=dict)
    stages: list[Stage] = field(default_factory=list)
    prompt: str = REFERENCE_PROMPT
    adaptor: AdaptorInfo | None = None
    decoder: DecoderInfo | None = None

    @property
    def batch(self) -> int:
        """Images of the reference."""
        return self.options.size("batch") or 1

    def write(self, name: str, build: Callable[[], nn.Module], inputs: tuple[str, ...], output: str) -> None:
        """Export the module that ``build`` returns, run it, and compare with the reference that ``build`` left.

        The module lives only while it is exported, so the model is never in memory twice; if float16 turns out
        not to be faithful it is built once more, to find the layers that need float32.
        """
        precision, folder = self.options.dtype, self.root / name
        islands = self._to_onnx(name, build)
        got = self._run(name, inputs)
        if precision == "fp16" and parity.problem(got, self.reference[output], precision):
            islands = self._to_onnx(name, build, mend=(inputs, output))
            got = self._run(name, inputs)
        self.given[output] = got
        self.stages.append(
            Stage(
                spec=self.specs[name],
                path=f"{name}/model.onnx",
                precision="fp32" if islands == WHOLE_TEXT_ENCODER else precision,
                opset=OPSET,
                fp32_islands=islands,
                parity=parity.check(name, got, self.reference[output], precision),
                cost=stage_cost(folder / "model.onnx", self.specs[name]),
            )
        )

    @torch.no_grad()
    def _to_onnx(
        self, name: str, build: Callable[[], nn.Module], mend: tuple[tuple[str, ...], str] | None = None
    ) -> tuple[str, ...]:
        """Build, convert to the asked precision, write the graph; the names of the parts left in float32."""
        with Ranges().watching() as ranges:
            module = build()
        islands: tuple[str, ...] = ()
        if self.options.dtype == "fp16":
            islands = ranges.islands(module)
            if mend:
                feed = tuple(torch.from_numpy(self.given[key].astype(self.reference[key].dtype)) for key in mend[0])
                islands = fewest_islands(module, feed, partial(self._faithful, mend[1]), islands)
            if (
                islands and name == "text_encoder"
            ):  # its attention is transformers', and the whole costs next to nothing
                islands = WHOLE_TEXT_ENCODER
            to_half(module, islands)
        export_stage(module, self.specs[name], self.root / name)
        del module
        gc.collect()  # torch.export leaves cycles that hold the weights
        return islands

    def _faithful(self, output: str, got: Tensor) -> bool:
        return parity.problem(got.numpy(), self.reference[output], "fp16") is None

    def _run(self, name: str, inputs: tuple[str, ...]) -> np.ndarray:
        spec = self.specs[name]
        feed = {t.name: self.given[key].astype(t.dtype) for t, key in zip(spec.inputs, inputs, strict=True)}
        return run_apart(self.root / name / "model.onnx", spec, feed)


def _adaptor_timestep(options: ExportOptions, base: BaseModel) -> int:
    """The timestep that the adaptor was trained for (999 unless it says otherwise)."""
    if options.adaptor is None:
        return LAST_TIMESTEP
    if not options.adaptor.is_dir():
        raise HipaError(f"{options.adaptor} does not exist. Expected an adaptor folder, as hipa-train writes it.")
    if not (options.adaptor / METADATA).exists():  # another tool's LoRA says nothing of base or timestep
        return LAST_TIMESTEP
    return read_metadata(options.adaptor, base.folder).timestep


def _text(job: _Export) -> None:
    """Text encoder and tokenizer, or the contexts of a closed set of prompts; and the reference noise."""
    options, batch = job.options, job.batch
    prompts = read_closed_set(options.prompts) if options.prompts else [REFERENCE_PROMPT]
    tokenizer = _write_tokenizer(job.base, job.root / "tokenizer/tokenizer.json")
    tokens_NL = tokenizer(prompts)
    job.prompt = prompts[0]
    length, width = tokens_NL.shape[1], job.base.text_width
    job.specs = stage_specs(options.layout, options.dtype, batch, job.step, length, width, job.axes)
    noise_BCHW = initial_noise([REFERENCE_SEED + i for i in range(batch)], job.step.latent_shape)
    job.reference |= {"tokens": tokens_NL[:1].repeat(batch, 0), "noise": noise_BCHW}
    job.given |= job.reference
    if options.prompts:
        _bake(job, tokens_NL, prompts)
    else:
        job.write("text_encoder", partial(_text_encoder, job), ("tokens",), "context")


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
    expected = fast([REFERENCE_PROMPT], padding="max_length", max_length=length, return_tensors="np").input_ids
    if not np.array_equal(ours([REFERENCE_PROMPT]), expected):
        raise HipaError(
            f"{base.folder}/tokenizer: tokenizer.json does not agree with transformers. Please report this."
        )
    return ours


@torch.no_grad()
def _bake(job: _Export, tokens_NL: np.ndarray, prompts: list[str]) -> None:
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


def _text_encoder(job: _Export) -> nn.Module:
    encoder = job.base.text_encoder()
    job.reference["context"] = encoder(torch.from_numpy(job.reference["tokens"])).last_hidden_state.numpy()
    return TextEncoderStage(encoder, TORCH_DTYPES[job.specs["text_encoder"].outputs[0].dtype])


def _general_unet(job: _Export) -> UNet2DConditionModel:
    """The merged UNet, after its general form has given the references: its output, and x0."""
    unet, step, reference = job.base.unet(), job.step, job.reference
    if job.options.adaptor:
        job.adaptor = merge_adaptor(unet, job.options.adaptor, job.options.adaptor_scale)
    noise, context = (torch.from_numpy(reference[key]) for key in ("noise", "context"))
    reference["output"] = unet(noise, step.timestep, context, return_dict=False)[0].numpy()
    reference["latents"] = predict_x0(reference["noise"], reference["output"], step.alpha_bar, step.prediction_type)
    return unet


def _unet(job: _Export) -> nn.Module:
    unet = _general_unet(job)
    fold_timestep(unet, job.step.timestep)
    return OneStepUNet(unet, job.step)


def _generic_unet(job: _Export) -> nn.Module:
    unet = _general_unet(job)
    job.reference["timestep"] = job.given["timestep"] = np.asarray([job.step.timestep])
    return GenericUNet(unet)


def _decoder(job: _Export) -> nn.Module:
    """The decoder that was asked for, after its general form has given the reference images."""
    latents, folder = torch.from_numpy(job.reference["latents"]), job.options.decoder
    if folder:
        tiny = job.base.tiny_decoder(folder)
        job.decoder = DecoderInfo(kind="tiny", name=folder.resolve().name, sha256=folder_sha256(folder))
        sample_BCHW = tiny.decode(latents, return_dict=False)[0]
        module: nn.Module = TinyDecoder(tiny)
    else:
        vae = _general_vae(job)
        sample_BCHW = vae.decode(latents / job.step.scaling_factor, return_dict=False)[0]
        module = OneStepDecoder(vae)
    job.reference["images"] = to_uint8(sample_BCHW / 2 + 0.5).numpy()
    return module


def _general_vae(job: _Export) -> AutoencoderKL:
    job.decoder = DecoderInfo(kind="full", name="vae", sha256=vae_sha256(job.base.folder))
    return job.base.vae()


def _generator(job: _Export) -> nn.Module:
    unet = _unet(job)
    return Generator(unet, _decoder(job))


def _generic_decoder(job: _Export) -> nn.Module:
    """Fed as the runtime feeds it: x0 of what the UNet in ONNX gave."""
    vae, step = _general_vae(job), job.step
    for tensors in (job.reference, job.given):
        x0_BCHW = predict_x0(tensors["noise"], tensors["output"], step.alpha_bar, step.prediction_type)
        tensors["latent_sample"] = x0_BCHW / np.float32(step.scaling_factor)
    sample_BCHW = vae.decode(torch.from_numpy(job.reference["latent_sample"]), return_dict=False)[0]
    job.reference |= {"sample": sample_BCHW.numpy(), "images": to_uint8(sample_BCHW / 2 + 0.5).numpy()}
    return GenericDecoder(vae)


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


def _write_manifest(job: _Export) -> None:
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
        one_step=job.step,
        stages=tuple(job.stages),
        end_to_end=job.stages[-1].parity,
        files={path.relative_to(job.root).as_posix(): file_sha256(path) for path in files},
    )
    (job.root / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n")


def _write_reference(job: _Export) -> None:
    folder = job.root / "reference"
    folder.mkdir()
    np.savez_compressed(folder / "tensors.npz", **job.reference)  # type: ignore[arg-type]  # numpy's stub
    seeds = list(range(REFERENCE_SEED, REFERENCE_SEED + job.batch))
    (folder / "prompts.json").write_text(json.dumps({"prompts": [job.prompt], "seeds": seeds}) + "\n")

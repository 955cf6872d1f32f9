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

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from hipa_deploy import __version__
from hipa_deploy.bundle import (
    MANIFEST,
    MAX_BATCH,
    SCHEMA,
    AdaptorInfo,
    Axis,
    Bundle,
    DecoderInfo,
    EncoderInfo,
    Manifest,
    OneStep,
    Parity,
    Stage,
    StageSpec,
)
from hipa_deploy.decoder import vae_sha256
from hipa_deploy.errors import HipaError
from hipa_deploy.example_source import example_inputs
from hipa_deploy.export import parity
from hipa_deploy.export.axes import stage_axes
from hipa_deploy.export.base_model import BaseModel
from hipa_deploy.export.cost import stage_cost
from hipa_deploy.export.fold import fold_timestep
from hipa_deploy.export.merge import merge_adaptor
from hipa_deploy.export.options import ExportOptions
from hipa_deploy.export.precision import Ranges, fewest_islands, to_half
from hipa_deploy.export.run_apart import run_apart
from hipa_deploy.export.stages import (
    TORCH_DTYPES,
    Generator,
    GenericDecoder,
    GenericUNet,
    OneStepDecoder,
    OneStepEncoder,
    OneStepUNet,
    TextEncoderStage,
    TinyDecoder,
    TinyEncoder,
    from_uint8,
    seen_by_unet,
    stage_specs,
    to_uint8,
)
from hipa_deploy.export.task import TaskPlan, plan_task
from hipa_deploy.export.to_onnx import OPSET, export_stage
from hipa_deploy.files import new_folder
from hipa_deploy.hashing import file_sha256, folder_sha256
from hipa_deploy.one_step import initial_noise, predict_x0
from hipa_deploy.prompts import BAKED_CONTEXTS, BAKED_PROMPTS, read_closed_set
from hipa_deploy.tasks import STEP_INPUTS, finish_latents, start_latents
from hipa_deploy.tokenizer import PromptTokenizer

REFERENCE_PROMPT, REFERENCE_SEED = "3d emoji of a red apple", 0
ENCODED_AT_ONCE = 64
WHOLE_TEXT_ENCODER = ("encoder",)


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
class ExportJob:
    """What the stages share. ``reference`` holds PyTorch's float32 tensors, ``given`` those of the ONNX stages.

    ``islands``, by stage, are those of a bundle whose graph is wanted once more; None: find out which are needed.
    """

    options: ExportOptions
    base: BaseModel
    root: Path
    step: OneStep
    axes: dict[str, Axis]
    plan: TaskPlan
    specs: dict[str, StageSpec] = field(default_factory=dict)
    reference: dict[str, np.ndarray] = field(default_factory=dict)
    given: dict[str, np.ndarray] = field(default_factory=dict)
    stages: list[Stage] = field(default_factory=list)
    prompt: str = REFERENCE_PROMPT
    adaptor: AdaptorInfo | None = None
    decoder: DecoderInfo | None = None
    encoder: EncoderInfo | None = None
    islands: Mapping[str, tuple[str, ...]] | None = None

    @property
    def batch(self) -> int:
        """Images of the reference."""
        return self.options.size("batch") or 1

    @property
    def moments(self) -> list[tuple[int, float]]:
        """Timestep and alpha_bar of the step, at each strength of an edit."""
        return [(moment.timestep, moment.alpha_bar) for moment in self.plan.strengths or (self.step,)]

    def write(self, name: str, build: Callable[[], nn.Module], inputs: tuple[str, ...], output: str) -> None:
        """Export the module that ``build`` returns, run it, and compare with the reference that ``build`` left.

        The module lives only while it is exported, so the model is never in memory twice; if float16 turns out
        not to be faithful it is built once more, to find the layers that need float32.
        """
        precision, folder = self.options.dtype, self.root / name
        islands = self._to_onnx(name, build)
        got = self._run_all(name, inputs)
        if precision == "fp16" and self.islands is None and (wrong := self._problems(got, output)):
            self.given["step"] = np.asarray([min(wrong)])
            islands = self._to_onnx(name, build, mend=(inputs, at_moment(output, min(wrong))))
            got = self._run_all(name, inputs)
        if self.islands is not None and (wrong := self._problems(got, output)):
            raise HipaError(f"{name} {wrong[min(wrong)]}, with the bundle's FP32 islands. Export a bundle of its own.")
        self.given[output] = got[0]
        self.stages.append(
            Stage(
                spec=self.specs[name],
                path=f"{name}/model.onnx",
                precision="fp32" if islands == WHOLE_TEXT_ENCODER else precision,
                opset=OPSET,
                fp32_islands=islands,
                parity=self._parity(name, got, output),
                cost=stage_cost(folder / "model.onnx", self.specs[name]),
            )
        )

    def _parity(self, name: str, got: list[np.ndarray], output: str) -> Parity:
        """Of several strengths, the worst."""
        found = [
            parity.check(name, value, self.reference[at_moment(output, index)], self.options.dtype)
            for index, value in enumerate(got)
        ]
        return min(found, key=lambda measured: measured.psnr_db)

    def _problems(self, got: list[np.ndarray], output: str) -> dict[int, str]:
        """What is wrong, by the number of the strength."""
        found = {
            index: parity.problem(value, self.reference[at_moment(output, index)], self.options.dtype)
            for index, value in enumerate(got)
        }
        return {index: wrong for index, wrong in found.items() if wrong}

    @torch.no_grad()
    def _to_onnx(
        self, name: str, build: Callable[[], nn.Module], mend: tuple[tuple[str, ...], str] | None = None
    ) -> tuple[str, ...]:
        """Build, convert to the asked precision, write the graph; the names of the parts left in float32."""
        with Ranges().watching() as ranges:
            module = build()
        islands: tuple[str, ...] = ()
        if self.options.dtype == "fp16":
            islands = self._find_islands(name, module, ranges, mend) if self.islands is None else self.islands[name]
            to_half(module, islands)
        export_stage(module, self.specs[name], self.root / name)
        del module
        gc.collect()  # torch.export leaves cycles that hold the weights
        return islands

    def _find_islands(
        self, name: str, module: nn.Module, ranges: Ranges, mend: tuple[tuple[str, ...], str] | None
    ) -> tuple[str, ...]:
        islands = ranges.islands(module)
        if mend:
            feed = tuple(torch.from_numpy(self.given[key].astype(self.reference[key].dtype)) for key in mend[0])
            islands = fewest_islands(module, feed, partial(self._faithful, mend[1]), islands)
        if islands and name == "text_encoder":  # its attention is transformers', and the whole costs next to nothing
            return WHOLE_TEXT_ENCODER
        return islands

    def _faithful(self, output: str, got: Tensor) -> bool:
        return parity.problem(got.numpy(), self.reference[output], "fp16") is None

    def _run_all(self, name: str, inputs: tuple[str, ...]) -> list[np.ndarray]:
        """What the stage gives; of a UNet for several strengths, at each."""
        if "step" not in inputs:
            return [self._run(name, inputs, self.given)]
        numbers = range(len(self.plan.strengths))
        return [self._run(name, inputs, self.given | {"step": np.asarray([number])}) for number in numbers]

    def _run(self, name: str, inputs: tuple[str, ...], given: Mapping[str, np.ndarray]) -> np.ndarray:
        spec = self.specs[name]
        feed = {t.name: given[key].astype(t.dtype) for t, key in zip(spec.inputs, inputs, strict=True)}
        return run_apart(self.root / name / "model.onnx", spec, feed)


def at_moment(name: str, number: int) -> str:
    """The key of a reference tensor at an edit's strength ``number``: 'latents' at the largest, then 'latents_1'."""
    return f"{name}_{number}" if number else name


def write_unet(job: ExportJob) -> str:
    """Write the stage that holds the UNet; the name of the tensor that it gives."""
    inputs = job.plan.inputs
    if job.options.fuse:
        name, build, output = "generator", _generator, "images"
    elif job.options.layout == "onestep":
        name, build, output = "unet", _unet, "latents"
    else:
        name, build, output = "unet", _generic_unet, "output"
        inputs = ("noise", "timestep", "context")
    job.write(name, partial(build, job), inputs, output)
    return output


def _write_decoder(job: ExportJob) -> None:
    if job.options.layout == "onestep":
        job.write("vae_decoder", partial(_decoder, job), ("latents",), "images")
    else:
        job.write("vae_decoder", partial(_generic_decoder, job), ("latent_sample",), "sample")


def _text(job: ExportJob) -> None:
    """Text encoder and tokenizer, or the contexts of a closed set of prompts; and the reference noise."""
    options, batch = job.options, job.batch
    prompts = read_closed_set(options.prompts) if options.prompts else [REFERENCE_PROMPT]
    tokenizer = _write_tokenizer(job.base, job.root / "tokenizer/tokenizer.json")
    tokens_NL = tokenizer(prompts)
    job.prompt = prompts[0]
    length, width = tokens_NL.shape[1], job.base.text_width
    job.specs = stage_specs(options.layout, options.dtype, batch, job.step, length, width, job.axes, job.plan.inputs)
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


def _text_encoder(job: ExportJob) -> nn.Module:
    encoder = job.base.text_encoder()
    job.reference["context"] = encoder(torch.from_numpy(job.reference["tokens"])).last_hidden_state.numpy()
    return TextEncoderStage(encoder, TORCH_DTYPES[job.specs["text_encoder"].outputs[0].dtype])


def _write_encoder(job: ExportJob) -> None:
    """The encoder of the source image, and what else of the reference the task takes."""
    step, plan = job.step, job.plan
    given = example_inputs(plan.task, step.height, step.width, step.height // step.latent_shape[1], plan.upscale or 1)
    job.reference |= {name: value[None].repeat(job.batch, 0) for name, value in given.items()}
    if "step" in plan.inputs:
        job.reference["step"] = np.asarray([0])
    job.given |= {name: value for name, value in job.reference.items() if name in ("image", "mask", "step")}
    job.write("vae_encoder", partial(_encoder, job), ("image",), "source")


def _encoder(job: ExportJob) -> nn.Module:
    """The encoder that was asked for, after its general form has given the reference latents."""
    sample_BCHW, folder = from_uint8(torch.from_numpy(job.reference["image"])) * 2 - 1, job.options.encoder
    if folder:
        tiny = job.base.tiny_encoder(folder)
        job.encoder = EncoderInfo(kind="tiny", name=folder.resolve().name, sha256=folder_sha256(folder))
        source_BCHW = tiny.encode(sample_BCHW).latents
        module: nn.Module = TinyEncoder(tiny)
    else:
        vae = job.base.vae()
        job.encoder = EncoderInfo(kind="full", name="vae", sha256=vae_sha256(job.base.folder))
        source_BCHW = vae.encode(sample_BCHW).latent_dist.mean * job.step.scaling_factor
        module = OneStepEncoder(vae)
    job.reference["source"] = source_BCHW.numpy()
    return module


def _general_unet(job: ExportJob) -> UNet2DConditionModel:
    """The merged UNet, after its general form has given the references: its output, and the latents to decode."""
    unet = job.base.unet(job.plan.task)
    if job.options.adaptor:
        job.adaptor = merge_adaptor(unet, job.options.adaptor, job.options.adaptor_scale)
    for number, (timestep, alpha_bar) in enumerate(job.moments):
        output_BCHW, latents_BCHW = _general_step(job, unet, timestep, alpha_bar)
        job.reference |= {at_moment("output", number): output_BCHW, at_moment("latents", number): latents_BCHW}
    return unet


def _general_step(
    job: ExportJob, unet: UNet2DConditionModel, timestep: int, alpha_bar: float
) -> tuple[np.ndarray, np.ndarray]:
    """One step of the task in PyTorch FP32: the UNet's output, and the latents to decode."""
    task, concatenates = job.plan.task, unet.config.in_channels != job.step.latent_shape[0]
    given = {name: job.reference[name] for name in STEP_INPUTS[task]}
    start_BCHW = start_latents(task, given, alpha_bar, concatenates=concatenates)
    start, context, *_ = (torch.from_numpy(value) for value in (start_BCHW, job.reference["context"]))
    sample = seen_by_unet(start, {n: torch.from_numpy(v) for n, v in given.items()}, concatenates=concatenates)
    output_BCHW = unet(sample, timestep, context, return_dict=False)[0].numpy()
    x0_BCHW = predict_x0(start_BCHW, output_BCHW, alpha_bar, job.step.prediction_type)
    return output_BCHW, finish_latents(task, x0_BCHW, given)


def _unet(job: ExportJob) -> nn.Module:
    unet = _general_unet(job)
    fold_timestep(unet, *(timestep for timestep, _ in job.moments))
    return OneStepUNet(unet, job.step, job.plan.task, job.plan.strengths)


def _generic_unet(job: ExportJob) -> nn.Module:
    unet = _general_unet(job)
    job.reference["timestep"] = job.given["timestep"] = np.asarray([job.step.timestep])
    return GenericUNet(unet)


def _decoder(job: ExportJob) -> nn.Module:
    """The decoder that was asked for, after its general form has given the reference images."""
    folder = job.options.decoder
    vae: AutoencoderTiny | AutoencoderKL
    if folder:
        vae = job.base.tiny_decoder(folder)
        job.decoder = DecoderInfo(kind="tiny", name=folder.resolve().name, sha256=folder_sha256(folder))
    else:
        vae = _general_vae(job)
    for number in range(len(job.moments)):
        latents_BCHW = torch.from_numpy(job.reference[at_moment("latents", number)])
        sample_BCHW = vae.decode(latents_BCHW if folder else latents_BCHW / job.step.scaling_factor).sample
        job.reference[at_moment("images", number)] = to_uint8(sample_BCHW / 2 + 0.5).numpy()
    return TinyDecoder(vae) if isinstance(vae, AutoencoderTiny) else OneStepDecoder(vae)


def _general_vae(job: ExportJob) -> AutoencoderKL:
    job.decoder = DecoderInfo(kind="full", name="vae", sha256=vae_sha256(job.base.folder))
    return job.base.vae()


def _generator(job: ExportJob) -> nn.Module:
    unet = _unet(job)
    return Generator(unet, _decoder(job))


def _generic_decoder(job: ExportJob) -> nn.Module:
    """Fed as the runtime feeds it: x0 of what the UNet in ONNX gave."""
    vae, step = _general_vae(job), job.step
    for tensors in (job.reference, job.given):
        x0_BCHW = predict_x0(tensors["noise"], tensors["output"], step.alpha_bar, step.prediction_type)
        tensors["latent_sample"] = x0_BCHW / np.float32(step.scaling_factor)
    sample_BCHW = vae.decode(torch.from_numpy(job.reference["latent_sample"]), return_dict=False)[0]
    job.reference |= {"sample": sample_BCHW.numpy(), "images": to_uint8(sample_BCHW / 2 + 0.5).numpy()}
    return GenericDecoder(vae)


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
    for part, folder in (("text_encoder", "text_encoder"), ("unet", "unet"), ("vae", "vae_decoder")):
        config = json.loads((job.base.folder / part / "config.json").read_text())
        (job.root / folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    ours = job.root / "tokenizer/tokenizer.json"  # save_pretrained writes its own, without padding and length
    content = ours.read_bytes()
    job.base.tokenizer().save_pretrained(ours.parent)
    ours.write_bytes(content)
    config = {"timestep_spacing": "trailing", "set_alpha_to_one": True, "clip_sample": False, "steps_offset": 0}
    DDIMScheduler.from_config(job.base.scheduler().config, **config).save_pretrained(job.root / "scheduler")


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
    (folder / "prompts.json").write_text(json.dumps({"prompts": [job.prompt], "seeds": seeds}) + "\n")

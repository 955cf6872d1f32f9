"""The request of an export and its checks, which need no torch: a mistake is said within a second.

Whatever the options and the files' headers show is checked here. What only the weights show is
checked while they are loaded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hipa_deploy.bundle.adaptor_swap import check_encoder
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.bundle.manifest import MAX_BATCH, OneStep
from hipa_deploy.bundle.signature import read_private_key
from hipa_deploy.bundle.text_settings import TextSettings
from hipa_deploy.disk.files import check_space, refuse_to_overwrite
from hipa_deploy.disk.text_paths import take_text_paths
from hipa_deploy.errors import HipaError, brief
from hipa_deploy.export.export_options import ExportOptions
from hipa_deploy.export.graph.axes import stage_axes
from hipa_deploy.export.model_parts import ModelParts
from hipa_deploy.export.task import (
    TaskSettings,
    asked_size,
    choose_task,
    clip_skip_warning,
    method_size_warning,
    size_warning,
    step_warning,
    text_settings,
)
from hipa_deploy.generate.prompt_files import check_prompt_file, read_numbered_prompts
from hipa_deploy.marks.watermark import check_side
from hipa_deploy.models.adaptor_folder import ENCODER_WEIGHTS, teacher_settings
from hipa_deploy.models.clip_tokenizer import text_sizes
from hipa_deploy.models.early_config import early_config
from hipa_deploy.models.locate import TINY, model_folder, model_name
from hipa_deploy.models.lora.early_lora import (
    check_adaptor,
    check_adaptor_path,
    check_checkpoint_family,
    check_style,
    check_style_files,
)
from hipa_deploy.models.one_step.one_step_method import OWN, load_method
from hipa_deploy.models.style import Style
from hipa_deploy.models.text_pair import forces_zeros
from hipa_deploy.models.weights.controlnet import check_controlnet, control_warning
from hipa_deploy.models.weights.early_check import known_shapes
from hipa_deploy.models.weights.load_part import check_weights
from hipa_deploy.models.weights.part_config import read_config
from hipa_deploy.models.weights.weight_files import find_weights
from hipa_deploy.models.weights.weight_identity import has_identity

SAFETY = "safety_checker"
MAX_REFERENCE_PROMPTS = 8  # each is a run of every stage in PyTorch and in ONNX Runtime
BYTES = {"fp16": 2, "fp32": 4}  # of a weight


@dataclass(frozen=True)
class Request:
    """A request that was checked, and what follows from it.

    Attributes:
        options: the request.
        model: the base model.
        settings: task, timestep and strengths.
        text: how prompts are encoded.
        chunk_tokens: tokens that the text encoder reads at once.
        step: the constants of the step.
        places: the prompts of a closed set, and where each is in its file; empty without one.
        judging: the user's prompts that judge the stages, and where each is in its file; empty
            where none are given.
        warnings: what a user should know, a line each.

    """

    options: ExportOptions
    model: ModelParts
    settings: TaskSettings
    text: TextSettings
    chunk_tokens: int
    step: OneStep
    places: Mapping[str, str]
    judging: Mapping[str, str]
    warnings: tuple[str, ...]


def check_request(options: ExportOptions) -> None:
    """Check a request without torch, before anything is loaded.

    Raises:
        HipaError: the model is not supported, an adaptor or decoder is damaged or does not fit it,
            a number is out of range, options exclude each other, the prompts cannot be read, or
            the output folder is in use or has too little space.

    """
    check_options(options)
    if options.prompts is not None:
        read_numbered_prompts(options.prompts)
    choose_judging(options)
    model = early_model(options.model)
    if options.adaptor is not None:
        check_adaptor(options.adaptor, model.folder)
    check_style(options.style, model.folder)
    settings = choose_task(options, model)
    model.check_unet(settings.task)
    if options.with_teacher:
        _check_teacher(options, settings, model)
    if model.config.has_text_pair:
        _check_text_pair(options)
    if options.decoder is not None:
        model.check_tiny_decoder(options.decoder)
    if options.encoder is not None:
        model.check_tiny_encoder(options.encoder)
    if options.controlnet is not None:
        check_controlnet(options.controlnet, model.config.unet, model.config.vae_factor)
    chunk_tokens = text_sizes(model.config)[0]
    text, _ = text_settings(options, model.config, chunk_tokens)
    # --context-tokens itself is refused before: what is left is how the adaptor was trained.
    if options.layout == "generic" and text.chunks(chunk_tokens) > 1:
        raise HipaError(
            f"--layout generic: the adaptor was trained with contexts of {text.context_tokens} "
            f"tokens, and optimum gives a text encoder {chunk_tokens}. Use --layout onestep."
        )
    step = model.one_step(settings.timestep, *asked_size(options))
    stage_axes(options.dynamic, step, model.config.size_multiple)
    _check_watermark(options, settings, step)
    if options.safety and has_safety_checker(model.folder):
        read_config(model.folder / SAFETY, "config.json")
        find_weights(model.folder / SAFETY)
    check_space(options.out, _least_bytes(options, model))


def has_safety_checker(folder: Path) -> bool:
    """Whether a diffusers folder has a safety checker."""
    return (folder / SAFETY).is_dir()


def _check_watermark(options: ExportOptions, settings: TaskSettings, step: OneStep) -> None:
    """Raise HipaError where no image of the bundle would be large enough for the watermark."""
    if not options.marks.watermark or settings.task == "upscale":
        return
    largest = [step.height, step.width]
    for i, name in enumerate(("height", "width")):
        if name in options.dynamic:
            largest[i] = options.dynamic[name].max
    try:
        height, width = largest
        check_side(height, width)
    except HipaError as error:
        raise HipaError(f"--mark watermark: {error}") from None


def early_model(name: str) -> ModelParts:
    """The model of a request, with what its configuration says without torch.

    Raises:
        HipaError: as ``ModelParts.open``.

    """
    folder = model_folder(name)
    config = early_config(folder)
    check_weights(folder, config.text_parts)
    return ModelParts(folder, model_name(str(name), folder), config)


def resolve_request(options: ExportOptions) -> Request:
    """What follows from a request, with the defaults of diffusers and the noise schedule.

    Raises:
        HipaError: as ``check_request``; or the noise schedule is none that the step can be taken
            in.

    """
    places = read_numbered_prompts(options.prompts) if options.prompts else {}
    judging, judging_warning = choose_judging(options)
    model = ModelParts.open(options.model)
    settings = choose_task(options, model)
    chunk_tokens, _ = text_sizes(model.config)
    text, text_warning = text_settings(options, model.config, chunk_tokens)
    step = model.one_step(settings.timestep, *asked_size(options), settings.method)
    warnings = (
        judging_warning,
        text_warning,
        clip_skip_warning(options, model.config),
        step_warning(options, settings, model),
        size_warning(options, step),
        method_size_warning(options, settings, step),
        control_warning(options.controlnet) if options.controlnet is not None else None,
    )
    return Request(
        options=options,
        model=model,
        settings=settings,
        text=text,
        chunk_tokens=chunk_tokens,
        step=step,
        places=places,
        judging=judging,
        warnings=tuple(warning for warning in warnings if warning),
    )


def choose_judging(options: ExportOptions) -> tuple[dict[str, str], str | None]:
    """The prompts of ``reference_prompts`` that judge the stages, and a warning.

    Of more than 8 prompts, 8 are taken at equal distances from the first to the last.

    Returns:
        The place of each prompt in its file, empty without such a file; and what a user should
        know, None where all prompts are taken.

    Raises:
        HipaError: the file cannot be read; or a prompt is none of the closed set, so that the
            bundle could not make it.

    """
    path = options.reference_prompts
    if path is None:
        return {}, None
    places = read_numbered_prompts(path)
    if options.prompts is not None:
        closed = read_numbered_prompts(options.prompts)
        for prompt, place in places.items():
            if prompt not in closed:
                raise HipaError(
                    f"--reference-prompts {path}, {place}: {brief(prompt)} is none of --prompts "
                    f"{options.prompts}, which are all that the bundle makes. Remove it there."
                )
    if len(places) <= MAX_REFERENCE_PROMPTS:
        return places, None
    prompts = list(places)
    last = len(prompts) - 1
    chosen = {}
    for number in range(MAX_REFERENCE_PROMPTS):
        prompt = prompts[number * last // (MAX_REFERENCE_PROMPTS - 1)]
        chosen[prompt] = places[prompt]
    return chosen, (
        f"the stages are judged by {MAX_REFERENCE_PROMPTS} of the {len(places)} prompts of {path}, "
        "at equal distances."
    )


def check_options(options: ExportOptions, *, decoder: str = "full", encoder: str = "full") -> None:
    """Check what needs no model: numbers, options that exclude each other, paths that are missing.

    Args:
        options: the request.
        decoder: the value of ``--decoder``, where it is not yet a folder in ``options``.
        encoder: the value of ``--encoder``, in the same way.

    Raises:
        HipaError: something is out of range, missing, or in use; or the method is unknown.

    """
    if options.signing_key is not None:
        read_private_key(options.signing_key)
    if options.task in (None, "generate") and options.adaptor is None and encoder != "full":
        raise HipaError(
            "--encoder is for tasks with a source image, this is generate. Leave out --encoder."
        )
    for option, name in (("decoder", decoder), ("encoder", encoder)):
        # An empty path is the current folder.
        if name in ("full", TINY) or (name and Path(name).is_dir()):
            continue
        expected = "Expected full, tiny, or an AutoencoderTiny folder."
        if not name:
            raise HipaError(f"--{option} is empty. {expected}")
        if not Path(name).exists():
            raise HipaError(f"--{option} {name} does not exist. {expected}")
        raise HipaError(
            f"--{option} {name} is a file. {expected} A VAE in a file takes the place of the "
            "model's own: docs/reference/training-inputs.md says how."
        )
    if options.adaptor is not None:
        check_adaptor_path(options.adaptor)
    check_style_files(options.style)
    check_checkpoint_family(options.model, options.style, options.adaptor)
    if options.one_step is not None:
        load_method(options.one_step)
    if options.prompts is not None:
        check_prompt_file(options.prompts)
    if options.reference_prompts is not None:
        check_prompt_file(options.reference_prompts)
    # What is missing is named before an output that is there already.
    refuse_to_overwrite(options.out)
    if not 1 <= options.batch <= MAX_BATCH:
        raise HipaError(
            f"batch {options.batch} is out of range. Expected 1 <= batch <= {MAX_BATCH}."
        )
    _check_scale(options.adaptor_scale)
    if options.with_teacher:
        _check_teacher_options(options)
    if options.layout == "generic":
        for name in ("fuse", "decoder", "prompts", "dynamic", "context_tokens"):
            if getattr(options, name):
                option = name.replace("_", "-")
                raise HipaError(
                    f"--{option} needs --layout onestep: "
                    "the generic layout is what optimum can load."
                )
        if options.style.embeddings:
            raise HipaError(
                "--embedding needs --layout onestep: optimum would not know the new words."
            )


def _check_teacher_options(options: ExportOptions) -> None:
    """Raise HipaError where there is nothing to refine, or nothing to refine it with."""
    if options.adaptor is None:
        raise HipaError(
            "--with-teacher puts the model without the adaptor beside the one with it, and there "
            "is no adaptor. Give --adaptor, or leave out --with-teacher."
        )
    if options.layout == "generic":
        raise HipaError("--with-teacher needs --layout onestep. Leave out --layout generic.")
    if options.fuse:
        raise HipaError(
            "--with-teacher needs a decoder of its own stage, which --fuse joins with the UNet. "
            "Leave out --fuse."
        )


def _check_teacher(options: ExportOptions, settings: TaskSettings, model: ModelParts) -> None:
    """Raise HipaError unless the adaptor's drafts can be refined."""
    if settings.task != "generate":
        raise HipaError(
            f"--with-teacher is for the task generate, this is {settings.task}. "
            "Leave out --with-teacher."
        )
    teacher_settings(options.adaptor)
    if model.config.has_text_pair:
        forces_zeros(model.folder)


def _check_text_pair(options: ExportOptions) -> None:
    """Raise HipaError for what a model with two text encoders, as SDXL, is not exported for."""
    for name in ("height", "width"):
        if name in options.dynamic and options.prompts is not None:
            raise HipaError(
                f"--dynamic {name}: the UNet of {options.model} is told the size of the image, as "
                f"SDXL's is, and --prompts would bake one size. Leave out --prompts, or export a "
                f"bundle for each size, with --height and --width."
            )


def _check_scale(scale: float) -> None:
    if not math.isfinite(scale):
        raise HipaError(f"--adaptor-scale {scale} is not finite. Expected 1.0 for as trained.")


def _least_bytes(options: ExportOptions, model: ModelParts) -> int:
    """Bytes that the bundle will have at least: the weights of its largest stages."""
    parts = ["unet"]
    if options.with_teacher:
        parts.append("unet")
    if not options.prompts:
        parts += model.config.text_parts
    folders = [model.folder / part for part in parts]
    if options.controlnet is not None:
        folders.append(options.controlnet)
    count = 0
    for folder in folders:
        for shape in (known_shapes(folder) or {}).values():
            count += math.prod(shape)
    return count * BYTES[options.dtype]


@dataclass(frozen=True, kw_only=True)
class SwapOptions:
    """Which adaptor to export for which bundle. Paths may be text.

    Attributes:
        model: the base model that the bundle was exported from.
        adaptor: the adaptor folder whose weights to write; None for LoRAs alone.
        bundle: the bundle's folder.
        out: the folder to write.
        adaptor_scale: 1.0 merges the adaptor as it was trained.
        decoder: the AutoencoderTiny folder of a fused bundle; None is the model's VAE.
        style: LoRAs to merge before the adaptor, and the bundle's own embeddings.
        one_step: the step of a LoRA that others made, as for ``ExportOptions``.
        controlnet: the ControlNetModel folder of a bundle for the task control, in whose graph the
            adaptor's weights lie; None for other tasks.
        signing_key: the private key that signs swap.json; None leaves it unsigned.

    """

    model: str
    adaptor: Path | None
    bundle: Path
    out: Path
    adaptor_scale: float = 1.0
    decoder: Path | None = None
    style: Style = field(default_factory=Style)
    one_step: str | None = None
    controlnet: Path | None = None
    signing_key: Path | None = None

    def __post_init__(self) -> None:
        take_text_paths(self)


@dataclass(frozen=True)
class SwapRequest:
    """A request that was checked, and what follows from it.

    Attributes:
        options: the request.
        bundle: the bundle; the hashes of its files are not checked yet.
        model: the base model.
        like_bundle: the options that the bundle was exported with, but for the adaptor.
        settings: task, timestep and strengths.
        chunk_tokens: tokens that the text encoder reads at once.
        warnings: what a user should know, a line each.

    """

    options: SwapOptions
    bundle: Bundle
    model: ModelParts
    like_bundle: ExportOptions
    settings: TaskSettings
    chunk_tokens: int
    warnings: tuple[str, ...]


def check_swap_request(options: SwapOptions) -> None:
    """Check a request without torch, before anything is loaded.

    Raises:
        HipaError: the output folder is in use; the base model is not the bundle's; the adaptor or a
            LoRA is missing, damaged or does not fit the model.

    """
    refuse_to_overwrite(options.out)
    if options.signing_key is not None:
        read_private_key(options.signing_key)
    _check_scale(options.adaptor_scale)
    if options.adaptor is not None:
        check_adaptor_path(options.adaptor)
    bundle = Bundle.open(options.bundle)
    model = early_model(options.model)
    if options.adaptor is not None:
        check_adaptor(options.adaptor, model.folder)
    check_style(options.style, model.folder)
    if options.decoder is not None:
        model.check_tiny_decoder(options.decoder)
    _check_same_base(options, bundle, model)
    _check_same_control(options, bundle)
    like_bundle = _bundle_options(options, bundle)
    settings = choose_task(like_bundle, model)
    _check_timestep(options, bundle, settings)
    chunk_tokens, _ = text_sizes(model.config)
    text_settings(like_bundle, model.config, chunk_tokens, "Export a bundle of its own.")


def resolve_swap_request(options: SwapOptions) -> SwapRequest:
    """What follows from a request, with the defaults of diffusers and the noise schedule.

    Raises:
        HipaError: as ``check_swap_request``; or one-step constants that are not the bundle's.

    """
    bundle = Bundle.open(options.bundle)
    model = ModelParts.open(options.model)
    _check_same_base(options, bundle, model)
    like_bundle = _bundle_options(options, bundle)
    settings = choose_task(like_bundle, model)
    _check_step(options, bundle, model, settings)
    chunk_tokens, _ = text_sizes(model.config)
    remedy = "Export a bundle of its own."
    _, text_warning = text_settings(like_bundle, model.config, chunk_tokens, remedy)
    warnings = (text_warning, step_warning(like_bundle, settings, model))
    return SwapRequest(
        options=options,
        bundle=bundle,
        model=model,
        like_bundle=like_bundle,
        settings=settings,
        chunk_tokens=chunk_tokens,
        warnings=tuple(warning for warning in warnings if warning),
    )


def _check_same_base(options: SwapOptions, bundle: Bundle, model: ModelParts) -> None:
    """Raise HipaError for another base model, and where the VAE's encoder is adapted."""
    if options.adaptor is not None and (options.adaptor / ENCODER_WEIGHTS).exists():
        raise HipaError(
            f"adaptor {options.adaptor} is on the VAE's encoder too, which no swap changes. "
            "Export a bundle of its own."
        )
    check_encoder(bundle)
    if not has_identity(model.folder / "unet", bundle.manifest.base_model.sha256):
        raise HipaError(
            f"{bundle.root} was exported from another base model than {options.model}. "
            f"Give --model as for the bundle's own export: {bundle.manifest.base_model.name}."
        )


def _check_same_control(options: SwapOptions, bundle: Bundle) -> None:
    """Raise HipaError unless the ControlNet is the bundle's: one stage holds it and the UNet."""
    expected = bundle.manifest.control
    given = options.controlnet
    if expected is None:
        if given is not None:
            raise HipaError(f"{bundle.root} has no ControlNet. Leave out --controlnet.")
        return
    if given is None or not has_identity(given, expected.sha256):
        raise HipaError(
            f"{bundle.root} was exported with the ControlNet {expected.name}, which lies in one "
            "graph with the UNet. Give it with --controlnet."
        )


def _bundle_options(options: SwapOptions, bundle: Bundle) -> ExportOptions:
    """The options that ``bundle`` was exported with, but for the adaptor."""
    manifest = bundle.manifest
    dynamic = {name: axis for name, axis in bundle.axes.items() if name in ("height", "width")}
    return ExportOptions(
        model=options.model,
        out=options.out,
        adaptor=options.adaptor,
        adaptor_scale=options.adaptor_scale,
        dtype=manifest.precision,
        layout=manifest.layout,
        batch=manifest.batch,
        dynamic=dynamic,
        fuse="generator" in bundle.stages,
        decoder=options.decoder,
        task=manifest.task,
        controlnet=options.controlnet,
        strengths=tuple(entry.strength for entry in manifest.strengths),
        style=options.style,
        context_tokens=manifest.text.context_tokens,
        clip_skip=manifest.text.clip_skip,
        one_step=options.one_step,
        with_teacher=manifest.refine is not None,
    )


def _check_timestep(options: SwapOptions, bundle: Bundle, settings: TaskSettings) -> None:
    expected = bundle.manifest.one_step.timestep
    if settings.timestep != expected:
        raise HipaError(
            f"{options.adaptor or 'the model alone'} is for timestep {settings.timestep}, "
            f"{bundle.root} is for {expected}. Export a bundle of its own."
        )


def _check_step(
    options: SwapOptions, bundle: Bundle, model: ModelParts, settings: TaskSettings
) -> None:
    """Raise HipaError unless the adaptor's step is the bundle's: a graph has its constants."""
    expected = bundle.manifest.one_step
    _check_timestep(options, bundle, settings)
    step = model.one_step(settings.timestep, expected.height, expected.width, settings.method)
    if _numbers(step) != _numbers(expected):
        own = settings.method.name if settings.method else OWN
        other = expected.method.name if expected.method else OWN
        raise HipaError(
            f"{options.adaptor or 'the model'} is given the one-step method {own}, "
            f"{bundle.root} is for {other}. Use --one-step {other} if that is the adaptor's "
            "method, or export a bundle of its own."
        )


def _numbers(step: OneStep) -> tuple[object, ...]:
    """What a graph computes a step with; two names of one method are one method."""
    factors: tuple[float, ...] = ()
    if step.method:
        method = step.method
        factors = (method.noise_scale, method.sample_factor, method.output_factor)
    return step.prediction_type, step.timestep, factors

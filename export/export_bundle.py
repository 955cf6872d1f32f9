"""Base model (+ adaptor) -> bundle. ``export_bundle`` is the whole path."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from hipa_deploy import __version__
from hipa_deploy.bundle.folder import MANIFEST, SCHEMA, Bundle
from hipa_deploy.bundle.manifest import Manifest, OneStep, SafetyStage, Stage
from hipa_deploy.bundle.signature import sign
from hipa_deploy.disk.files import new_folder
from hipa_deploy.embedded import EXAMPLE_PROMPT, MODEL
from hipa_deploy.export.builders import bundle_sources, is_sized, safety_source
from hipa_deploy.export.bundle_files import (
    file_hashes,
    tokenize,
    write_baked,
    write_closed_set,
    write_diffusers_files,
    write_references,
    write_tokenizer,
)
from hipa_deploy.export.chosen_parts import ChosenParts
from hipa_deploy.export.export_options import ExportOptions
from hipa_deploy.export.export_request import (
    check_request,
    has_safety_checker,
    resolve_request,
)
from hipa_deploy.export.generic.generic_pair import pair_sizes
from hipa_deploy.export.graph.axes import stage_axes
from hipa_deploy.export.graph.conditioning import conditioning_channels
from hipa_deploy.export.graph.modules import stage_specs
from hipa_deploy.export.graph.safety_module import safety_spec
from hipa_deploy.export.model_parts import ModelParts
from hipa_deploy.export.references import (
    FIRST_SEED,
    References,
    add_safety,
    condition_closed_set,
    encode_closed_set,
    latent_sample,
    make_every_reference,
    text_references,
)
from hipa_deploy.export.task import TaskSettings, print_warning
from hipa_deploy.export.teacher.teacher_stage import write_teacher
from hipa_deploy.export.writer import StageWriter
from hipa_deploy.extras import require
from hipa_deploy.generate.prompts import BAKED_CONDITIONING, BAKED_POOLED, TOKENIZER_2
from hipa_deploy.generate.stages import join_context
from hipa_deploy.marks.safety import SAFETY_STAGE
from hipa_deploy.models.weights.controlnet import check_whole
from hipa_deploy.models.weights.part_config import build, read_config
from hipa_deploy.tasks import takes_source

NEUTRAL_PROMPT = "a photo of a red apple"
PROGRESS_LABELS = {
    "text_encoder": "text",
    "text_encoder_2": "text",
    "vae_encoder": "encoder",
    "unet": "UNet",
    "generator": "UNet",
    "vae_decoder": "decoder",
    SAFETY_STAGE: "safety checker",
}


def export_bundle(options: ExportOptions, console: Console | None = None) -> Bundle:
    """Export ``options.model`` (+ adaptor) to a bundle at ``options.out``, whole or not at all.

    Args:
        options: what to export.
        console: where progress is shown; None is a console of its own.

    Raises:
        HipaError: the model is not supported, an adaptor or decoder does not fit it, a size is out
            of range, options exclude each other, the output folder is in use, or a stage does not
            agree with PyTorch.

    Example:
        >>> bundle = export_bundle(ExportOptions(model="emoji", out=Path("bundle"), dtype="fp32"))
        >>> list(bundle.stages)
        ['text_encoder', 'unet', 'vae_decoder']

    """
    require("export")
    check_request(options)
    return export_checked(options, console)


def export_checked(options: ExportOptions, console: Console | None = None) -> Bundle:
    """Export what ``check_request`` has checked; see ``export_bundle``.

    Raises:
        HipaError: as ``export_bundle``.

    """
    request = resolve_request(options)
    model = request.model
    settings = request.settings
    places = request.places
    text = request.text
    step = request.step
    model.check_parts()
    if options.controlnet is not None:
        check_whole(options.controlnet)
    parts = ChosenParts.choose(model, options, settings.task, request.chunk_tokens, text.clip_skip)
    for warning in request.warnings:
        print_warning(console, warning)
    axes = stage_axes(options.dynamic, step, model.config.size_multiple)
    batch = options.size("batch") or 1

    with new_folder(options.out, alone=True) as root, _progress(console) as show:
        # The tokenizer comes first: the length of its tokens is a size of the stages.
        show("text")
        judging = list(request.judging) or list(places)[:1] or [example_prompt(model)]
        prompts = list(places) or judging
        tokenizer = write_tokenizer(root, parts.tokenizer(), prompts[0], text.context_tokens)
        read = partial(
            tokenize,
            prompts=prompts,
            path=options.prompts or options.reference_prompts,
            places=places or request.judging,
            weights=text.prompt_weights,
        )
        tokens_NL, weights_NL = read(tokenizer)
        tokenizers = [tokenizer]
        tokens_2_NL = None
        weights_2_NL = None
        if parts.has_text_pair:
            second = write_tokenizer(
                root, parts.tokenizer_2(), prompts[0], text.context_tokens, TOKENIZER_2
            )
            tokenizers.append(second)
            tokens_2_NL, weights_2_NL = read(second)
        specs = stage_specs(
            layout=options.layout,
            precision=options.dtype,
            batch=batch,
            step=step,
            length=tokens_NL.shape[1],
            width=model.config.text_width,
            axes=axes,
            names=settings.inputs_with(conditioning=parts.has_text_pair),
            conditioning=conditioning_shape(parts, options, settings, step),
            pooled=model.config.pooled_width if options.with_teacher else None,
            pair=pair_sizes(model.config, text.clip_skip),
            sized=is_sized(options),
        )

        # All of PyTorch's tensors before anything is exported: each part of the model is loaded
        # for its references, freed, and loaded again for its stage.
        show("references")
        known: dict[str, np.ndarray] = {}  # of a closed set: what PyTorch gives, of N prompts
        stored: dict[str, np.ndarray] = {}  # and as the bundle stores it
        if places:
            contexts_NLD, pooled_NP = encode_closed_set(
                parts, tokens_NL, weights_NL, tokens_2_NL, weights_2_NL
            )
            known["context"] = contexts_NLD
            stored["context"] = write_closed_set(root, prompts, contexts_NLD, options.dtype)
            if pooled_NP is not None:
                conditioning_NSK = condition_closed_set(parts, pooled_NP, settings, step)
                known["pooled"] = pooled_NP
                stored["conditioning"] = write_baked(
                    root, BAKED_CONDITIONING, conditioning_NSK, options.dtype
                )
                if options.with_teacher:
                    stored["pooled"] = write_baked(root, BAKED_POOLED, pooled_NP, options.dtype)
        judges: list[References] = []
        chains: list[dict[str, np.ndarray]] = []
        for number, prompt in enumerate(judging):
            at = prompts.index(prompt)
            tokens_1L = tokens_NL[at : at + 1]
            seed = FIRST_SEED + number * batch  # other noise for each
            tokens_2_1L = None if tokens_2_NL is None else tokens_2_NL[at : at + 1]
            judge = text_references(
                prompt,
                tokens_1L,
                batch,
                step,
                options.layout,
                seed,
                tokens_2_1L,
                sized=is_sized(options) and parts.has_text_pair,
            )
            chain = judge.inputs()
            for name, value in known.items():
                judge = judge.plus({name: value[at : at + 1].repeat(batch, 0)})
            for name, value in stored.items():
                chain[name] = value[at : at + 1].repeat(batch, 0)
            judges.append(judge)
            chains.append(chain)
        judges = make_every_reference(
            judges, parts, settings, step, options.layout, watch=options.dtype == "fp16"
        )
        references = judges[0]

        checks_images = options.safety and has_safety_checker(model.folder)
        if checks_images:
            references, safety_settings = add_safety(references, model.folder)
            specs[SAFETY_STAGE] = safety_spec(safety_settings)

        doubts = [doubt for judge in (references, *judges[1:]) for doubt in judge.doubts]
        for doubt in dict.fromkeys(doubts):
            print_warning(console, doubt)

        # The chain: a stage is fed with what the ONNX stages before it gave, not with PyTorch's
        # tensors, so that the last stage's error is that of the whole bundle.
        for chain, judge in zip(chains, judges, strict=True):
            chain |= judge.inputs()
        writer = StageWriter(
            root,
            options.dtype,
            specs,
            references,
            len(settings.strengths),
            others=tuple(judges[1:]),
        )
        stages: list[Stage] = []
        for source in bundle_sources(options, parts, settings, step):
            show(PROGRESS_LABELS[source.name])
            if "time_ids" in source.inputs:
                # The generic UNet of SDXL takes both encoders' contexts, side by side.
                for chain in chains:
                    chain["context"] = join_context(chain)
            if "latent_sample" in source.inputs:
                # The generic UNet gives its raw output, of which the runtime makes x0.
                for chain in chains:
                    chain["latent_sample"] = latent_sample(chain, step)
            stage, outputs = writer.write_judged(source, chains)
            for chain, made in zip(chains, outputs, strict=True):
                chain |= made
            stages.append(stage)
        safety = None
        if checks_images:
            show(PROGRESS_LABELS[SAFETY_STAGE])
            pixels = {"pixels": references.tensors["pixels"]}
            written = writer.write(safety_source(model.folder), pixels)
            safety = SafetyStage(stage=written.stage, settings=safety_settings)
        refinement = None
        if options.with_teacher:
            show("base UNet")
            base_specs = stage_specs(
                layout="generic",
                precision=options.dtype,
                batch=batch,
                step=step,
                length=tokens_NL.shape[1],
                width=model.config.text_width,
                axes=axes,
            )
            refinement = write_teacher(
                writer, parts, base_specs["unet"], step, tokenizers, chains[0]
            )
        if options.layout == "generic":
            write_diffusers_files(root, model, settings, text.clip_skip)

        # The manifest is last: it lists the hash of every other file.
        show("manifest")
        write_references(root, references, judges[1:])
        manifest = Manifest(
            schema_version=SCHEMA,
            producer=f"hipa-deploy {__version__}",
            layout=options.layout,
            precision=options.dtype,
            batch=batch,
            base_model=model.info,
            adaptor=references.adaptor,
            loras=parts.style.info.loras,
            embeddings=parts.style.info.embeddings,
            decoder=parts.decoder_info(),
            encoder=parts.encoder_info() if takes_source(settings.task) else None,
            control=parts.control_info(),
            task=settings.task,
            strengths=settings.strengths,
            upscale=settings.upscale,
            one_step=step,
            text=text,
            text_widths=model.config.text_widths if parts.has_text_pair else (),
            stages=tuple(stages),
            safety=safety,
            marks=options.marks,
            end_to_end=stages[-1].parity,
            refine=refinement,
            files=file_hashes(root),
        )
        (root / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        if options.signing_key is not None:
            sign(root / MANIFEST, options.signing_key)
    return Bundle.open(options.out)


def conditioning_shape(
    parts: ChosenParts, options: ExportOptions, settings: TaskSettings, step: OneStep
) -> tuple[int, int] | None:
    """S and K of SDXL's conditioning [B, S, K]; None for another model, or the layout generic."""
    if options.layout == "generic" or not parts.has_text_pair:
        return None
    config = parts.model.config
    path = config.folder / "unet/config.json"
    unet: Any = build(UNet2DConditionModel, config.unet, path)
    channels = conditioning_channels(unet)
    if options.controlnet is not None:
        of_control = read_config(options.controlnet, "config.json")
        controlnet: Any = build(ControlNetModel, of_control, options.controlnet / "config.json")
        channels += conditioning_channels(controlnet)
    return len(settings.starts(step)), channels


def example_prompt(model: ModelParts) -> str:
    """The prompt of a bundle's reference: the embedded model's own, or a neutral one."""
    is_embedded = model.folder.resolve() == MODEL.resolve()
    return EXAMPLE_PROMPT if is_embedded else NEUTRAL_PROMPT


@contextmanager
def _progress(console: Console | None) -> Iterator[Callable[[str], None]]:
    """A line that says what is being exported, and for how long."""
    with Progress(
        TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console
    ) as progress:
        task = progress.add_task("", total=None)
        yield lambda what: progress.update(task, description=f"export: {what}")

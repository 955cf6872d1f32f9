"""The stages of a bundle: what each is built from, and what it takes and gives."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import cast

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny

from hipa_deploy.bundle.adaptor_swap import TEXT_STAGE_2
from hipa_deploy.bundle.manifest import OneStep
from hipa_deploy.export.chosen_parts import ChosenParts
from hipa_deploy.export.export_options import ExportOptions
from hipa_deploy.export.generic.generic_modules import (
    GenericDecoder,
    GenericPairEncoder,
    GenericPairUNet,
    GenericUNet,
)
from hipa_deploy.export.generic.generic_pair import TEXT_PARTS, encoder_keys, hidden_states
from hipa_deploy.export.graph.conditioning import cut_conditioning, cut_control
from hipa_deploy.export.graph.fold import fold_timestep
from hipa_deploy.export.graph.modules import (
    Generator,
    OneStepDecoder,
    OneStepEncoder,
    OneStepUNet,
    SizedTextPairStage,
    TextEncoderStage,
    TextPairStage,
    TinyDecoder,
    TinyEncoder,
)
from hipa_deploy.export.graph.safety_module import SafetyNetwork, load_safety_checker
from hipa_deploy.export.model_parts import free_memory
from hipa_deploy.export.task import TaskSettings
from hipa_deploy.export.writer import StageSource
from hipa_deploy.marks.safety import SAFETY_STAGE
from hipa_deploy.models.text_context import text_module
from hipa_deploy.tasks import size_numbers, takes_source


def bundle_sources(
    options: ExportOptions, parts: ChosenParts, settings: TaskSettings, step: OneStep
) -> list[StageSource]:
    """The stages of the bundle that ``options`` ask for, in the order in which it runs them."""
    sources = []
    if options.prompts is None:
        sources += text_sources(options, parts, settings, step)
    if takes_source(settings.task):
        sources.append(
            StageSource("vae_encoder", partial(encoder_module, parts), ("image",), "source")
        )
    sources.append(unet_source(options, parts, settings, step))

    # A fused generator decodes by itself.
    if not options.fuse:
        sources.append(decoder_source(options, parts))
    return sources


def text_sources(
    options: ExportOptions, parts: ChosenParts, settings: TaskSettings, step: OneStep
) -> list[StageSource]:
    """The stages of the text: one, and of SDXL in layout generic two."""
    if options.layout == "generic" and parts.has_text_pair:
        return [generic_encoder_source(options, parts, name) for name in TEXT_PARTS]
    return [text_encoder_source(options, parts, settings, step)]


def generic_encoder_source(options: ExportOptions, parts: ChosenParts, name: str) -> StageSource:
    """One of SDXL's text encoders, by itself."""
    dtype = torch.float16 if options.dtype == "fp16" else torch.float32
    states = hidden_states(parts.model.config, parts.clip_skip)[TEXT_PARTS.index(name)]
    keys = encoder_keys(name, states)
    build = partial(generic_encoder_module, parts, name, states, dtype)
    tokens = "tokens_2" if name == TEXT_STAGE_2 else "tokens"
    return StageSource(name, build, (tokens,), keys[0], keys[1:])


def text_encoder_source(
    options: ExportOptions, parts: ChosenParts, settings: TaskSettings, step: OneStep
) -> StageSource:
    """The text encoder; of SDXL in layout onestep both, with the conditioning of the UNet."""
    # Whatever it computes in, its context has the type that the UNet takes.
    dtype = torch.float16 if options.dtype == "fp16" else torch.float32
    if parts.has_text_pair:
        sized = is_sized(options)
        build_pair = partial(
            text_pair_module,
            parts,
            settings,
            step,
            dtype,
            sized=sized,
            gives_pooled=options.with_teacher,
        )
        inputs = ("tokens", "tokens_2", "sizes") if sized else ("tokens", "tokens_2")
        also = ("conditioning", "pooled") if options.with_teacher else ("conditioning",)
        return StageSource("text_encoder", build_pair, inputs, "context", also)
    build = partial(text_encoder_module, parts, dtype)
    return StageSource("text_encoder", build, ("tokens",), "context")


def unet_source(
    options: ExportOptions, parts: ChosenParts, settings: TaskSettings, step: OneStep
) -> StageSource:
    """The stage that holds the UNet: of layout onestep 'unet' or, with the decoder, 'generator'."""
    if options.layout == "generic":
        generic_inputs: tuple[str, ...] = ("noise", "timestep", "context")
        if parts.has_text_pair:
            generic_inputs = (*generic_inputs, "pooled", "time_ids")
        build_generic = partial(generic_unet_module, parts)
        return StageSource("unet", build_generic, generic_inputs, "output")
    inputs = settings.inputs_with(conditioning=parts.has_text_pair)
    if options.fuse:
        build_generator = partial(generator_module, parts, settings, step)
        return StageSource("generator", build_generator, inputs, "images")
    build_unet = partial(unet_module, parts, settings, step)
    return StageSource("unet", build_unet, inputs, "latents")


def decoder_source(options: ExportOptions, parts: ChosenParts) -> StageSource:
    """The decoder."""
    if options.layout == "generic":
        build_generic = partial(generic_decoder_module, parts)
        return StageSource("vae_decoder", build_generic, ("latent_sample",), "sample")
    build = partial(decoder_module, parts)
    return StageSource("vae_decoder", build, ("latents",), "images")


def safety_source(model: Path) -> StageSource:
    """The safety checker of a model's folder."""
    return StageSource(SAFETY_STAGE, partial(safety_module, model), ("pixels",), "cosines")


def safety_module(model: Path) -> SafetyNetwork:
    """The safety checker's network, with its concepts."""
    return SafetyNetwork(load_safety_checker(model / SAFETY_STAGE))


def text_encoder_module(parts: ChosenParts, dtype: torch.dtype) -> TextEncoderStage:
    """The text encoder, whose context has ``dtype``."""
    encoder = parts.text_encoder()
    # The references take an earlier hidden state of the whole encoder, as diffusers does. Without
    # the layers after it the graph is smaller, and its agreement with them is a proof.
    if parts.clip_skip:
        inner = text_module(encoder).encoder
        inner.layers = inner.layers[: -parts.clip_skip]
    return TextEncoderStage(encoder, dtype, parts.chunk_tokens)


def is_sized(options: ExportOptions) -> bool:
    """Whether images of several sizes are made, of which SDXL's text stage must be told."""
    return bool({"height", "width"} & set(options.dynamic))


def text_pair_module(
    parts: ChosenParts,
    settings: TaskSettings,
    step: OneStep,
    dtype: torch.dtype,
    *,
    sized: bool,
    gives_pooled: bool = False,
) -> TextPairStage | SizedTextPairStage:
    """Both text encoders and the conditioning, whose outputs have ``dtype``."""
    # The UNet first: all of it but the conditioning is freed before the encoders are loaded.
    sizes = None if sized else size_numbers(step.height, step.width)
    conditioning = parts.conditioning(settings.timesteps(step), sizes)
    free_memory()
    encoder, encoder_2 = parts.text_pair()
    kind = SizedTextPairStage if sized else TextPairStage
    return kind(
        encoder,
        encoder_2,
        conditioning,
        dtype,
        parts.chunk_tokens,
        parts.clip_skip,
        gives_pooled=gives_pooled,
    )


def encoder_module(parts: ChosenParts) -> OneStepEncoder | TinyEncoder:
    """The encoder, with its scaling folded in."""
    vae = parts.encoder()
    if isinstance(vae, AutoencoderTiny):
        return TinyEncoder(vae)
    # mypy does not rule out the tiny one here, as diffusers' base classes are untyped.
    return OneStepEncoder(cast("AutoencoderKL", vae))


def unet_module(parts: ChosenParts, settings: TaskSettings, step: OneStep) -> OneStepUNet:
    """The UNet with the adaptor merged and its timesteps folded; and a ControlNet beside it."""
    unet, _ = parts.unet()
    control = parts.control_network()
    if parts.has_text_pair:
        channels = cut_conditioning(unet)
        if control is not None:
            cut_control(control, channels)
    else:
        timesteps = settings.timesteps(step)
        fold_timestep(unet, *timesteps)
        if control is not None:
            fold_timestep(control, *timesteps)
    return OneStepUNet(
        unet,
        step,
        settings.task,
        settings.strengths,
        conditioned=parts.has_text_pair,
        controlnet=control,
    )


def decoder_module(parts: ChosenParts) -> OneStepDecoder | TinyDecoder:
    """The decoder, with its scaling and its upsamplings folded."""
    vae = parts.decoder()
    if isinstance(vae, AutoencoderTiny):
        return TinyDecoder(vae)
    # mypy does not rule out the tiny one here, as diffusers' base classes are untyped.
    return OneStepDecoder(cast("AutoencoderKL", vae))


def generator_module(parts: ChosenParts, settings: TaskSettings, step: OneStep) -> Generator:
    """UNet and decoder in one module."""
    return Generator(unet_module(parts, settings, step), decoder_module(parts))


def generic_encoder_module(
    parts: ChosenParts, name: str, states: int, dtype: torch.dtype
) -> GenericPairEncoder:
    """One of SDXL's text encoders, whose outputs have ``dtype``."""
    encoder = parts.text_encoder_2() if name == TEXT_STAGE_2 else parts.text_encoder()
    return GenericPairEncoder(name, encoder, states, dtype)


def generic_unet_module(parts: ChosenParts) -> GenericUNet | GenericPairUNet:
    """The UNet with the adaptor merged, and nothing folded."""
    unet, _ = parts.unet()
    if parts.has_text_pair:
        return GenericPairUNet(unet)
    return GenericUNet(unet)


def generic_decoder_module(parts: ChosenParts) -> GenericDecoder:
    """The model's own decoder, and nothing folded."""
    return GenericDecoder(parts.model.vae())

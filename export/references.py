"""The reference tensors of a bundle: what PyTorch gives in float32, before anything is exported.

Every tensor comes from the model in its general form: nothing folded, the timestep an input. So an
error in a fold shows in the comparison of a stage with its reference. Only one part of the model is
in memory at a time.

    tokens       int64   [B, L]
    tokens_2     int64   [B, L]         as SDXL's second tokenizer reads the prompt
    sizes        int64   [B, 6]         the size, of SDXL with images of several sizes
    context      float32 [B, L, D]      text encoder; SDXL's two side by side
    pooled       float32 [B, P]         SDXL's second text encoder
    conditioning float32 [B, S, K]      what the blocks of SDXL's UNet project, at each start
    noise        float32 [B, C, h, w]   standard normal; layout generic: what the UNet sees
    image        uint8   [B, H, W, 3]   tasks with a source image
    mask         float32 [B, 1, h, w]   task inpaint
    source       float32 [B, C, h, w]   encoder of ``image``, scaled
    step         int64   [1]            index of the strength, of an edit with several
    control      uint8   [B, H, W, 3]   task control
    control_scale float32 [B]           task control
    output       float32 [B, C, h, w]   UNet
    latents      float32 [B, C, h, w]   what the decoder takes, scaled
    images       uint8   [B, H, W, 3]   decoder
    timestep     int64   [1]            layout generic
    latent_sample float32 [B, C, h, w]  layout generic: x0 without the scaling
    pixels       float32 [1, 3, S, S]   the first image, as the safety checker takes them
    cosines      float32 [1, N]         safety checker
    sample       float32 [B, 3, H, W]   layout generic: decoder, in [-1, 1]
    time_ids     float32 [B, 6]         layout generic: the size, as SDXL's UNet is told it
    context_1    float32 [B, L, D1]     layout generic: SDXL's first text encoder; the second has
                                        context_2. Further outputs of both are not stored.

At further strengths of an edit the keys are 'output_1', 'latents_1', 'images_1' and so on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn

from hipa_deploy.bundle.manifest import AdaptorInfo, Layout, OneStep
from hipa_deploy.export.chosen_parts import ChosenParts, HeldParts
from hipa_deploy.export.generic.generic_pair import TEXT_PARTS, encoder_tensors, hidden_states
from hipa_deploy.export.graph.conditioning import Recorder
from hipa_deploy.export.graph.half_precision import Ranges
from hipa_deploy.export.graph.modules import (
    control_residuals,
    from_uint8,
    seen_by_unet,
    to_uint8,
)
from hipa_deploy.export.graph.reference_check import check_reference
from hipa_deploy.export.graph.safety_module import (
    load_safety_checker,
    reference_cosines,
    safety_settings,
)
from hipa_deploy.export.task import TaskSettings
from hipa_deploy.generate.noise import bundle_noise
from hipa_deploy.generate.prompt_weights import weigh_side_by_side
from hipa_deploy.generate.x0 import predict_x0
from hipa_deploy.images.example_source import example_inputs
from hipa_deploy.marks.records import SafetySettings
from hipa_deploy.marks.safety import SAFETY_STAGE, prepare_pixels
from hipa_deploy.tasks import (
    STEP_INPUTS,
    finish_latents,
    is_inpainting_unet,
    size_numbers,
    start_latents,
    takes_source,
)

FIRST_SEED = 0
ENCODED_AT_ONCE = 64  # prompts of a closed set; thousands at once would not fit into memory
# Tensors that come from outside of the model. The stages of a bundle compute all others.
INPUTS = (
    "tokens", "tokens_2", "sizes", "noise", "image", "mask", "step", "timestep", "time_ids",
    "control", "control_scale",
)  # fmt: skip


@dataclass(frozen=True)
class References:
    """The tensors that the exported stages are judged by, and what they were made from.

    Attributes:
        prompt: the prompt of every image.
        seeds: the seed of each image's noise.
        tensors: by the names in this module's legend, in the order they were made.
        largest: by module of the diffusers folder ('unet.conv_in'), the largest magnitude that went
            into or came out of it. Empty where nobody looks for layers that float16 cannot hold.
        adaptor: the adaptor that was merged into the UNet.
        doubts: what a user should know of the tensors, a sentence each.

    """

    prompt: str
    seeds: tuple[int, ...]
    tensors: Mapping[str, np.ndarray]
    largest: Mapping[str, float] = field(default_factory=dict)
    adaptor: AdaptorInfo | None = None
    doubts: tuple[str, ...] = ()

    @property
    def batch(self) -> int:
        """Images of the reference."""
        return len(self.seeds)

    def inputs(self) -> dict[str, np.ndarray]:
        """The tensors that come from outside of the model."""
        return {name: self.tensors[name] for name in INPUTS if name in self.tensors}

    def plus(
        self,
        tensors: Mapping[str, np.ndarray],
        largest: Mapping[str, float] | None = None,
    ) -> References:
        """These references and more ``tensors``.

        Raises:
            HipaError: a tensor that no working model gives.

        """
        return replace(
            self,
            tensors={**self.tensors, **tensors},
            largest={**self.largest, **(largest or {})},
            doubts=(*self.doubts, *check_reference(tensors)),
        )


def strength_key(name: str, index: int) -> str:
    """The key of a tensor at strength number ``index`` of an edit; 0 is the largest strength.

    Example:
        >>> strength_key("latents", 0), strength_key("latents", 1)
        ('latents', 'latents_1')

    """
    return f"{name}_{index}" if index else name


def text_references(
    prompt: str,
    tokens_1L: np.ndarray,
    batch: int,
    step: OneStep,
    layout: Layout = "onestep",
    first_seed: int = FIRST_SEED,
    tokens_2_1L: np.ndarray | None = None,
    *,
    sized: bool = False,
) -> References:
    """The tensors that need no part of the model: the tokens of ``prompt``, and noise per image.

    Of SDXL with images of several sizes (``sized``) also the numbers of the size.
    """
    seeds = tuple(range(first_seed, first_seed + batch))
    tensors = {
        "tokens": tokens_1L.repeat(batch, 0),
        "noise": bundle_noise(list(seeds), step.latent_shape, step, layout),
    }
    if tokens_2_1L is not None:
        tensors["tokens_2"] = tokens_2_1L.repeat(batch, 0)
    if sized:
        tensors["sizes"] = _time_ids(step, batch).astype(np.int64)
    return References(prompt, seeds, tensors)


@torch.no_grad()
def add_context(
    references: References, parts: ChosenParts, layout: Layout = "onestep", *, watch: bool
) -> References:
    """Add 'context', the text encoder's last hidden states for 'tokens'; of SDXL also 'pooled'.

    In the layout generic also all that SDXL's text encoders give there.
    """
    if parts.has_text_pair:
        return _add_pair(references, parts, layout, watch=watch)
    encoder = parts.text_encoder()
    with watched(watch, "text_encoder", encoder) as largest:
        tokens_BL = torch.from_numpy(references.tensors["tokens"])
        context_BLD = parts.context(encoder, tokens_BL).numpy()
    return references.plus({"context": context_BLD}, largest)


def _add_pair(
    references: References, parts: ChosenParts, layout: Layout, *, watch: bool
) -> References:
    """Add 'context' and 'pooled' of two text encoders."""
    pair = parts.text_pair()
    with (
        watched(watch, "text_encoder", pair[0]) as first,
        watched(watch, "text_encoder_2", pair[1]) as second,
    ):
        context_BLD, pooled_BP = parts.pair_context(
            pair,
            torch.from_numpy(references.tensors["tokens"]),
            torch.from_numpy(references.tensors["tokens_2"]),
        )
    tensors = {"context": context_BLD.numpy(), "pooled": pooled_BP.numpy()}
    if layout == "generic":
        states = hidden_states(parts.model.config, parts.clip_skip)
        for part, encoder, key, count in zip(
            TEXT_PARTS, pair, ("tokens", "tokens_2"), states, strict=True
        ):
            tokens_BL = torch.from_numpy(references.tensors[key])
            tensors |= encoder_tensors(part, encoder, tokens_BL, count)
    return references.plus(tensors, {**first, **second})


@torch.no_grad()
def encode_closed_set(
    parts: ChosenParts,
    tokens_NL: np.ndarray,
    weights_NL: np.ndarray,
    tokens_2_NL: np.ndarray | None = None,
    weights_2_NL: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Contexts float32 [N, L, D] of all prompts of a closed set, weighed; of SDXL also 'pooled'.

    Args:
        parts: the model's.
        tokens_NL: int64, of N prompts.
        weights_NL: float32, of their tokens.
        tokens_2_NL: of the second tokenizer; None where the model has one text encoder.
        weights_2_NL: of these.

    Returns:
        The contexts, and the pooled vectors float32 [N, P], on which weights have no effect.

    """
    contexts = []
    pooled = []
    weights = [weights_NL]
    if tokens_2_NL is None:
        encoder = parts.text_encoder()
        for tokens_BL in torch.from_numpy(tokens_NL).split(ENCODED_AT_ONCE):
            contexts.append(parts.context(encoder, tokens_BL))
    else:
        assert weights_2_NL is not None
        weights.append(weights_2_NL)
        pair = parts.text_pair()
        batches = zip(
            torch.from_numpy(tokens_NL).split(ENCODED_AT_ONCE),
            torch.from_numpy(tokens_2_NL).split(ENCODED_AT_ONCE),
            strict=True,
        )
        for tokens_BL, tokens_2_BL in batches:
            context_BLD, pooled_BP = parts.pair_context(pair, tokens_BL, tokens_2_BL)
            contexts.append(context_BLD)
            pooled.append(pooled_BP)
    weighed_NLD = weigh_side_by_side(
        torch.cat(contexts).numpy(), weights, parts.model.config.text_widths, parts.chunk_tokens
    )
    check_reference({"context": weighed_NLD})
    return weighed_NLD, torch.cat(pooled).numpy() if pooled else None


@torch.no_grad()
def condition_closed_set(
    parts: ChosenParts, pooled_NP: np.ndarray, settings: TaskSettings, step: OneStep
) -> np.ndarray:
    """The conditioning float32 [N, S, K] of all prompts of a closed set."""
    sizes = size_numbers(step.height, step.width)
    conditioning = parts.conditioning(settings.timesteps(step), sizes)
    made: np.ndarray = conditioning(torch.from_numpy(pooled_NP)).numpy()
    check_reference({"conditioning": made})
    return made


@torch.no_grad()
def add_source(
    references: References,
    parts: ChosenParts,
    settings: TaskSettings,
    step: OneStep,
    *,
    watch: bool,
) -> References:
    """Add 'image', 'mask' and 'step' as the task takes them, and 'source', the encoded image."""
    tensors: dict[str, np.ndarray] = {}
    factor = step.height // step.latent_shape[1]
    conditions = example_inputs(
        settings.task, step.height, step.width, factor, settings.upscale or 1
    )
    for name, value in conditions.items():
        tensors[name] = value[None].repeat(references.batch, 0)
    if "step" in settings.inputs:
        tensors["step"] = np.asarray([0])

    # The mean of the posterior, not a sample of it: one image has one encoding.
    vae = parts.encoder()
    sample_BCHW = from_uint8(torch.from_numpy(tensors["image"])) * 2 - 1
    if isinstance(vae, AutoencoderTiny):
        with watched(watch, "encoder", vae) as largest:
            source_BCHW = vae.encode(sample_BCHW).latents * vae.config["scaling_factor"]
    else:
        with watched(watch, "vae", vae) as largest:
            source_BCHW = vae.encode(sample_BCHW).latent_dist.mean * step.scaling_factor
    tensors["source"] = source_BCHW.numpy()
    return references.plus(tensors, largest)


def add_control(references: References, step: OneStep) -> References:
    """Add 'control', a drawn image, and 'control_scale', as the task control takes them."""
    inputs = example_inputs("control", step.height, step.width, factor=1)
    tensors: dict[str, np.ndarray] = {}
    for name, value in inputs.items():
        tensors[name] = value[None].repeat(references.batch, 0)
    return references.plus(tensors)


@torch.no_grad()
def add_step(
    references: References,
    parts: ChosenParts,
    settings: TaskSettings,
    step: OneStep,
    layout: Layout = "onestep",
    *,
    watch: bool,
) -> References:
    """Add 'output' and 'latents' of the one step, at every strength of an edit.

    Of SDXL also 'conditioning', as the blocks of UNet and ControlNet compute it in the general
    form.
    """
    # In the layout generic the noise is scaled already.
    noise_scale = step.noise_scale if layout == "onestep" else 1.0
    unet, adaptor = parts.unet()
    controlnet = parts.control_network()
    tensors: dict[str, np.ndarray] = {}
    conditioning = []
    with (
        watched(watch, "unet", unet) as largest,
        watched(watch, "controlnet", controlnet) as of_control,
        _recorded(parts, layout, unet, controlnet) as recorder,
    ):
        for index, start in enumerate(settings.starts(step)):
            output_BCHW, latents_BCHW = _one_step(
                unet,
                controlnet,
                references.tensors,
                settings,
                step,
                start.timestep,
                start.alpha_bar,
                noise_scale,
            )
            tensors[strength_key("output", index)] = output_BCHW
            tensors[strength_key("latents", index)] = latents_BCHW
            if recorder is not None:
                conditioning.append(recorder.conditioning_BK.numpy())
    if conditioning:
        tensors["conditioning"] = np.stack(conditioning, axis=1)
    return replace(references.plus(tensors, {**largest, **of_control}), adaptor=adaptor)


def _recorded(
    parts: ChosenParts,
    layout: Layout,
    unet: UNet2DConditionModel,
    controlnet: ControlNetModel | None,
) -> AbstractContextManager[Recorder | None]:
    """A recorder of SDXL's conditioning; nothing for another model, or where the UNet keeps it."""
    if layout == "generic" or not parts.has_text_pair:
        return nullcontext()
    return Recorder(unet) if controlnet is None else Recorder(unet, controlnet)


def _added_conditions(
    tensors: Mapping[str, np.ndarray], step: OneStep
) -> dict[str, torch.Tensor] | None:
    """What diffusers calls ``added_cond_kwargs``: SDXL's pooled vector and six numbers."""
    if "pooled" not in tensors:
        return None
    pooled_BP = torch.from_numpy(tensors["pooled"])
    return {"text_embeds": pooled_BP, "time_ids": torch.from_numpy(_time_ids(step, len(pooled_BP)))}


def _time_ids(step: OneStep, batch: int) -> np.ndarray:
    """The six numbers of each image of a batch, float32 [B, 6]."""
    numbers_16 = np.asarray([size_numbers(step.height, step.width)], np.float32)
    return numbers_16.repeat(batch, 0)


def _one_step(
    unet: UNet2DConditionModel,
    controlnet: ControlNetModel | None,
    tensors: Mapping[str, np.ndarray],
    settings: TaskSettings,
    step: OneStep,
    timestep: int,
    alpha_bar: float,
    noise_scale: float,
) -> tuple[np.ndarray, np.ndarray]:
    """One step of the task: the UNet's output, and the latents to decode."""
    conditions: dict[str, np.ndarray] = {}
    for name in STEP_INPUTS[settings.task]:
        conditions[name] = tensors[name]
    concatenates = is_inpainting_unet(unet.config["in_channels"], step.latent_shape[0])
    start_BCHW = start_latents(
        settings.task,
        conditions,
        alpha_bar,
        concatenates=concatenates,
        noise_scale=noise_scale,
    )

    # The UNet takes torch tensors; the formulas around it are numpy, as the runtime has them.
    on_torch = {name: torch.from_numpy(value) for name, value in conditions.items()}
    sample_BCHW = seen_by_unet(torch.from_numpy(start_BCHW), on_torch, concatenates=concatenates)
    context_BLD = torch.from_numpy(tensors["context"])
    added = _added_conditions(tensors, step)
    residuals = {}
    if controlnet is not None:
        residuals = control_residuals(
            controlnet, sample_BCHW, timestep, context_BLD, on_torch, added
        )
    output_BCHW = unet(
        sample_BCHW,
        timestep,
        context_BLD,
        added_cond_kwargs=added,
        return_dict=False,
        **residuals,
    )[0].numpy()

    x0_BCHW = predict_x0(start_BCHW, output_BCHW, alpha_bar, step.prediction_type, step.method)
    return output_BCHW, finish_latents(settings.task, x0_BCHW, conditions)


@torch.no_grad()
def add_images(
    references: References,
    parts: ChosenParts,
    settings: TaskSettings,
    step: OneStep,
    *,
    watch: bool,
) -> References:
    """Add 'images', decoded from 'latents', at every strength of an edit."""
    vae = parts.decoder()
    is_tiny = isinstance(vae, AutoencoderTiny)
    tensors: dict[str, np.ndarray] = {}
    with watched(watch, "decoder" if is_tiny else "vae", vae) as largest:
        for index in range(len(settings.starts(step))):
            latents_BCHW = torch.from_numpy(references.tensors[strength_key("latents", index)])
            # The factor of a tiny decoder is its own, and nearly always 1.
            scale = vae.config["scaling_factor"] if is_tiny else step.scaling_factor
            latents_BCHW = latents_BCHW / scale
            sample_BCHW = vae.decode(latents_BCHW).sample
            # Whole numbers cannot be NaN, so the images are looked at before they are rounded.
            check_reference({"sample": sample_BCHW.numpy()})
            tensors[strength_key("images", index)] = to_uint8(sample_BCHW / 2 + 0.5).numpy()
    return references.plus(tensors, largest)


@torch.no_grad()
def add_sample(
    references: References, parts: ChosenParts, step: OneStep, *, watch: bool
) -> References:
    """Add the decoder's tensors of the layout generic: 'latent_sample', 'sample' and 'images'."""
    vae = parts.decoder()
    latents_BCHW = latent_sample(references.tensors, step)
    with watched(watch, "vae", vae) as largest:
        sample_BCHW = vae.decode(torch.from_numpy(latents_BCHW), return_dict=False)[0]
    tensors = {
        "latent_sample": latents_BCHW,
        "sample": sample_BCHW.numpy(),
        "images": to_uint8(sample_BCHW / 2 + 0.5).numpy(),
    }
    return references.plus(tensors, largest)


def latent_sample(tensors: Mapping[str, np.ndarray], step: OneStep) -> np.ndarray:
    """What the layout generic decodes: x0 of 'noise' and 'output', without the VAE's scaling."""
    x0_BCHW = predict_x0(
        tensors["noise"], tensors["output"], step.alpha_bar, step.prediction_type, step.method
    )
    return x0_BCHW / np.float32(step.scaling_factor)


def make_references(
    references: References,
    parts: ChosenParts,
    settings: TaskSettings,
    step: OneStep,
    layout: Layout,
    *,
    watch: bool,
) -> References:
    """All tensors of one prompt; see ``make_every_reference``."""
    return make_every_reference([references], parts, settings, step, layout, watch=watch)[0]


def make_every_reference(
    every: Sequence[References],
    parts: ChosenParts,
    settings: TaskSettings,
    step: OneStep,
    layout: Layout,
    *,
    watch: bool,
) -> list[References]:
    """All tensors of some prompts, part by part.

    Args:
        every: of each prompt the tokens and the noise; with 'context', where that is made already.
        parts: the model's parts; each is loaded, run for every prompt, and freed again.
        settings: the task.
        step: the constants of the one step.
        layout: the generic one has a timestep as an input, and a decoder without conversion.
        watch: record the magnitudes that tell which layers float16 cannot hold.

    Raises:
        HipaError: a part gives what no working model gives.

    """
    held = HeldParts.of(parts)
    made = list(every)
    for index, references in enumerate(made):
        if "context" not in references.tensors:
            made[index] = add_context(references, held, layout, watch=watch)
    held.release()
    if settings.task == "control":
        made = [add_control(references, step) for references in made]
    if takes_source(settings.task):
        for index, references in enumerate(made):
            made[index] = add_source(references, held, settings, step, watch=watch)
        held.release()
    for index, references in enumerate(made):
        made[index] = add_step(references, held, settings, step, layout, watch=watch)
    held.release()
    for index, references in enumerate(made):
        if layout == "generic":
            inputs = {"timestep": np.asarray([step.timestep])}
            if parts.has_text_pair:
                inputs["time_ids"] = _time_ids(step, references.batch)
            references = references.plus(inputs)
            made[index] = add_sample(references, held, step, watch=watch)
        else:
            made[index] = add_images(references, held, settings, step, watch=watch)
    held.release()
    return made


def add_safety(references: References, model: Path) -> tuple[References, SafetySettings]:
    """Add 'pixels' and 'cosines' of a model's safety checker; and its settings.

    Args:
        references: with 'images'.
        model: the diffusers folder.

    Raises:
        HipaError: the checker is damaged, or gives what no working one gives.

    """
    checker = load_safety_checker(model / SAFETY_STAGE)
    settings = safety_settings(checker, model / SAFETY_STAGE, model / "feature_extractor")
    # One image is enough, and as many as the stage takes.
    pixels = prepare_pixels(references.tensors["images"][:1], settings)
    cosines_BN = reference_cosines(checker, torch.from_numpy(pixels)).numpy()
    return references.plus({"pixels": pixels, "cosines": cosines_BN}), settings


@contextmanager
def watched(watch: bool, name: str, module: nn.Module | None) -> Iterator[dict[str, float]]:
    """Record ``module``'s largest magnitudes inside the block, by place in the diffusers folder.

    The dict that the block gets is filled when the block ends.
    """
    largest: dict[str, float] = {}
    if not watch or module is None:
        yield largest
        return
    with Ranges().watching() as ranges:
        yield largest
    for layer, value in ranges.by_name(module).items():
        largest[f"{name}.{layer}"] = value

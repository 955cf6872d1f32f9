"""The stages as modules of plain tensors, and what each takes and gives.

``stage_specs`` is the only place that declares shapes.

    B batch   C latent channels   H, W height and width   L tokens   D text width   K strengths

The arguments of every ``forward`` are written into the graph, so their names are part of its bytes.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from hipa_deploy.bundle.manifest import (
    Axis,
    DType,
    Layout,
    OneStep,
    Precision,
    StageSpec,
    Strength,
    TensorSpec,
)
from hipa_deploy.export.generic.generic_rows import SIZE_NUMBERS, PairSizes, Row, generic_rows
from hipa_deploy.export.graph.conditioning import Conditioning, JointConditioning
from hipa_deploy.export.graph.fold import fold_decoder_input, fold_encoder_output
from hipa_deploy.export.graph.upsample import fold_upsampling
from hipa_deploy.generate.x0 import predict_x0_in_a_graph
from hipa_deploy.models.text_context import text_module
from hipa_deploy.models.text_pair import pair_context
from hipa_deploy.tasks import Task, finish_latents, is_inpainting_unet, start_latents, unet_inputs

TORCH_DTYPES = {
    "float16": torch.float16,
    "float32": torch.float32,
    "int64": torch.int64,
    "uint8": torch.uint8,
}


class NamedTextEncoder(torch.nn.Module):
    """A CLIPTextModel of transformers 5.6 or newer, whose parts are called ``text_model.*``.

    The names of modules become those of a graph's weights and layers. A swap, an island of float32
    and a known fault name them, so they must fit a bundle whatever version exported it.

    Args:
        encoder: it takes and gives what this module does.

    """

    def __init__(self, encoder: CLIPTextModel) -> None:
        super().__init__()
        self.text_model = encoder

    def forward(self, *inputs: Any, **settings: Any) -> Any:
        """The encoder's own output."""
        return self.text_model(*inputs, **settings)


def named_encoder(encoder: Any) -> Any:
    """A text encoder whose parts are called ``text_model.*``, with a mask of numbers.

    The mask keeps the graph's operators, with which the backends were tried.

    Args:
        encoder: a CLIPTextModel or CLIPTextModelWithProjection. Of transformers 4 it is returned
            as it is.

    Example:
        >>> named_encoder(ModelParts.open("emoji").text_encoder()).text_model.final_layer_norm
        LayerNorm((64,), eps=1e-05, elementwise_affine=True)

    """
    inner = text_module(encoder)
    # Version 5 makes no such mask, and takes one. Version 4 makes it, and takes none.
    if hasattr(sys.modules[type(inner).__module__], "create_causal_mask"):
        inner.register_forward_pre_hook(_give_mask, with_kwargs=True)
    return NamedTextEncoder(encoder) if inner is encoder else encoder


def _give_mask(
    encoder: torch.nn.Module, inputs: tuple[Any, ...], settings: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Put the mask among what an encoder is called with."""
    tokens_BL = inputs[0] if inputs else settings["input_ids"]
    weight: Any = encoder.get_parameter("embeddings.token_embedding.weight")
    return inputs, {**settings, "attention_mask": _causal_mask(tokens_BL, weight.dtype)}


def _causal_mask(tokens_BL: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What is added to the scores of attention: 0, and ``dtype``'s least number for later tokens.

    Version 5 masks by truth values. Its graph would have more operators, ``IsNaN`` among them.
    """
    batch, length = tokens_BL.shape
    mask_LL = torch.full((length, length), torch.finfo(dtype).min, device=tokens_BL.device)
    place_L = torch.arange(length, device=tokens_BL.device)
    mask_LL.masked_fill_(place_L < (place_L + 1).view(length, 1), 0)
    return mask_LL.to(dtype)[None, None, :, :].expand(batch, 1, length, length)


# ``places`` of a stage: what its attributes are called in the diffusers folder. The weight map
# names weights by them, and the references name the layers that they watched.


class TextEncoderStage(torch.nn.Module):
    """tokens int64 [B, L] -> context [B, L, D] in ``dtype``.

    Args:
        encoder: the text encoder.
        dtype: of the context, as the UNet takes it.
        chunk_tokens: C, tokens that the encoder reads at once; L is a multiple of it.

    Example:
        >>> stage = TextEncoderStage(ModelParts.open("emoji").text_encoder(), torch.float32)
        >>> stage(torch.zeros(1, 77, dtype=torch.int64)).shape[:2]
        torch.Size([1, 77])

    """

    places: ClassVar = {"encoder": "text_encoder"}

    def __init__(self, encoder: CLIPTextModel, dtype: torch.dtype, chunk_tokens: int = 77) -> None:
        super().__init__()
        self.encoder = encoder
        self.dtype = dtype
        self.chunk_tokens = chunk_tokens

    def forward(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """Last hidden states, of several chunks joined along the tokens."""
        length = tokens_BL.shape[1]
        if length == self.chunk_tokens:
            return self.encoder(tokens_BL).last_hidden_state.to(self.dtype)

        # The chunks go through the encoder as rows of one batch.
        tokens_NC = tokens_BL.reshape(-1, self.chunk_tokens)
        context_NCD = self.encoder(tokens_NC).last_hidden_state
        width = context_NCD.shape[-1]
        return context_NCD.reshape(-1, length, width).to(self.dtype)


class _TextPair(torch.nn.Module):
    """Two text encoders, and all of the UNet that depends on the prompt and the size alone.

    For a base UNet that refines, the pooled vector [B, P] is a third output.

    Args:
        encoder: the first text encoder.
        encoder_2: the second one, with the pooled vector's projection.
        conditioning: what the UNet makes of the pooled vector.
        dtype: of all outputs, as the UNet takes them.
        chunk_tokens: tokens that an encoder reads at once; L is a multiple of it.
        clip_skip: layers of both that are left out besides the last one.
        gives_pooled: whether the pooled vector is an output.

    """

    places: ClassVar = {
        "encoder": "text_encoder",
        "encoder_2": "text_encoder_2",
        "conditioning": "unet",
    }

    def __init__(
        self,
        encoder: CLIPTextModel,
        encoder_2: CLIPTextModelWithProjection,
        conditioning: Conditioning | JointConditioning,
        dtype: torch.dtype,
        chunk_tokens: int = 77,
        clip_skip: int = 0,
        *,
        gives_pooled: bool = False,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.encoder_2 = encoder_2
        self.conditioning = conditioning
        self.dtype = dtype
        self.chunk_tokens = chunk_tokens
        self.clip_skip = clip_skip
        self.gives_pooled = gives_pooled

    def outputs(
        self,
        tokens_BL: torch.Tensor,
        tokens_2_BL: torch.Tensor,
        sizes_B6: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """The formula of ``pair_context``, then the conditioning of the pooled vector."""
        context_BLD, pooled_BP = pair_context(
            self.encoder,
            self.encoder_2,
            tokens_BL,
            tokens_2_BL,
            self.chunk_tokens,
            self.clip_skip,
        )
        conditioning_BSK = self.conditioning(pooled_BP, sizes_B6)
        outputs = [context_BLD, conditioning_BSK]
        if self.gives_pooled:
            outputs.append(pooled_BP)
        return tuple(output.to(self.dtype) for output in outputs)


class TextPairStage(_TextPair):
    """tokens, tokens_2 int64 [B, L] -> context [B, L, D], conditioning [B, S, K] in ``dtype``."""

    def forward(
        self, tokens_BL: torch.Tensor, tokens_2_BL: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """For images of the size that the conditioning holds."""
        return self.outputs(tokens_BL, tokens_2_BL)


class SizedTextPairStage(_TextPair):
    """``TextPairStage`` for images of several sizes: it is told the size, sizes int64 [B, 6]."""

    def forward(
        self, tokens_BL: torch.Tensor, tokens_2_BL: torch.Tensor, sizes_B6: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """With the numbers of ``hipa_deploy.tasks.size_numbers`` for each image."""
        return self.outputs(tokens_BL, tokens_2_BL, sizes_B6)


class OneStepUNet(torch.nn.Module):
    """The one step of a task -> the latents to decode, scaled, float32 [B, C, H, W].

    The inputs are ``unet_inputs(task)``: noise and source [B, C, H, W], mask [B, 1, H, W], the
    index of one of several strengths [1], context [B, L, D]; of the task control the control image
    uint8 [B, H, W, 3] and its scale [B]; of SDXL also the conditioning [B, S, K] that the text
    stage computed. The start of the step and the
    combination to x0 stay in float32 inside a float16 graph: for eps, x0 = (z - s eps) / a
    amplifies the UNet's rounding s / a = 14.6 times at t = 999.

    Args:
        unet: a UNet with its timesteps folded.
        step: the constants of the step.
        task: what the image is made from.
        strengths: of an edit; with several, the UNet takes the index of one.
        conditioned: whether ``cut_conditioning`` cut the UNet, in place of ``fold_timestep``.
        controlnet: of the task control, folded in the same way.

    Example:
        >>> fold_timestep(unet, step.timestep)
        >>> OneStepUNet(unet, step)(noise_BCHW, context_BLD).shape
        torch.Size([1, 4, 64, 64])

    """

    places: ClassVar = {"unet": "unet", "controlnet": "controlnet"}

    def __init__(
        self,
        unet: UNet2DConditionModel,
        step: OneStep,
        task: Task = "generate",
        strengths: Sequence[Strength] = (),
        *,
        conditioned: bool = False,
        controlnet: ControlNetModel | None = None,
    ) -> None:
        super().__init__()
        self.unet = unet
        # Of other tasks no part at all: its name would be in their graphs.
        if controlnet is not None:
            self.controlnet = controlnet
        self.step = step
        self.task: Task = task
        self.names = unet_inputs(task, len(strengths), conditioned=conditioned)
        name_arguments(self, self.names)
        self.concatenates = is_inpainting_unet(unet.config["in_channels"], step.latent_shape[0])
        # Not a buffer: it must stay float32 when the module is converted to float16.
        alpha_bars = [[strength.alpha_bar] for strength in strengths]
        self.alpha_bar_K1 = torch.tensor(alpha_bars, dtype=torch.float32)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """One call of the UNet, then x0."""
        tensors = dict(zip(self.names, inputs, strict=True))
        context_BLD = tensors["context"]
        timestep = self._embedding(tensors)
        alpha_bar = self._alpha_bar(tensors)

        # Everything but the UNet's own arithmetic is float32.
        start_BCHW = start_latents(
            self.task,
            tensors,
            alpha_bar,
            concatenates=self.concatenates,
            noise_scale=self.step.noise_scale,
        )
        sample_BCHW = seen_by_unet(start_BCHW, tensors, concatenates=self.concatenates)
        sample_BCHW = sample_BCHW.to(context_BLD.dtype)
        residuals = {}
        if self.task == "control":
            conditioning_BK = timestep if "conditioning" in tensors else None
            residuals = control_residuals(
                self.controlnet,
                sample_BCHW,
                self.step.timestep,
                context_BLD,
                tensors,
                conditioning_BK=conditioning_BK,
            )
        output_BCHW = self.unet(sample_BCHW, timestep, context_BLD, return_dict=False, **residuals)[
            0
        ].float()

        prediction_type = self.step.prediction_type
        x0_BCHW = predict_x0_in_a_graph(
            start_BCHW, output_BCHW, alpha_bar, prediction_type, self.step.method
        )
        latents_BCHW: torch.Tensor = finish_latents(self.task, x0_BCHW, tensors)
        return latents_BCHW

    def _embedding(self, tensors: Mapping[str, torch.Tensor]) -> Any:
        """What the folded UNet takes in place of a timestep.

        That is nothing that it looks at, the index of a strength [1], or the conditioning [B, K].
        """
        if "conditioning" not in tensors:
            return tensors.get("step", self.step.timestep)
        conditioning_BSK = tensors["conditioning"]
        if "step" in tensors:
            conditioning_BSK = torch.index_select(conditioning_BSK, 1, tensors["step"])
        return conditioning_BSK[:, 0]

    def _alpha_bar(self, tensors: Mapping[str, torch.Tensor]) -> Any:
        """A number; with several strengths, that of the index 'step', [1, 1, 1, 1]."""
        if "step" not in tensors:
            return self.step.alpha_bar
        alpha_bar_11 = torch.nn.functional.embedding(tensors["step"], self.alpha_bar_K1)
        return alpha_bar_11.view(1, 1, 1, 1)


def name_arguments(module: torch.nn.Module, names: Sequence[str]) -> None:
    """Give ``module.forward``, which takes ``*inputs``, a signature with arguments of these names.

    The exporter writes them into the graph. They are part of its bytes, by which an adaptor knows
    which bundle it fits.
    """
    forward = module.forward
    suffixes = {"context": "BLD", "conditioning": "BSK", "mask": "B1HW", "step": "1"}
    suffixes |= {"control": "BHWC", "control_scale": "B"}

    def named(*inputs: torch.Tensor) -> torch.Tensor:
        return forward(*inputs)

    # Suffixes as everywhere: without one of its own, a tensor has the shape of the latents.
    parameters = []
    for name in names:
        argument = f"{name}_{suffixes.get(name, 'BCHW')}"
        parameters.append(inspect.Parameter(argument, inspect.Parameter.POSITIONAL_OR_KEYWORD))
    signature = inspect.Signature(parameters)
    named.__signature__ = signature  # type: ignore[attr-defined]  # inspect.signature reads it
    module.forward = named


def seen_by_unet(
    start_BCHW: torch.Tensor, tensors: Mapping[str, torch.Tensor], *, concatenates: bool
) -> torch.Tensor:
    """The UNet's input: where the step starts, [B, C, H, W].

    A UNet made for inpainting sees [z, mask, source], [B, 2 C + 1, H, W].
    """
    if not concatenates:
        return start_BCHW
    return torch.cat([start_BCHW, tensors["mask"], tensors["source"]], dim=1)


def control_residuals(
    controlnet: ControlNetModel,
    sample_BCHW: torch.Tensor,
    timestep: Any,
    context_BLD: torch.Tensor,
    tensors: Mapping[str, torch.Tensor],
    added: Mapping[str, torch.Tensor] | None = None,
    conditioning_BK: torch.Tensor | None = None,
) -> dict[str, Any]:
    """What a ControlNet adds to the UNet's blocks, as keywords of the UNet.

    Args:
        controlnet: in its general form, or folded as the UNet is.
        sample_BCHW: as the UNet sees it.
        timestep: as the UNet takes it.
        context_BLD: as the UNet takes it.
        tensors: 'control' uint8 [B, H, W, 3]; 'control_scale' float32 [B], by which each image's
            residuals are multiplied: 1 is the ControlNet as it was trained, 0 switches it off.
        added: what diffusers calls ``added_cond_kwargs``, of SDXL in its general form.
        conditioning_BK: of SDXL after ``cut_control``.

    """
    # A ControlNet takes colours in [0, 1], and not in [-1, 1] as the VAE does.
    control_BCHW = from_uint8(tensors["control"]).to(sample_BCHW.dtype)
    scale_B111 = tensors["control_scale"].to(sample_BCHW.dtype)[:, None, None, None]
    blocks, middle_BCHW = controlnet(
        sample_BCHW,
        timestep,
        context_BLD,
        control_BCHW,
        conditioning_scale=scale_B111,
        timestep_cond=conditioning_BK,
        added_cond_kwargs=added,
        return_dict=False,
    )
    return {
        "down_block_additional_residuals": blocks,
        "mid_block_additional_residual": middle_BCHW,
    }


class OneStepEncoder(torch.nn.Module):
    """image uint8 [B, H, W, 3] -> the mean of the posterior, scaled, float32 [B, C, h, w].

    The encoder of ``vae`` is changed in place.
    """

    places: ClassVar = {"encoder": "vae.encoder"}

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        fold_encoder_output(vae)
        self.encoder = vae.encoder

    def forward(self, image_BHWC: torch.Tensor) -> torch.Tensor:
        """Convert and encode."""
        sample_BCHW = from_uint8(image_BHWC) * 2 - 1
        return self.encoder(sample_BCHW.to(self.encoder.conv_in.weight.dtype)).float()


class TinyEncoder(torch.nn.Module):
    """image uint8 [B, H, W, 3] -> scaled latents float32 [B, C, h, w].

    Through the encoder of an AutoencoderTiny.
    """

    places: ClassVar = {"layers": "encoder.encoder.layers"}

    def __init__(self, vae: AutoencoderTiny) -> None:
        super().__init__()
        self.layers = vae.encoder.layers
        self.scale = float(vae.config["scaling_factor"])

    def forward(self, image_BHWC: torch.Tensor) -> torch.Tensor:
        """EncoderTiny's layers take an image in [0, 1]."""
        first: Any = self.layers[0]
        latents_BCHW: torch.Tensor = self.layers(from_uint8(image_BHWC).to(first.weight.dtype))
        return scaled(latents_BCHW.float(), self.scale)


def scaled(value: torch.Tensor, factor: float) -> torch.Tensor:
    """``value`` times ``factor``, which is 1 for nearly every AutoencoderTiny: then no node."""
    return value if factor == 1 else value * factor


def from_uint8(image_BHWC: torch.Tensor) -> torch.Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in [0, 1].

    The cast must be the first node of a graph: TensorRT refuses it further inside.
    """
    return image_BHWC.float().permute(0, 3, 1, 2) * (1 / 255)


class OneStepDecoder(torch.nn.Module):
    """scaled latents float32 [B, C, h, w] -> images uint8 [B, H, W, 3].

    Through the decoder of an AutoencoderKL, which is changed in place.
    """

    places: ClassVar = {"decoder": "vae.decoder", "offset": "vae.post_quant_conv.bias"}

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.decoder = vae.decoder
        fold_upsampling(self.decoder)
        # Not a buffer: it must stay float32 when the module is converted to float16.
        self.offset = fold_decoder_input(vae)

    def forward(self, latents_BCHW: torch.Tensor) -> torch.Tensor:
        """Decode and convert."""
        sample_BCHW = (latents_BCHW + self.offset).to(self.decoder.conv_in.weight.dtype)
        return to_uint8(self.decoder(sample_BCHW).float() / 2 + 0.5)


class TinyDecoder(torch.nn.Module):
    """scaled latents float32 [B, C, h, w] -> images uint8 [B, H, W, 3].

    Through the decoder of an AutoencoderTiny, which is changed in place.
    """

    places: ClassVar = {"layers": "decoder.decoder.layers"}

    def __init__(self, vae: AutoencoderTiny) -> None:
        super().__init__()
        self.layers = vae.decoder.layers
        self.scale = float(vae.config["scaling_factor"])
        fold_upsampling(self.layers)

    def forward(self, latents_BCHW: torch.Tensor) -> torch.Tensor:
        """Clamp as DecoderTiny does, decode to an image in [0, 1], and convert."""
        first: Any = self.layers[0]
        own_BCHW = scaled(latents_BCHW, 1 / self.scale)
        sample_BCHW = (torch.tanh(own_BCHW / 3) * 3).to(first.weight.dtype)
        return to_uint8(self.layers(sample_BCHW).float())


def to_uint8(image01_BCHW: torch.Tensor) -> torch.Tensor:
    """[B, 3, H, W] in [0, 1] -> uint8 [B, H, W, 3].

    The cast must be the last node of a graph: TensorRT refuses it further inside.
    """
    return (image01_BCHW.clamp(0, 1) * 255).round().permute(0, 2, 3, 1).to(torch.uint8)


class Generator(torch.nn.Module):
    """The UNet's inputs -> images uint8 [B, H, W, 3]: UNet and decoder in one graph."""

    def __init__(self, unet: OneStepUNet, decoder: OneStepDecoder | TinyDecoder) -> None:
        super().__init__()
        self.unet = unet
        self.decoder = decoder
        name_arguments(self, unet.names)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """The UNet's one step, then the decoder."""
        return self.decoder(self.unet(*inputs))


def place_of(module: torch.nn.Module, name: str) -> str:
    """The place in the diffusers folder of a stage's module or tensor called ``name``.

    The stage itself, '', and the two halves of a ``Generator`` have none: ''.

    Example:
        >>> place_of(OneStepDecoder(vae), "decoder.conv_in.weight")
        'vae.decoder.conv_in.weight'

    """
    if not name:
        return ""
    head, _, tail = name.partition(".")
    # A module within the stage may have places of its own, for all of its parts.
    inner = getattr(module, head)
    if hasattr(inner, "places"):
        return place_of(inner, tail)
    place: str = module.places[head]  # type: ignore[index, assignment]  # nn.Module's stub
    return f"{place}.{tail}" if tail else place


def stage_specs(
    layout: Layout,
    precision: Precision,
    batch: int,
    step: OneStep,
    length: int,
    width: int,
    axes: Mapping[str, Axis],
    names: Sequence[str] = ("noise", "context"),
    conditioning: tuple[int, int] | None = None,
    pooled: int | None = None,
    pair: PairSizes | None = None,
    *,
    sized: bool = False,
) -> dict[str, StageSpec]:
    """Inputs and outputs of every stage, by the stage's name.

    A bundle has some of the stages: 'generator' stands for UNet and decoder together.

    Args:
        layout: onestep, or generic with optimum's names.
        precision: of the text context and, in layout generic, of all tensors between stages.
        batch: images per call.
        step: sizes of latents and images.
        length: tokens of a prompt.
        width: of the text context.
        axes: dimensions that are dynamic, by name.
        names: the UNet's inputs.
        conditioning: S and K of SDXL's conditioning [B, S, K]; None without one.
        pooled: P of the pooled vector [B, P], where the text stage gives it; else None.
        pair: of SDXL in layout generic, what its text encoders give.
        sized: whether SDXL's text stage is told the size of the images.

    Example:
        >>> specs = stage_specs("onestep", "fp16", 1, step, 77, 768, {})
        >>> [tensor.name for tensor in specs["unet"].inputs]
        ['noise', 'context']

    """
    sizes = {
        "batch": batch,
        "latent_height": step.latent_shape[1],
        "latent_width": step.latent_shape[2],
        "height": step.height,
        "width": step.width,
    }
    # A dynamic dimension has its axis' name in place of a size.
    shown: dict[str, int | str] = {}
    for name, size in sizes.items():
        shown[name] = name if name in axes else size

    real: DType = "float16" if precision == "fp16" else "float32"
    channels = step.latent_shape[0]
    specs = {}
    if layout == "generic":
        for name, generic in generic_rows(shown, channels, length, width, real, pair).items():
            every = (*generic.inputs, *generic.outputs)
            specs[name] = _spec(name, axes, every, len(generic.outputs))
        return specs
    rows = _onestep_rows(
        shown, channels, length, width, real, names, conditioning, pooled=pooled, sized=sized
    )
    for name, stage_rows in rows.items():
        outputs = 1
        if name == "text_encoder":
            # Its context; the conditioning and the pooled vector where they are wanted.
            outputs += (conditioning is not None) + (pooled is not None)
        specs[name] = _spec(name, axes, stage_rows, outputs)
    return specs


def _onestep_rows(
    sizes: Mapping[str, int | str],
    channels: int,
    length: int,
    width: int,
    real: DType,
    names: Sequence[str],
    conditioning: tuple[int, int] | None,
    *,
    pooled: int | None,
    sized: bool,
) -> dict[str, tuple[Row, ...]]:
    """The stages of layout onestep. Latents are float32 between stages, images uint8."""
    batch = sizes["batch"]
    latent_size = (sizes["latent_height"], sizes["latent_width"])
    latent_BCHW = (batch, channels, *latent_size)
    image_BHWC = (batch, sizes["height"], sizes["width"], 3)

    # Between stages latents are float32, so that only the stages' own arithmetic is rounded; images
    # are uint8 at both ends, a quarter of the bytes to copy.
    tokens: Row = ("tokens", "int64", (batch, length))
    context: Row = ("context", real, (batch, length, width))
    image: Row = ("image", "uint8", image_BHWC)
    images: Row = ("images", "uint8", image_BHWC)
    latents: Row = ("latents", "float32", latent_BCHW)
    source: Row = ("source", "float32", latent_BCHW)
    unet_inputs: dict[str, Row] = {
        "noise": ("noise", "float32", latent_BCHW),
        "source": source,
        "mask": ("mask", "float32", (batch, 1, *latent_size)),
        "step": ("step", "int64", (1,)),
        "control": ("control", "uint8", image_BHWC),
        "control_scale": ("control_scale", "float32", (batch,)),
        "context": context,
    }
    text_rows = [tokens, context]
    if conditioning is not None:
        blocks: Row = ("conditioning", real, (batch, *conditioning))
        unet_inputs["conditioning"] = blocks
        told: list[Row] = [("sizes", "int64", (batch, SIZE_NUMBERS))] if sized else []
        text_rows = [tokens, ("tokens_2", "int64", (batch, length)), *told, context, blocks]
    if pooled is not None:
        text_rows.append(("pooled", real, (batch, pooled)))
    # Each task takes some of the UNet's inputs, in the order of its names.
    inputs = [unet_inputs[name] for name in names]
    return {
        "text_encoder": tuple(text_rows),
        "vae_encoder": (image, source),
        "unet": (*inputs, latents),
        "vae_decoder": (latents, images),
        "generator": (*inputs, images),
    }


def _spec(
    name: str, axes: Mapping[str, Axis], rows: tuple[Row, ...], outputs: int = 1
) -> StageSpec:
    """A stage of ``rows``, the last of which are its outputs, with the axes that they name."""
    tensors = []
    used_axes: dict[str, Axis] = {}
    for tensor_name, dtype, shape in rows:
        tensors.append(TensorSpec(name=tensor_name, dtype=dtype, shape=shape))
        for size in shape:
            if isinstance(size, str):
                used_axes[size] = axes[size]
    return StageSpec(
        name=name,
        inputs=tuple(tensors[:-outputs]),
        outputs=tuple(tensors[-outputs:]),
        axes=used_axes,
    )

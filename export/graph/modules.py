"""The stages as modules of flat tensors, with their specification. One list a layout; nothing else declares shapes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from transformers import CLIPTextModel

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
from hipa_deploy.export.graph.fold import fold_decoder_input, fold_encoder_output
from hipa_deploy.export.graph.upsample import fold_upsampling
from hipa_deploy.generate.x0 import predict_x0_in_a_graph
from hipa_deploy.tasks import Task, finish_latents, is_inpainting_unet, start_latents, unet_inputs

TORCH_DTYPES = {
    "float16": torch.float16,
    "float32": torch.float32,
    "int64": torch.int64,
    "uint8": torch.uint8,
}


# ``places``: what an attribute of a stage is called in the diffusers folder. ``export.weight_map`` names weights by it.


class TextEncoderStage(torch.nn.Module):
    """tokens int64 [B, L] -> context [B, L, D] in ``dtype``, whatever the encoder computes in."""

    places: ClassVar = {"encoder": "text_encoder"}

    def __init__(self, encoder: CLIPTextModel, dtype: torch.dtype) -> None:
        super().__init__()
        self.encoder = encoder
        self.dtype = dtype

    def forward(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """Last hidden states."""
        return self.encoder(tokens_BL).last_hidden_state.to(self.dtype)


class OneStepUNet(torch.nn.Module):
    """What a task's step takes, context [B, L, D] -> latents to decode [B, C, H, W], float32, as the scheduler scales.

    The inputs are ``unet_inputs(task)``: noise and source [B, C, H, W], mask [B, 1, H, W], an index into several
    strengths. Where the step starts and the combination to x0 stay in float32 inside a float16 graph: for eps,
    x0 = (z - s eps) / a amplifies the UNet's rounding s / a = 14.6 times at t = 999.
    """

    places: ClassVar = {"unet": "unet"}

    def __init__(
        self,
        unet: UNet2DConditionModel,
        step: OneStep,
        task: Task = "generate",
        strengths: Sequence[Strength] = (),
    ) -> None:
        super().__init__()
        self.unet = unet
        self.step = step
        self.task: Task = task
        self.names = unet_inputs(task, len(strengths))
        name_arguments(self, self.names)
        self.concatenates = is_inpainting_unet(unet.config.in_channels, step.latent_shape[0])
        # no buffer: it stays float32 when the module is halved
        self.alpha_bar_K1 = torch.tensor(
            [[strength.alpha_bar] for strength in strengths], dtype=torch.float32
        )

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """One call of the UNet, then x0."""
        given = dict(zip(self.names, inputs, strict=True))
        context_BLD, moment = given["context"], given.get("step", self.step.timestep)
        alpha_bar = self._alpha_bar(given)
        start_BCHW = start_latents(self.task, given, alpha_bar, concatenates=self.concatenates)
        sample_BCHW = seen_by_unet(start_BCHW, given, concatenates=self.concatenates).to(
            context_BLD.dtype
        )
        output_BCHW = self.unet(sample_BCHW, moment, context_BLD, return_dict=False)[0].float()
        return finish_latents(
            self.task,
            predict_x0_in_a_graph(start_BCHW, output_BCHW, alpha_bar, self.step.prediction_type),
            given,
        )

    def _alpha_bar(self, given: Mapping[str, torch.Tensor]) -> Any:
        """A number; of several strengths the one that is asked for, [1, 1, 1, 1]."""
        if "step" not in given:
            return self.step.alpha_bar
        return torch.nn.functional.embedding(given["step"], self.alpha_bar_K1).view(1, 1, 1, 1)


def name_arguments(module: torch.nn.Module, names: Sequence[str]) -> None:
    """Let ``module.forward``, which takes ``*inputs``, look as if it took arguments of these names.

    The exporter writes them into the graph. They are part of its bytes, by which an adaptor knows what it fits.
    """
    forward, shapes = module.forward, {"context": "BLD", "mask": "B1HW", "step": "1"}

    def named(*inputs: torch.Tensor) -> torch.Tensor:
        return forward(*inputs)

    arguments = [f"{name}_{shapes.get(name, 'BCHW')}" for name in names]
    named.__signature__ = inspect.Signature(  # type: ignore[attr-defined]  # which inspect.signature reads
        [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in arguments]
    )
    module.forward = named


def seen_by_unet(
    start_BCHW: torch.Tensor, given: Mapping[str, torch.Tensor], *, concatenates: bool
) -> torch.Tensor:
    """The UNet's input: where the step starts; for one made for inpainting [z, mask, source], [B, 2 C + 1, H, W]."""
    return (
        torch.cat([start_BCHW, given["mask"], given["source"]], dim=1)
        if concatenates
        else start_BCHW
    )


class OneStepEncoder(torch.nn.Module):
    """image uint8 [B, H, W, 3] -> the posterior's mean, scaled, float32 [B, C, H, W]; changes the VAE."""

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
    """The same through an AutoencoderTiny's encoder, which gives latents as the scheduler scales them."""

    places: ClassVar = {"layers": "encoder.encoder.layers"}

    def __init__(self, vae: AutoencoderTiny) -> None:
        super().__init__()
        self.layers = vae.encoder.layers

    def forward(self, image_BHWC: torch.Tensor) -> torch.Tensor:
        """EncoderTiny's layers take an image in [0, 1]."""
        return self.layers(from_uint8(image_BHWC).to(self.layers[0].weight.dtype)).float()


def from_uint8(image_BHWC: torch.Tensor) -> torch.Tensor:
    """uint8 [B, H, W, 3] -> [0, 1] float32. The cast must be the first node of a graph: TensorRT refuses it inside."""
    return image_BHWC.float().permute(0, 3, 1, 2) * (1 / 255)


class OneStepDecoder(torch.nn.Module):
    """x0 latents float32 [B, C, H, W] -> images uint8 [B, H, W, 3], through the VAE's decoder (changed in place)."""

    places: ClassVar = {"decoder": "vae.decoder", "offset": "vae.post_quant_conv.bias"}

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.decoder = vae.decoder
        fold_upsampling(self.decoder)
        self.offset = fold_decoder_input(
            vae
        )  # no buffer: it stays float32 when the module is halved

    def forward(self, latents_BCHW: torch.Tensor) -> torch.Tensor:
        """Decode and convert."""
        sample_BCHW = (latents_BCHW + self.offset).to(self.decoder.conv_in.weight.dtype)
        return to_uint8(self.decoder(sample_BCHW).float() / 2 + 0.5)


class TinyDecoder(torch.nn.Module):
    """The same through an AutoencoderTiny (changed in place), which takes latents as the scheduler scales them."""

    places: ClassVar = {"layers": "decoder.decoder.layers"}

    def __init__(self, vae: AutoencoderTiny) -> None:
        super().__init__()
        self.layers = vae.decoder.layers
        fold_upsampling(self.layers)

    def forward(self, latents_BCHW: torch.Tensor) -> torch.Tensor:
        """DecoderTiny's own clamp, its layers, whose output is an image in [0, 1], and the conversion."""
        sample_BCHW = (torch.tanh(latents_BCHW / 3) * 3).to(self.layers[0].weight.dtype)
        return to_uint8(self.layers(sample_BCHW).float())


def to_uint8(image01_BCHW: torch.Tensor) -> torch.Tensor:
    """[0, 1] -> uint8 [B, H, W, 3]. The cast must be the last node of a graph: TensorRT refuses it inside."""
    return (image01_BCHW.clamp(0, 1) * 255).round().permute(0, 2, 3, 1).to(torch.uint8)


class Generator(torch.nn.Module):
    """The UNet's inputs -> images: UNet and decoder in one graph."""

    def __init__(self, unet: OneStepUNet, decoder: OneStepDecoder | TinyDecoder) -> None:
        super().__init__()
        self.unet = unet
        self.decoder = decoder
        name_arguments(self, unet.names)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """The whole of the image, given its context."""
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
    if isinstance(module, Generator):
        return place_of(getattr(module, head), tail)
    place: str = module.places[head]  # type: ignore[index, assignment]  # nn.Module's stub
    return f"{place}.{tail}" if tail else place


class GenericUNet(torch.nn.Module):
    """The UNet as optimum names it: sample, timestep int64 [1], encoder_hidden_states -> out_sample."""

    places: ClassVar = {"unet": "unet"}

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self, sample_BCHW: torch.Tensor, timestep: torch.Tensor, context_BLD: torch.Tensor
    ) -> torch.Tensor:
        """The UNet's own output."""
        return self.unet(sample_BCHW, timestep, context_BLD, return_dict=False)[0]


class GenericDecoder(torch.nn.Module):
    """latent_sample [B, C, H, W] -> sample [B, 3, H, W] in [-1, 1]."""

    places: ClassVar = {"vae": "vae"}

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents_BCHW: torch.Tensor) -> torch.Tensor:
        """The decoder's own output."""
        return self.vae.decode(latents_BCHW, return_dict=False)[0]


_Row = tuple[str, DType, tuple[int | str, ...]]


def stage_specs(
    layout: Layout,
    precision: Precision,
    batch: int,
    step: OneStep,
    length: int,
    width: int,
    axes: Mapping[str, Axis],
    names: Sequence[str] = ("noise", "context"),
) -> dict[str, StageSpec]:
    """Every stage's inputs and outputs: ``length`` tokens, text ``width``, sizes from ``step`` but for ``axes``.

    ``names`` are the UNet's inputs. A bundle has some of the stages: 'generator' stands for UNet and decoder together.
    """
    static = {
        "batch": batch,
        "latent_height": step.latent_shape[1],
        "latent_width": step.latent_shape[2],
        "height": step.height,
        "width": step.width,
    }
    b, h, w, height, wide = (name if name in axes else size for name, size in static.items())
    real: DType = "float16" if precision == "fp16" else "float32"
    latent_BCHW, tokens_BL, context_BLD = (
        (b, step.latent_shape[0], h, w),
        (b, length),
        (b, length, width),
    )
    if layout == "onestep":
        context: _Row = ("context", real, context_BLD)
        latents, source, noise = (
            _row(name, "float32", latent_BCHW) for name in ("latents", "source", "noise")
        )
        image, images = (_row(name, "uint8", (b, height, wide, 3)) for name in ("image", "images"))
        known = [noise, source, ("mask", "float32", (b, 1, h, w)), ("step", "int64", (1,)), context]
        given = tuple(row for name in names for row in known if row[0] == name)
        rows: dict[str, tuple[_Row, ...]] = {
            "text_encoder": (("tokens", "int64", tokens_BL), context),
            "vae_encoder": (image, source),
            "unet": (*given, latents),
            "vae_decoder": (latents, images),
            "generator": (*given, images),
        }
    else:
        rows = {
            "text_encoder": (
                ("input_ids", "int64", tokens_BL),
                ("last_hidden_state", real, context_BLD),
            ),
            "unet": (
                ("sample", real, latent_BCHW),
                ("timestep", "int64", (1,)),
                ("encoder_hidden_states", real, context_BLD),
                ("out_sample", real, latent_BCHW),
            ),
            "vae_decoder": (
                ("latent_sample", real, latent_BCHW),
                ("sample", real, (b, 3, height, wide)),
            ),
        }
    return {name: _spec(name, axes, stage_rows) for name, stage_rows in rows.items()}


def _row(name: str, dtype: DType, shape: tuple[int | str, ...]) -> _Row:
    return name, dtype, shape


def _spec(name: str, axes: Mapping[str, Axis], rows: tuple[_Row, ...]) -> StageSpec:
    """A stage from its inputs and, last, its output, with the axes that they name."""
    tensors = tuple(TensorSpec(name=n, dtype=dtype, shape=shape) for n, dtype, shape in rows)
    named = {
        size: axes[size] for tensor in tensors for size in tensor.shape if isinstance(size, str)
    }
    return StageSpec(name=name, inputs=tensors[:-1], outputs=tensors[-1:], axes=named)

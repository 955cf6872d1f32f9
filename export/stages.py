"""The stages as modules of flat tensors, with their specification. One list a layout; nothing else declares shapes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from transformers import CLIPTextModel

from hipa_deploy.bundle import Axis, DType, Layout, OneStep, Precision, StageSpec, TensorSpec
from hipa_deploy.export.fold import fold_decoder_input
from hipa_deploy.export.upsample import fold_upsampling

TORCH_DTYPES = {
    "float16": torch.float16,
    "float32": torch.float32,
    "int64": torch.int64,
    "uint8": torch.uint8,
}


class TextEncoderStage(torch.nn.Module):
    """tokens int64 [B, L] -> context [B, L, D] in ``dtype``, whatever the encoder computes in."""

    def __init__(self, encoder: CLIPTextModel, dtype: torch.dtype) -> None:
        super().__init__()
        self.encoder = encoder
        self.dtype = dtype

    def forward(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """Last hidden states."""
        return self.encoder(tokens_BL).last_hidden_state.to(self.dtype)


class OneStepUNet(torch.nn.Module):
    """noise [B, C, H, W], context [B, L, D] -> x0 latents [B, C, H, W], float32, as the scheduler scales them.

    The combination stays in float32 inside a float16 graph: for eps, x0 = (z - s eps) / a amplifies the UNet's
    rounding s / a = 14.6 times at t = 999.
    """

    def __init__(self, unet: UNet2DConditionModel, step: OneStep) -> None:
        super().__init__()
        self.unet = unet
        self.step = step

    def forward(self, noise_BCHW: torch.Tensor, context_BLD: torch.Tensor) -> torch.Tensor:
        """One call of the UNet, then x0."""
        sample_BCHW = noise_BCHW.to(context_BLD.dtype)
        output_BCHW = self.unet(sample_BCHW, self.step.timestep, context_BLD, return_dict=False)[0].float()
        return x0_from(noise_BCHW, output_BCHW, self.step)


def x0_from(noise_BCHW: torch.Tensor, output_BCHW: torch.Tensor, step: OneStep) -> torch.Tensor:
    """x0 in float32; the formulas of hipa_deploy.one_step.predict_x0, their constants multiplied out."""
    a, s = step.alpha_bar**0.5, (1 - step.alpha_bar) ** 0.5
    if step.prediction_type == "epsilon":
        return noise_BCHW * (1 / a) - output_BCHW * (s / a)
    return a * noise_BCHW - s * output_BCHW if step.prediction_type == "v_prediction" else output_BCHW


class OneStepDecoder(torch.nn.Module):
    """x0 latents float32 [B, C, H, W] -> images uint8 [B, H, W, 3], through the VAE's decoder (changed in place)."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.decoder = vae.decoder
        fold_upsampling(self.decoder)
        self.offset = fold_decoder_input(vae)  # no buffer: it stays float32 when the module is halved

    def forward(self, latents_BCHW: torch.Tensor) -> torch.Tensor:
        """Decode and convert."""
        sample_BCHW = (latents_BCHW + self.offset).to(self.decoder.conv_in.weight.dtype)
        return to_uint8(self.decoder(sample_BCHW).float() / 2 + 0.5)


class TinyDecoder(torch.nn.Module):
    """The same through an AutoencoderTiny (changed in place), which takes latents as the scheduler scales them."""

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
    """noise, context -> images: UNet and decoder in one graph."""

    def __init__(self, unet: OneStepUNet, decoder: OneStepDecoder | TinyDecoder) -> None:
        super().__init__()
        self.unet = unet
        self.decoder = decoder

    def forward(self, noise_BCHW: torch.Tensor, context_BLD: torch.Tensor) -> torch.Tensor:
        """The whole of the image, given its context."""
        return self.decoder(self.unet(noise_BCHW, context_BLD))


class GenericUNet(torch.nn.Module):
    """The UNet as optimum names it: sample, timestep int64 [1], encoder_hidden_states -> out_sample."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample_BCHW: torch.Tensor, timestep: torch.Tensor, context_BLD: torch.Tensor) -> torch.Tensor:
        """The UNet's own output."""
        return self.unet(sample_BCHW, timestep, context_BLD, return_dict=False)[0]


class GenericDecoder(torch.nn.Module):
    """latent_sample [B, C, H, W] -> sample [B, 3, H, W] in [-1, 1]."""

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
) -> dict[str, StageSpec]:
    """Every stage's inputs and outputs: ``length`` tokens, text ``width``, sizes from ``step`` but for ``axes``.

    A bundle has some of them: 'generator' stands for UNet and decoder together.
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
    latent_BCHW, tokens_BL, context_BLD = (b, step.latent_shape[0], h, w), (b, length), (b, length, width)
    if layout == "onestep":
        context: _Row = ("context", real, context_BLD)
        noise: _Row = ("noise", "float32", latent_BCHW)
        latents: _Row = ("latents", "float32", latent_BCHW)
        images: _Row = ("images", "uint8", (b, height, wide, 3))
        rows: dict[str, tuple[_Row, ...]] = {
            "text_encoder": (("tokens", "int64", tokens_BL), context),
            "unet": (noise, context, latents),
            "vae_decoder": (latents, images),
            "generator": (noise, context, images),
        }
    else:
        rows = {
            "text_encoder": (("input_ids", "int64", tokens_BL), ("last_hidden_state", real, context_BLD)),
            "unet": (
                ("sample", real, latent_BCHW),
                ("timestep", "int64", (1,)),
                ("encoder_hidden_states", real, context_BLD),
                ("out_sample", real, latent_BCHW),
            ),
            "vae_decoder": (("latent_sample", real, latent_BCHW), ("sample", real, (b, 3, height, wide))),
        }
    return {name: _spec(name, axes, stage_rows) for name, stage_rows in rows.items()}


def _spec(name: str, axes: Mapping[str, Axis], rows: tuple[_Row, ...]) -> StageSpec:
    """A stage from its inputs and, last, its output, with the axes that they name."""
    tensors = tuple(TensorSpec(name=n, dtype=dtype, shape=shape) for n, dtype, shape in rows)
    named = {size: axes[size] for tensor in tensors for size in tensor.shape if isinstance(size, str)}
    return StageSpec(name=name, inputs=tensors[:-1], outputs=tensors[-1:], axes=named)

"""The stages as modules of flat tensors, with their specification. One list a layout; nothing else declares shapes."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel

from hipa_deploy.bundle import DType, Layout, OneStep, Precision, StageSpec, TensorSpec

TORCH_DTYPES = {
    "float16": torch.float16,
    "float32": torch.float32,
    "int64": torch.int64,
    "uint8": torch.uint8,
}


class TextEncoderStage(torch.nn.Module):
    """tokens int64 [B, L] -> context [B, L, D]."""

    def __init__(self, encoder: CLIPTextModel) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """Last hidden states."""
        return self.encoder(tokens_BL).last_hidden_state


class OneStepUNet(torch.nn.Module):
    """noise [B, C, H, W], context [B, L, D] -> x0 latents [B, C, H, W], unscaled as the decoder takes them.

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
        return x0_from(noise_BCHW, output_BCHW, self.step) / self.step.scaling_factor


def x0_from(noise_BCHW: torch.Tensor, output_BCHW: torch.Tensor, step: OneStep) -> torch.Tensor:
    """x0 in float32; the formulas of hipa_deploy.one_step.predict_x0."""
    a, s = step.alpha_bar**0.5, (1 - step.alpha_bar) ** 0.5
    if step.prediction_type == "epsilon":
        return (noise_BCHW - s * output_BCHW) / a
    return a * noise_BCHW - s * output_BCHW if step.prediction_type == "v_prediction" else output_BCHW


class OneStepDecoder(torch.nn.Module):
    """latents float32 [B, C, H, W] -> images uint8 [B, H, W, 3]."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.post_quant_conv = vae.post_quant_conv if vae.config.use_post_quant_conv else torch.nn.Identity()
        self.decoder = vae.decoder

    def forward(self, latents_BCHW: torch.Tensor) -> torch.Tensor:
        """Decode, scale to 0 … 255, round. The cast to uint8 must be the last node: TensorRT refuses it inside."""
        dtype = next(self.decoder.parameters()).dtype
        image_BCHW = self.decoder(self.post_quant_conv(latents_BCHW.to(dtype))).float()
        levels_BHWC = ((image_BCHW.clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1)
        return levels_BHWC.to(torch.uint8)


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


_Row = tuple[str, DType, tuple[int, ...]]


def stage_specs(
    layout: Layout, precision: Precision, batch: int, step: OneStep, length: int, width: int
) -> dict[str, StageSpec]:
    """Every stage's inputs and outputs: ``length`` tokens, text ``width``, sizes from ``step``."""
    real: DType = "float16" if precision == "fp16" else "float32"
    latent_BCHW, tokens_BL, context_BLD = (batch, *step.latent_shape), (batch, length), (batch, length, width)
    if layout == "onestep":
        context: _Row = ("context", real, context_BLD)
        latents: _Row = ("latents", "float32", latent_BCHW)
        specs = (
            _spec("text_encoder", ("tokens", "int64", tokens_BL), context),
            _spec("unet", ("noise", "float32", latent_BCHW), context, latents),
            _spec("vae_decoder", latents, ("images", "uint8", (batch, step.height, step.width, 3))),
        )
    else:
        sample_BCHW = (batch, 3, step.height, step.width)
        unet: tuple[_Row, ...] = (
            ("sample", real, latent_BCHW),
            ("timestep", "int64", (1,)),
            ("encoder_hidden_states", real, context_BLD),
            ("out_sample", real, latent_BCHW),
        )
        specs = (
            _spec("text_encoder", ("input_ids", "int64", tokens_BL), ("last_hidden_state", real, context_BLD)),
            _spec("unet", *unet),
            _spec("vae_decoder", ("latent_sample", real, latent_BCHW), ("sample", real, sample_BCHW)),
        )
    return {spec.name: spec for spec in specs}


def _spec(name: str, *rows: _Row) -> StageSpec:
    """A stage from its inputs and, last, its output."""
    tensors = tuple(TensorSpec(name=n, dtype=dtype, shape=shape) for n, dtype, shape in rows)
    return StageSpec(name=name, inputs=tensors[:-1], outputs=tensors[-1:])

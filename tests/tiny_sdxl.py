"""A complete SDXL of a few thousand random parameters: 16x16x4 latents, 64x64 images."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from tests.tiny_model import PROMPTS, tiny_tokenizer

FIRST_WIDTH = 16
SECOND_WIDTH = 24
POOLED = 20  # as wide as the second encoder in the published models, and told apart here


def make_sdxl(folder: Path, seed: int = 0, in_channels: int = 4) -> Path:
    """Write a StableDiffusionXLPipeline folder as Stability published theirs.

    It has two text encoders of different widths and two tokenizers that pad differently.

    Args:
        folder: where to write.
        seed: of the random weights.
        in_channels: of the UNet; 9 is a UNet made for inpainting.

    Returns:
        ``folder``.

    """
    torch.manual_seed(seed)
    shared = {
        "vocab_size": 514, "num_hidden_layers": 3, "num_attention_heads": 2,
        "bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513,
    }  # fmt: skip
    first = CLIPTextConfig(hidden_size=FIRST_WIDTH, intermediate_size=32, **shared)
    second = CLIPTextConfig(
        hidden_size=SECOND_WIDTH, intermediate_size=48, projection_dim=POOLED,
        hidden_act="gelu", **{**shared, "pad_token_id": 1},
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=in_channels, block_out_channels=(16, 32, 32),
        layers_per_block=1, norm_num_groups=4, cross_attention_dim=FIRST_WIDTH + SECOND_WIDTH,
        attention_head_dim=(2, 4, 4), transformer_layers_per_block=(1, 1, 1),
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=POOLED + 6 * 8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16), layers_per_block=1, norm_num_groups=4, sample_size=64,
        scaling_factor=0.13025, force_upcast=True,
    )  # fmt: skip
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
        timestep_spacing="leading", interpolation_type="linear",
    )  # fmt: skip
    tokenizer = tiny_tokenizer(folder.with_name(folder.name + "-tokenizer"))
    tokenizer_2 = tiny_tokenizer(folder.with_name(folder.name + "-tokenizer-2"))
    tokenizer_2.pad_token = "!"
    pipe = StableDiffusionXLPipeline(
        vae=vae, text_encoder=CLIPTextModel(first),
        text_encoder_2=CLIPTextModelWithProjection(second), tokenizer=tokenizer,
        tokenizer_2=tokenizer_2, unet=unet, scheduler=scheduler, add_watermarker=False,
    )  # fmt: skip
    pipe.save_pretrained(folder)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return folder

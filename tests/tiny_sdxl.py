"""A complete SDXL of a few thousand random parameters: 16x16x4 latents, 64x64 images.

Its layout, keys and arithmetic are those of the published stable-diffusion-xl-base-1.0. The
widths of the two text encoders and of the pooled vector all differ, so that one taken for another
does not fit.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from tests.tiny_model import PROMPTS, tiny_tokenizer
from tests.usual_layout import store_as_4

FIRST_WIDTH = 16  # 768 of SDXL
SECOND_WIDTH = 24  # 1280 of SDXL
POOLED = 20  # 1280 of SDXL
TIME_WIDTH = 8  # 256 of SDXL, for each of six numbers


def make_sdxl(
    folder: Path,
    seed: int = 0,
    in_channels: int = 4,
    *,
    prediction_type: str = "epsilon",
    vega: bool = False,
) -> Path:
    """Write a StableDiffusionXLPipeline folder as Stability published theirs.

    Args:
        folder: where to write.
        seed: of the random weights.
        in_channels: of the UNet; 9 is a UNet made for inpainting.
        prediction_type: what the UNet predicts.
        vega: a middle block of one ResNet block, as SSD-1B and Segmind-Vega have it.

    Returns:
        ``folder``.

    """
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=in_channels, block_out_channels=(16, 32, 32),
        layers_per_block=1, norm_num_groups=4, cross_attention_dim=FIRST_WIDTH + SECOND_WIDTH,
        attention_head_dim=(2, 4, 4), transformer_layers_per_block=(1, 1, 2),
        use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=TIME_WIDTH,
        projection_class_embeddings_input_dim=POOLED + 6 * TIME_WIDTH,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2D" if vega else "UNetMidBlock2DCrossAttn",
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16), layers_per_block=1, norm_num_groups=4, sample_size=64,
        scaling_factor=0.13025, force_upcast=True,
    )  # fmt: skip
    # The published file has the keys of a sampler that is not the one it names.
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        prediction_type=prediction_type, steps_offset=1, timestep_spacing="leading",
    )  # fmt: skip
    tokenizer = tiny_tokenizer(folder.with_name(folder.name + "-tokenizer"))
    files = folder.with_name(folder.name + "-tokenizer")
    tokenizer_2 = CLIPTokenizer(
        str(files / "vocab.json"), str(files / "merges.txt"), model_max_length=77, pad_token="!"
    )
    pipe = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text_config(FIRST_WIDTH, FIRST_WIDTH, "quick_gelu")),
        text_encoder_2=CLIPTextModelWithProjection(text_config(SECOND_WIDTH, POOLED, "gelu")),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=unet,
        scheduler=scheduler,
        add_watermarker=False,
    )
    pipe.save_pretrained(folder)
    store_as_4(folder)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    add_scheduler_keys(folder)
    return folder


def text_config(width: int, projected: int, activation: str) -> CLIPTextConfig:
    """A text encoder's configuration with the ids as published: ``eos_token_id`` 2 is not true.

    transformers then takes the pooled vector at the largest id, which is the end token's.
    """
    return CLIPTextConfig(
        vocab_size=514, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3,
        num_attention_heads=2, hidden_act=activation, projection_dim=projected,
        bos_token_id=0, eos_token_id=2, pad_token_id=1,
    )  # fmt: skip


def add_scheduler_keys(folder: Path) -> None:
    """Write the keys that the published scheduler file has beside those of its class."""
    path = folder / "scheduler" / "scheduler_config.json"
    published = {
        "clip_sample": False,
        "sample_max_value": 1.0,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
    }
    config = json.loads(path.read_text()) | published
    path.write_text(json.dumps(config, indent=2) + "\n")

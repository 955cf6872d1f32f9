"""Write a random-weight pipeline of Stable Diffusion's true shapes: what export and build cost depends on no more.

    python benchmarks/make_sd15.py --out /tmp/sd15
    hipa-export --model /tmp/sd15 --out /tmp/sd15-bundle --dtype fp16
    hipa-build /tmp/sd15-bundle --backend rtx

The tokenizer is the embedded model's. Weights are float16 on disk, 2.1 GB.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from hipa_deploy.embedded import MODEL


def new_pipeline() -> StableDiffusionPipeline:
    """SD 1.5's configurations with seeded random weights."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16)
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        sample_size=512,
    )
    text = CLIPTextConfig(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
    )
    encoder = CLIPTextModel(text)
    torch.set_default_dtype(torch.float32)
    return StableDiffusionPipeline(
        unet=unet,
        vae=vae,
        text_encoder=encoder,
        tokenizer=CLIPTokenizer.from_pretrained(MODEL, subfolder="tokenizer"),
        scheduler=DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def main(out: Annotated[Path, typer.Option(help="Folder to write.")]) -> None:
    """Write the pipeline."""
    new_pipeline().save_pretrained(out)


if __name__ == "__main__":
    typer.run(main)

"""Write a pipeline of Stable Diffusion's true shapes with random weights.

Purpose: a model for the other benchmarks that needs no download. The cost of an export or a build
depends on shapes, not on the values of weights.

Commands, from the repository's root::

    python benchmarks/make_model.py --size sd15 --out /tmp/sd15
    hipa-export --model /tmp/sd15 --out /tmp/sd15-bundle --dtype fp16
    hipa-build /tmp/sd15-bundle --backend rtx

Expected time: about a minute. The weights are float16 on disk, 2.1 to 2.6 GB.

The tokenizer is the embedded model's; OUT/tiny is an AutoencoderTiny of TAESD's shape.
"""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from hipa_deploy.embedded import MODEL

SD1 = {
    "unet": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "text": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    },
    "prediction_type": "epsilon",
}
SD2_UNET = {
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
SD2_TEXT = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
}
SIZES: dict[str, dict[str, Any]] = {
    "sd15": SD1,
    "sd21-base": {
        "unet": {"sample_size": 64, **SD2_UNET},
        "text": SD2_TEXT,
        "prediction_type": "epsilon",
    },
    "sd21": {
        "unet": {"sample_size": 96, "upcast_attention": True, **SD2_UNET},
        "text": SD2_TEXT,
        "prediction_type": "v_prediction",
    },
}
VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
}
# Typer offers the members of an enum as an option's choices.
Size = Enum("Size", {name: name for name in SIZES}, type=str)  # type: ignore[misc]


def new_pipeline(size: str, device: str = "cpu") -> StableDiffusionPipeline:
    """The published configurations of Runway and Stability AI, with seeded random weights.

    Args:
        size: a key of ``SIZES``.
        device: torch device that draws the weights, and holds them. A GPU draws in seconds what
            takes a CPU a minute.

    """
    torch.manual_seed(0)

    # The parts are made in float16 at once: float32 weights would take twice the memory first.
    torch.set_default_dtype(torch.float16)
    shapes = SIZES[size]
    with torch.device(device):
        unet = UNet2DConditionModel(**shapes["unet"])
        vae = AutoencoderKL(**VAE, sample_size=shapes["unet"]["sample_size"] * 8)
        encoder = CLIPTextModel(CLIPTextConfig(vocab_size=49408, **shapes["text"]))

    # The scheduler's tables are float32.
    torch.set_default_dtype(torch.float32)
    schedule = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
    }
    return StableDiffusionPipeline(
        unet=unet,
        vae=vae,
        text_encoder=encoder,
        tokenizer=CLIPTokenizer.from_pretrained(MODEL, subfolder="tokenizer"),
        scheduler=DDIMScheduler(prediction_type=shapes["prediction_type"], **schedule),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def main(
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    size: Annotated[Size, typer.Option(help="Whose shapes.")] = Size("sd15"),
) -> None:
    """Write the pipeline."""
    new_pipeline(size.value).save_pretrained(out)
    AutoencoderTiny().half().save_pretrained(out / "tiny")


if __name__ == "__main__":
    typer.run(main)

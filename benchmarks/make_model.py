"""Write a pipeline of Stable Diffusion's or SDXL's true shapes with random weights.

Purpose: a model for the other benchmarks that needs no download. The cost of an export or a build
depends on shapes, not on the values of weights.

Commands, from the repository's root::

    python benchmarks/make_model.py --size sd15 --out /tmp/sd15
    hipa-export --model /tmp/sd15 --out /tmp/sd15-bundle --dtype fp16
    hipa-build /tmp/sd15-bundle --backend rtx

Expected time: about a minute, three for SDXL. The weights are float16 on disk: 2.1 to 2.6 GB;
Segmind-Vega 3.3 GB, SSD-1B 4.5 GB, SDXL 6.9 GB. A part is freed before the next is made.

The tokenizer is the embedded model's, of SDXL's family CLIP's; OUT/tiny is an AutoencoderTiny of
TAESD's shape, which is TAESDXL's too.
"""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from hipa_deploy.embedded import MODEL
from hipa_deploy.models.configurations import write_config
from hipa_deploy.models.model_config import ModelConfig

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
# SDXL's family, whose configurations are the package's own.
PAIRS = ("vega", "ssd-1b", "sdxl")
# Typer offers the members of an enum as an option's choices.
Size = Enum("Size", {name: name for name in (*SIZES, *PAIRS)}, type=str)  # type: ignore[misc]


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


def random_part(kind: Any, config: Any, draws: np.random.Generator) -> Any:
    """A module of class ``kind`` in float16, with random weights of a size that keeps values small.

    Weights are uniform within the bounds of torch's own layers, 1 / sqrt(inputs). Norms keep
    what they get. This is faster than torch's way, which draws in float16.
    """
    with torch.device("meta"):
        module = kind(config) if isinstance(config, CLIPTextConfig) else kind.from_config(config)
    for part in module.modules():
        is_norm = isinstance(part, torch.nn.GroupNorm | torch.nn.LayerNorm)
        for name, tensor in part.named_parameters(recurse=False):
            value = torch.ones(tensor.shape, dtype=torch.float16)
            if not is_norm or name == "bias":
                bound = 0.02 if tensor.ndim < 2 else tensor[0].numel() ** -0.5
                drawn = draws.random(tensor.shape, dtype=np.float32)
                value = torch.from_numpy((2 * drawn - 1) * np.float32(bound)).half()
            setattr(part, name, torch.nn.Parameter(value, requires_grad=False))
    # The numbers of a CLIP's positions, its one buffer, are in no file.
    return module


def write_pair(size: str, out: Path) -> None:
    """Write a model of SDXL's family, part by part: its own configurations, random weights.

    Args:
        size: one of ``PAIRS``.
        out: the folder.

    """
    draws = np.random.default_rng(0)
    config = ModelConfig.read(write_config(size, out))
    first = CLIPTextConfig(**config.text_encoder)
    second = CLIPTextConfig(**config.text_encoder_2)
    parts: dict[str, tuple[Any, Any]] = {
        "text_encoder": (CLIPTextModel, first),
        "text_encoder_2": (CLIPTextModelWithProjection, second),
        "unet": (UNet2DConditionModel, config.unet),
        "vae": (AutoencoderKL, config.vae),
    }
    for name, (kind, values) in parts.items():
        # One file for each part, as they are published.
        random_part(kind, values, draws).save_pretrained(out / name, max_shard_size="20GB")


def main(
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    size: Annotated[Size, typer.Option(help="Whose shapes.")] = Size("sd15"),
) -> None:
    """Write the pipeline."""
    if size.value in PAIRS:
        write_pair(size.value, out)
    else:
        new_pipeline(size.value).save_pretrained(out)
    AutoencoderTiny().half().save_pretrained(out / "tiny")


if __name__ == "__main__":
    typer.run(main)

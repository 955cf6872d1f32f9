"""SDXL's UNet without its embedding path, compared with diffusers' UNet at true shapes.

Purpose: the largest difference in float32, on the published configuration with random weights.
Diffusers' UNet runs first, in its general form. Then the same module is cut as an export cuts it
(``hipa_deploy.export.graph.conditioning``) and runs again, on the conditioning that the text stage
would give. So the weights are in memory once: 10.3 GB for SDXL.

Command, from the repository's root::

    python benchmarks/cut_unet.py --size sdxl --latent 32

Expected time: two to five minutes for SDXL on two cores, most of which is drawing the weights.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from enum import Enum
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from diffusers import UNet2DConditionModel

sys.path.insert(0, str(Path(__file__).parent))
from make_model import PAIRS, random_part

from hipa_deploy.export.graph.conditioning import Conditioning, cut_conditioning
from hipa_deploy.models.configurations import write_config
from hipa_deploy.models.model_config import ModelConfig
from hipa_deploy.tasks import size_numbers

# Typer offers the members of an enum as an option's choices.
Size = Enum("Size", {name: name for name in PAIRS}, type=str)  # type: ignore[misc]
TIMESTEPS = (999, 249)
LIMIT = 1e-4


def new_unet(size: str) -> UNet2DConditionModel:
    """The published configuration with random weights that float16 holds, in float32."""
    with tempfile.TemporaryDirectory() as folder:
        config = ModelConfig.read(write_config(size, Path(folder) / size))
    unet = random_part(UNet2DConditionModel, config.unet, np.random.default_rng(0))
    # One weight at a time, so that float16 and float32 are never both whole in memory.
    for weight in unet.parameters():
        weight.data = weight.data.float()
    return unet.requires_grad_(False).eval()


@torch.no_grad()
def compare(unet: UNet2DConditionModel, latent: int, pixels: int) -> dict[str, float]:
    """Run the UNet in both forms, on a batch of two prompts at two timesteps; it is cut after.

    Args:
        unet: in float32.
        latent: height and width of the latents.
        pixels: height and width of the image that the six numbers speak of.

    Returns:
        'max_difference' over all outputs, and 'largest' of diffusers' own.

    """
    draws = torch.Generator().manual_seed(0)
    sample_BCHW = torch.randn(2, 4, latent, latent, generator=draws)
    context_BLD = torch.randn(2, 77, unet.config.cross_attention_dim, generator=draws)
    pooled_BP = torch.randn(2, 1280, generator=draws)
    numbers = size_numbers(pixels, pixels)
    added = {"text_embeds": pooled_BP, "time_ids": torch.tensor([numbers] * 2).float()}

    expected = []
    for timestep in TIMESTEPS:
        made = unet(sample_BCHW, timestep, context_BLD, added_cond_kwargs=added)
        expected.append(made.sample)

    conditioning_BSK = Conditioning(unet, TIMESTEPS, numbers)(pooled_BP)
    cut_conditioning(unet)
    differences = []
    for index, output_BCHW in enumerate(expected):
        made = unet(sample_BCHW, conditioning_BSK[:, index], context_BLD)
        differences.append(float((made.sample - output_BCHW).abs().max()))
    return {
        "max_difference": max(differences),
        "largest": max(float(output.abs().max()) for output in expected),
    }


def main(
    size: Annotated[Size, typer.Option(help="Whose UNet.")] = Size("sdxl"),
    latent: Annotated[int, typer.Option(help="Height and width of the latents.")] = 32,
    pixels: Annotated[int, typer.Option(help="Size that the UNet is told.")] = 1024,
) -> None:
    """Compare, print one line of JSON, and fail above 1e-4."""
    started = time.perf_counter()
    unet = new_unet(size.value)
    parameters = sum(weight.numel() for weight in unet.parameters())
    found = compare(unet, latent, pixels)
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    seconds = time.perf_counter() - started
    facts = {"size": size.value, "parameters": parameters, "latent": latent}
    print(json.dumps({**facts, **found, "peak_gb": round(peak_gb, 2), "seconds": round(seconds)}))
    if not found["max_difference"] <= LIMIT:
        raise SystemExit(f"the difference is above {LIMIT}")


if __name__ == "__main__":
    typer.run(main)

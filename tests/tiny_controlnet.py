"""A ControlNet of random weights for the tiny Stable Diffusion of ``tests.tiny_model``."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import ControlNetModel, UNet2DConditionModel


def make_controlnet(model: Path, folder: Path, seed: int = 0) -> Path:
    """Write a ControlNet whose outputs are not zero, as those of an untrained one are.

    Args:
        model: the base model's folder; its VAE reduces images 4 times.
        folder: where to write.
        seed: of the random weights.

    Returns:
        ``folder``.

    """
    torch.manual_seed(seed)
    unet = UNet2DConditionModel.from_pretrained(model / "unet")
    network = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16, 16))
    for name, weight in network.named_parameters():
        if name.startswith("controlnet_cond_embedding"):
            # Large and without biases: what it gives depends on the picture above all.
            torch.nn.init.normal_(weight, std=0.3 if name.endswith("weight") else 0)
        elif name.startswith(("controlnet_down_blocks", "controlnet_mid_block")):
            torch.nn.init.normal_(weight, std=0.1)
    network.save_pretrained(folder)
    return folder

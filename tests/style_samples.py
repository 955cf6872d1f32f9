"""LoRA and embedding files for a small model, random, in the layouts that people have."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextModel

TARGETS = ("to_q", "to_out.0", "ff.net.2", "conv1", "q_proj", "fc1")
RANK = 2


def write_lora(
    model_dir: Path,
    out: Path,
    *,
    seed: int,
    parts: Sequence[str] = ("unet", "text_encoder"),
    alpha: float = 1.0,
    kohya: bool = True,
) -> Path:
    """Write a LoRA of rank 2 for the model in ``model_dir``, in kohya's layout or diffusers'."""
    kinds = {"unet": UNet2DConditionModel, "text_encoder": CLIPTextModel}
    prefixes = {"unet": "lora_unet", "text_encoder": "lora_te"}
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for part in parts:
        model = kinds[part].from_pretrained(model_dir, subfolder=part)
        for name, module in model.named_modules():
            if not isinstance(module, nn.Linear | nn.Conv2d) or not name.endswith(TARGETS):
                continue
            key = f"{part}.{name}"
            ends = ("lora_A.weight", "lora_B.weight")
            if kohya:
                key = f"{prefixes[part]}_{name.replace('.', '_')}"
                ends = ("lora_down.weight", "lora_up.weight")
            outputs, *inputs = module.weight.shape
            ones = [1] * (len(inputs) - 1)
            down = torch.randn(RANK, *inputs, generator=generator) * 0.2
            up = torch.randn(outputs, RANK, *ones, generator=generator) * 0.2
            tensors[f"{key}.{ends[0]}"] = down
            tensors[f"{key}.{ends[1]}"] = up
            # diffusers refuses an alpha of its own layout: there it is the rank.
            if kohya:
                tensors[f"{key}.alpha"] = torch.tensor(alpha)
    save_file(tensors, out)
    return out


def write_embedding(out: Path, token: str, *, count: int, width: int = 16) -> Path:
    """Write a file as diffusers' script of textual inversion does."""
    generator = torch.Generator().manual_seed(count)
    save_file({token: torch.randn(count, width, generator=generator)}, out)
    return out

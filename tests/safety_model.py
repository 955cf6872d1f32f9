"""A safety checker of random weights and of the true architecture, only smaller."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPConfig, CLIPImageProcessor

SIDE = 28


def add_safety_checker(model: Path, *, threshold: float = 0.0, seed: int = 0) -> Path:
    """Write ``safety_checker`` and ``feature_extractor`` into a model's folder.

    Args:
        model: a diffusers folder.
        threshold: of every concept; random cosines lie between about -0.6 and 0.6.
        seed: of the weights.

    """
    torch.manual_seed(seed)
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": SIDE, "patch_size": 14,
    }  # fmt: skip
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=16))
    for part in checker.modules():
        if isinstance(part, torch.nn.Linear):
            torch.nn.init.normal_(part.weight, std=0.3)
    checker.concept_embeds.data = torch.randn(17, 16)
    checker.special_care_embeds.data = torch.randn(3, 16)
    checker.concept_embeds_weights.data = torch.full((17,), threshold)
    checker.special_care_embeds_weights.data = torch.full((3,), threshold)
    checker.save_pretrained(model / "safety_checker")
    processor = CLIPImageProcessor(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    )
    processor.save_pretrained(model / "feature_extractor")
    return model


def pictures(count: int, height: int = 40, width: int = 32, seed: int = 0) -> np.ndarray:
    """Smooth random pictures, uint8 [count, height, width, 3]."""
    numbers = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        waves = np.zeros((height, width, 3))
        for _ in range(4):
            down, across = numbers.normal(scale=0.3, size=2)
            phase = numbers.uniform(0, 6.28, 3)
            rows = np.arange(height)[:, None, None] * down
            columns = np.arange(width)[None, :, None] * across
            waves += numbers.normal(size=3) * np.sin(rows + columns + phase)
        found.append(np.clip(128 + 60 * waves, 0, 255).astype(np.uint8))
    return np.stack(found)

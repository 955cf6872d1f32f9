"""A safety checker of random weights and of the true architecture, small or of the true shapes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPConfig, CLIPImageProcessor

SIDE = 28
TRUE_SIDE = 224


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
    _write(checker, model, SIDE, threshold)
    return model


def add_true_shapes(model: Path) -> StableDiffusionSafetyChecker:
    """The same with the shapes of Stable Diffusion's checker, a ViT-L/14; and the checker itself.

    Args:
        model: a folder, which takes 1.2 GB.

    """
    torch.manual_seed(0)
    vision = {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
        "num_attention_heads": 16, "image_size": TRUE_SIDE, "patch_size": 14,
    }  # fmt: skip
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=768))
    _write(checker, model, TRUE_SIDE, threshold=0.0)
    return checker.eval()


def _write(checker: StableDiffusionSafetyChecker, model: Path, side: int, threshold: float) -> None:
    """Give the checker random concepts, and write it and its processor."""
    width = checker.concept_embeds.shape[1]
    checker.concept_embeds.data = torch.randn(17, width)
    checker.special_care_embeds.data = torch.randn(3, width)
    checker.concept_embeds_weights.data = torch.full((17,), threshold)
    checker.special_care_embeds_weights.data = torch.full((3,), threshold)
    checker.save_pretrained(model / "safety_checker")
    processor = CLIPImageProcessor(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )
    processor.save_pretrained(model / "feature_extractor")


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

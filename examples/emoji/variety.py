"""How much the images of one prompt differ, and how close they are to the training images.

Variety is the mean paired distance (hipa_deploy.train.evaluation.quality) between images of one
prompt from many noises. The scale is that of real pictures of the same caption: other emoji of the
same kind, in other places and sizes. A model that has learned one picture a caption by heart has a
variety of about 0.

The nearest training image is sought among random pictures of all training emoji, by the cosine
distance of pooled Lite0 features. Two sets of real pictures give the scale: other pictures of
training emoji, and pictures of held-out concepts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from augment import Pictures
from captions import COLOURS, LEVELS, STYLES, levels

from hipa_deploy.train.evaluation.quality import paired_distances

# Prompts of a level and seeds -> uint8 images [N, H, W, 3].
Sampler = Callable[[list[str], list[int]], np.ndarray]
# uint8 images [N, H, W, 3] -> features [N, D].
Features = Callable[[np.ndarray], torch.Tensor]


@dataclass(frozen=True)
class Theme:
    """A caption, the emoji that it stands for, and its background ('' is white)."""

    caption: str
    emoji: list[int]
    colour: str


def themes(pictures: Pictures, level: int, count: int, rng: np.random.Generator) -> list[Theme]:
    """Draw captions of a level, in all styles, half of them with a background's colour."""
    by_caption: dict[str, list[int]] = {}
    for number, row in enumerate(pictures.rows):
        caption = levels(row["style"], row["concept"], row["kind"])[level]
        by_caption.setdefault(caption, []).append(number)
    chosen = []
    for number, caption in enumerate(rng.permutation(sorted(by_caption))[:count]):
        emoji = by_caption[str(caption)]
        colour = COLOURS[rng.integers(len(COLOURS))] if number % 2 else ""
        row = pictures.rows[emoji[0]]
        full = levels(row["style"], row["concept"], row["kind"], colour)[level]
        chosen.append(Theme(full, emoji, colour))
    return chosen


def real_images(
    pictures: Pictures, theme: Theme, count: int, rng: np.random.Generator
) -> np.ndarray:
    """Random pictures that the caption is true of; an emoji occurs twice only if it must."""
    shuffled = rng.permutation(theme.emoji)
    return pictures.draw_batch(np.resize(shuffled, count), rng, theme.colour)[0]


def mean_distance(images_PMHWC: np.ndarray) -> float:
    """Mean paired distance of neighbours among the M images of each of P prompts."""
    others = np.roll(images_PMHWC, 1, axis=1)
    size = images_PMHWC.shape[2:]
    return float(
        paired_distances(images_PMHWC.reshape(-1, *size), others.reshape(-1, *size)).mean()
    )


def measure_variety(
    run: Path, sample: Sampler, prompts: int, noises: int
) -> dict[str, dict[str, float]]:
    """Variety of each level: of the model's images, and of real pictures."""
    pictures = Pictures(run, "train")
    rng = np.random.default_rng(0)
    rows = {}
    for level, name in enumerate(LEVELS):
        # A style caption with each background: there are only so many.
        count = min(prompts, len(STYLES) * (1 + len(COLOURS)))
        chosen = themes(pictures, level, count, rng)
        captions = [theme.caption for theme in chosen for _ in range(noises)]
        made = sample(captions, list(range(len(captions))))
        real = np.stack([real_images(pictures, theme, noises, rng) for theme in chosen])
        made_PMHWC = made.reshape(len(chosen), noises, *made.shape[1:])
        rows[name] = {
            "prompts": len(chosen),
            "model": mean_distance(made_PMHWC),
            "real": mean_distance(real),
        }
    return rows


def nearest(features_ND: torch.Tensor, training_ND: torch.Tensor) -> float:
    """Mean cosine distance to the nearest of the training images."""
    similarity = F.normalize(features_ND, dim=-1) @ F.normalize(training_ND, dim=-1).T
    return float((1 - similarity.max(dim=1).values).mean())


def measure_nearest(
    run: Path, made_NHWC: np.ndarray, features: Features, count: int = 256
) -> dict[str, float]:
    """Distance to the nearest training image: of made images, and of two real sets."""
    train = Pictures(run, "train")
    held_out = Pictures(run, "concept")
    rng = np.random.default_rng(1)
    training_ND = features(train.draw_batch(range(len(train)), rng, "")[0])
    again = rng.choice(len(train), min(count, len(train)), replace=False)
    unseen = rng.choice(len(held_out), min(count, len(held_out)), replace=False)
    return {
        "model": nearest(features(made_NHWC), training_ND),
        "training emoji, drawn again": nearest(
            features(train.draw_batch(again, rng, "")[0]), training_ND
        ),
        "held-out concepts": nearest(
            features(held_out.draw_batch(unseen, rng, "")[0]), training_ND
        ),
    }

"""A run's folder as examples/emoji/build_dataset.py writes it, with a few drawn shapes."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from augment import SPRITE
from captions import exact_caption

# style, concept, kind, split, mirror
ROWS = [
    ("3d", "red apple", "a fruit", "train", 1),
    ("flat", "red apple", "a fruit", "train", 1),
    ("3d", "pear", "a fruit", "train", 1),
    ("3d", "taxi", "a vehicle", "train", 0),
    ("noto", "left arrow", "an arrow", "concept", 0),
]


def one_sided_sprite() -> np.ndarray:
    """A red bar left of the middle, uint8 RGBA: mirrored it lies right of the middle."""
    sprite = np.zeros((SPRITE, SPRITE, 4), np.uint8)
    sprite[40:150, 40:80] = (255, 0, 0, 255)
    return sprite


def write_run(folder: Path) -> Path:
    """Write sprites.npy, emoji.npz and captions.csv."""
    folder.mkdir()
    np.save(folder / "sprites.npy", np.stack([one_sided_sprite()] * len(ROWS)))
    np.savez(folder / "emoji.npz", images=np.zeros((len(ROWS), 128, 128, 3), np.uint8))
    with (folder / "captions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["caption", "style", "concept", "group", "split", "kind", "mirror"])
        for style, concept, kind, split, mirror in ROWS:
            caption = exact_caption(style, concept)
            writer.writerow([caption, style, concept, "", split, kind, mirror])
    return folder

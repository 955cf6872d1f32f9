"""Draw an emoji into a picture of 128 pixels so that its captions stay true.

The emoji's place, size, angle and side (mirrored or not) vary, and so does the background: white,
or a shade of a colour that the caption names.
"""

from __future__ import annotations

import colorsys
import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from captions import COLOURS
from PIL import Image

SIZE = 128  # of the picture
SPRITE = 192  # of the emoji as stored: larger than the picture, so that rotating costs no sharpness
SCALES = (0.72, 1.0)  # of the emoji's square in the picture
MOST_DEGREES = 8.0
WHITE = 0.5  # share of pictures on white
# Hue (0 to 1), its spread, and the ranges of saturation and brightness. A caption says 'blue', so
# the shade is free.
_SHADES = {
    "blue": (0.59, 0.04, (0.35, 0.85), (0.75, 1.0)),
    "green": (0.36, 0.05, (0.35, 0.80), (0.65, 0.95)),
    "yellow": (0.14, 0.015, (0.45, 0.85), (0.92, 1.0)),
    "pink": (0.93, 0.02, (0.25, 0.55), (0.92, 1.0)),
    "purple": (0.76, 0.03, (0.35, 0.75), (0.60, 0.95)),
    "gray": (0.0, 0.5, (0.0, 0.04), (0.45, 0.80)),
}


@dataclass(frozen=True)
class Placement:
    """How an emoji is drawn.

    Attributes:
        colour: a name in COLOURS, or '' for white.
        shade: RGB of the background, 0 to 255.
        side: pixels of the emoji's square.
        left, top: where its square begins.
        degrees: its rotation.
        mirrored: whether left and right are exchanged.

    """

    colour: str
    shade: tuple[int, int, int]
    side: int
    left: int
    top: int
    degrees: float
    mirrored: bool


PLAIN = Placement("", (255, 255, 255), SIZE, 0, 0, 0.0, False)


def random_placement(
    rng: np.random.Generator, may_mirror: bool, colour: str | None = None
) -> Placement:
    """Draw a placement; the emoji's square stays inside the picture.

    Args:
        rng: draws everything.
        may_mirror: whether half of the placements are mirrored.
        colour: of the background, '' for white; None draws one.

    """
    if colour is None:
        colour = "" if rng.random() < WHITE else COLOURS[rng.integers(len(COLOURS))]
    side = round(SIZE * rng.uniform(*SCALES))
    left, top = (int(place) for place in rng.integers(SIZE - side + 1, size=2))
    degrees = float(rng.uniform(-MOST_DEGREES, MOST_DEGREES))
    mirrored = may_mirror and bool(rng.random() < 0.5)
    return Placement(colour, shade_of(colour, rng), side, left, top, degrees, mirrored)


def shade_of(colour: str, rng: np.random.Generator) -> tuple[int, int, int]:
    """A shade that one would call by this colour's name, as RGB from 0 to 255."""
    if not colour:
        return (255, 255, 255)
    hue, spread, saturation, brightness = _SHADES[colour]
    rgb = colorsys.hsv_to_rgb(
        (hue + rng.uniform(-spread, spread)) % 1.0,
        rng.uniform(*saturation),
        rng.uniform(*brightness),
    )
    red, green, blue = (round(255 * part) for part in rgb)
    return red, green, blue


def draw(sprite_HWC: np.ndarray, placement: Placement) -> np.ndarray:
    """Draw an emoji.

    Args:
        sprite_HWC: uint8 RGBA of SPRITE pixels.
        placement: where and on what.

    Returns:
        uint8 [128, 128, 3].

    """
    emoji = Image.fromarray(sprite_HWC)
    if placement.mirrored:
        emoji = emoji.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if placement.degrees:
        # Within its square: corners that leave it are cut, and emoji rarely reach into corners.
        emoji = emoji.rotate(placement.degrees, Image.Resampling.BICUBIC)
    emoji = emoji.resize((placement.side, placement.side), Image.Resampling.LANCZOS)
    picture = Image.new("RGBA", (SIZE, SIZE), placement.shade)
    picture.alpha_composite(emoji, (placement.left, placement.top))
    return np.asarray(picture.convert("RGB"))


class Pictures:
    """The emoji of a run that build_dataset.py wrote with --size 128, drawn on demand."""

    def __init__(self, run: Path, *splits: str) -> None:
        """Open the sprites of these splits; they stay on disk until they are drawn."""
        self._sprites_NHWC = np.load(run / "sprites.npy", mmap_mode="r")
        with (run / "captions.csv").open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        self._numbers = [i for i, row in enumerate(rows) if row["split"] in splits]
        self.rows = [rows[number] for number in self._numbers]

    def __len__(self) -> int:
        """The number of emoji."""
        return len(self.rows)

    def sprite(self, index: int) -> np.ndarray:
        """One emoji as it is stored, uint8 RGBA of SPRITE pixels."""
        return self._sprites_NHWC[self._numbers[index]]

    def draw(
        self, index: int, rng: np.random.Generator, colour: str | None = None
    ) -> tuple[np.ndarray, str]:
        """A random picture of one emoji, uint8 [128, 128, 3], and its background's colour."""
        placement = random_placement(rng, self.rows[index]["mirror"] == "1", colour)
        return draw(self.sprite(index), placement), placement.colour

    def draw_batch(
        self, indices: Iterable[int], rng: np.random.Generator, colour: str | None = None
    ) -> tuple[np.ndarray, list[str]]:
        """Random pictures of several emoji, uint8 [B, 128, 128, 3], and their colours."""
        pictures = []
        colours = []
        for index in indices:
            picture, name = self.draw(int(index), rng, colour)
            pictures.append(picture)
            colours.append(name)
        return np.stack(pictures), colours

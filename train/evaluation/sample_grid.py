"""Sample grids with headings: one row for each prompt, one column for each kind of image."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

GAP = 4  # pixels between cells
SMALLEST = 128  # a smaller image is enlarged, so that its column has room for a heading
TEXT_WIDTH = 200  # of the column of prompts
FONT_SIZE = 13
LINE = 17


def headed_grid(columns: Mapping[str, Tensor], prompts: Sequence[str], step: int) -> np.ndarray:
    """Lay out columns of images under their headings, with the prompt before each row.

    Small images are enlarged by a whole number, without smoothing.

    Args:
        columns: Heading -> images uint8 [N, H, W, 3], from left to right.
        prompts: The prompt of each row; an empty sequence leaves that column out.
        step: Of the training; the first heading says it.

    Returns:
        uint8 [height, width, 3].

    Example:
        >>> images = torch.zeros(2, 128, 128, 3, dtype=torch.uint8)
        >>> headed_grid({"teacher": images}, ["a cat", "a dog"], step=100).shape
        (310, 340, 3)

    """
    images = [column.numpy() for column in columns.values()]
    rows, height, width = images[0].shape[:3]
    factor = max(1, -(-SMALLEST // min(height, width)))
    cell_height = height * factor + GAP
    cell_width = width * factor + GAP
    left = TEXT_WIDTH + 2 * GAP if prompts else GAP

    # Two lines at the top: the step, then the headings.
    top = 2 * LINE + 2 * GAP
    size = (left + cell_width * len(images), top + cell_height * rows)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    write(pen, (GAP, GAP), f"step {step}")
    if prompts:
        write(pen, (GAP, GAP + LINE), "prompt")
    for number, (heading, column) in enumerate(zip(columns, images, strict=True)):
        x = left + cell_width * number
        write(pen, (x, GAP + LINE), heading)
        for row, image in enumerate(column):
            enlarged = Image.fromarray(image).resize(
                (width * factor, height * factor), Image.Resampling.NEAREST
            )
            sheet.paste(enlarged, (x, top + cell_height * row))
    for row, prompt in enumerate(prompts):
        y = top + cell_height * row
        for line in _lines(prompt, (cell_height - GAP) // LINE):
            write(pen, (GAP, y), line)
            y += LINE
    return np.asarray(sheet)


def _lines(prompt: str, most: int) -> list[str]:
    """The prompt in lines that fit the column; what does not fit becomes an ellipsis."""
    wide = int(TEXT_WIDTH / (0.6 * FONT_SIZE))
    return textwrap.wrap(prompt, wide, max_lines=max(1, most), placeholder=" …")


def write(pen: ImageDraw.ImageDraw, place: tuple[int, int], text: str) -> None:
    """Write one line of black text."""
    pen.text(place, text, fill="black", font=font())


@cache
def font() -> Any:
    """DejaVu Sans of matplotlib, which knows Latin, Greek, Cyrillic and more; else Pillow's own.

    Scripts that it does not know, such as Chinese, are drawn as boxes.
    """
    try:
        from matplotlib import get_data_path
    except ImportError:
        return ImageFont.load_default(FONT_SIZE)
    return ImageFont.truetype(Path(get_data_path()) / "fonts/ttf/DejaVuSans.ttf", FONT_SIZE)

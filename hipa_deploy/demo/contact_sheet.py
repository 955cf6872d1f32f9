"""The demo's picture: columns of images, a heading over each, the prompts at the left.

Shape suffixes: N images, H W image or sheet size, C three colours.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from hipa_deploy.disk.files import write_file
from hipa_deploy.images.png import grid, png_bytes

SHEET = "contact_sheet.png"
SHEET_ROWS = 8
ENLARGED = 2  # so that details can be compared

# Pixels of the labels, and characters of Pillow's default font that fit into them.
HEADING_HEIGHT = 18
PROMPT_WIDTH = 132
PROMPT_CHARACTERS = 22
LINE_HEIGHT = 12


def write_sheet(
    path: Path,
    columns: Mapping[str, np.ndarray],
    prompts: Sequence[str],
    *,
    rows: Sequence[int] | None = None,
    below: Image.Image | None = None,
) -> None:
    """Write a labelled sheet of at most ``SHEET_ROWS`` of the prompts, as PNG.

    Args:
        path: the file to write.
        columns: uint8 [N, H, W, 3] by heading, from left to right.
        prompts: N prompts, one a row.
        rows: which of the prompts are shown, from top to bottom; None spreads over them.
        below: a picture to lay under the table, as wide as it.

    """
    if rows is None:
        # Neighbours in the list are alike.
        step = max(1, len(prompts) // SHEET_ROWS)
        rows = range(0, len(prompts), step)
    places = list(rows)[:SHEET_ROWS]
    shown = {heading: images_NHWC[places] for heading, images_NHWC in columns.items()}
    texts = [prompts[place] for place in places]

    sheet_HWC = labelled_sheet(shown, texts)
    if below is not None:
        width = sheet_HWC.shape[1]
        height = round(below.height * width / below.width)
        small_HWC = np.asarray(below.convert("RGB").resize((width, height)))
        sheet_HWC = np.concatenate([sheet_HWC, small_HWC])
    write_file(path, png_bytes(sheet_HWC, {"columns": list(columns), "rows": texts}))


def labelled_sheet(columns: Mapping[str, np.ndarray], prompts: Sequence[str]) -> np.ndarray:
    """Images as a table: a heading over each column, the prompt at the left of each row.

    Args:
        columns: uint8 [N, H, W, 3] by heading, from left to right; each is enlarged. A heading may
            have several lines.
        prompts: N prompts.

    Returns:
        uint8 [height, width, 3], black on white.

    Example:
        >>> images_NHWC = np.zeros((2, 64, 64, 3), np.uint8)
        >>> labelled_sheet({"before": images_NHWC, "after": images_NHWC}, ["a cat", "a dog"]).shape
        (278, 392, 3)

    """
    # Whole pixels are repeated: nothing is smoothed that the viewer is to compare.
    enlarged = []
    for images_NHWC in columns.values():
        tall_NHWC = np.repeat(images_NHWC, ENLARGED, axis=1)
        enlarged.append(np.repeat(tall_NHWC, ENLARGED, axis=2))
    pictures_HWC = grid(enlarged)
    row_height = pictures_HWC.shape[0] // len(prompts)
    column_width = pictures_HWC.shape[1] // len(columns)

    lines = max(heading.count("\n") for heading in columns)
    heading_height = HEADING_HEIGHT + lines * LINE_HEIGHT
    height = heading_height + pictures_HWC.shape[0]
    width = PROMPT_WIDTH + pictures_HWC.shape[1]
    sheet = Image.new("RGB", (width, height), "white")
    sheet.paste(Image.fromarray(pictures_HWC), (PROMPT_WIDTH, heading_height))

    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default()
    draw.text((4, 3), "prompt", "black", font)
    for number, heading in enumerate(columns):
        left = PROMPT_WIDTH + number * column_width + 2
        for place, line in enumerate(heading.split("\n")):
            draw.text((left, 3 + place * LINE_HEIGHT), line, "black", font)
    for number, prompt in enumerate(prompts):
        top = heading_height + number * row_height + 4
        for line in textwrap.wrap(prompt, PROMPT_CHARACTERS):
            draw.text((4, top), line, "black", font)
            top += LINE_HEIGHT
    return np.asarray(sheet)

"""The demo's picture: columns of images, a heading over each, the prompts at the left.

A note may stand above the headings, and another picture to the right of the table.

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
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

# Pixels of the labels. Headings are smaller where a column is too narrow for them.
HEADING_SIZE = 20
TEXT_SIZE = 15
SMALLEST_SIZE = 8
HEADING_HEIGHT = 30
HEADING_LINE_HEIGHT = 24
LINE_HEIGHT = 19
PROMPT_WIDTH = 144
MARGIN = 4


def spread(count: int, most: int) -> list[int]:
    """Places of at most ``most`` of ``count`` things, at equal distances from the first on.

    Neighbours in a list of prompts are alike, and its end has other subjects than its beginning.

    Example:
        >>> spread(10, 4)
        [0, 2, 5, 7]

    """
    taken = min(count, most)
    return [number * count // taken for number in range(taken)]


def write_sheet(
    path: Path,
    columns: Mapping[str, np.ndarray],
    prompts: Sequence[str],
    *,
    rows: Sequence[int] | None = None,
    note: str = "",
    beside: Image.Image | None = None,
) -> None:
    """Write a labelled sheet of at most ``SHEET_ROWS`` of the prompts, as PNG.

    Args:
        path: the file to write.
        columns: uint8 [N, H, W, 3] by heading, from left to right.
        prompts: N prompts, one a row.
        rows: which of the prompts are shown, from top to bottom; None spreads over them.
        note: a text above the headings, such as how the prompts were chosen.
        beside: a picture to lay to the right of the table, at its top.

    """
    if rows is None:
        rows = spread(len(prompts), SHEET_ROWS)
    places = list(rows)[:SHEET_ROWS]
    shown = {heading: images_NHWC[places] for heading, images_NHWC in columns.items()}
    texts = [prompts[place] for place in places]

    sheet_HWC = labelled_sheet(shown, texts, note)
    if beside is not None:
        sheet_HWC = _side_by_side(sheet_HWC, np.asarray(beside.convert("RGB")))
    write_file(path, png_bytes(sheet_HWC, {"columns": list(columns), "rows": texts}))


def labelled_sheet(
    columns: Mapping[str, np.ndarray], prompts: Sequence[str], note: str = ""
) -> np.ndarray:
    """Images as a table: a heading over each column, the prompt at the left of each row.

    Args:
        columns: uint8 [N, H, W, 3] by heading, from left to right; each is enlarged. A heading may
            have several lines.
        prompts: N prompts.
        note: a text above the headings.

    Returns:
        uint8 [height, width, 3], black on white.

    Example:
        >>> images_NHWC = np.zeros((2, 64, 64, 3), np.uint8)
        >>> labelled_sheet({"before": images_NHWC, "after": images_NHWC}, ["a cat", "a dog"]).shape
        (290, 404, 3)

    """
    # Whole pixels are repeated: nothing is smoothed that the viewer is to compare.
    enlarged = []
    for images_NHWC in columns.values():
        tall_NHWC = np.repeat(images_NHWC, ENLARGED, axis=1)
        enlarged.append(np.repeat(tall_NHWC, ENLARGED, axis=2))
    pictures_HWC = grid(enlarged)
    row_height = pictures_HWC.shape[0] // len(prompts)
    column_width = pictures_HWC.shape[1] // len(columns)

    width = PROMPT_WIDTH + pictures_HWC.shape[1]
    font = ImageFont.load_default(TEXT_SIZE)
    note_lines = _wrapped(note, font, width)
    note_height = len(note_lines) * LINE_HEIGHT + MARGIN if note_lines else 0
    lines = max(heading.count("\n") for heading in columns)
    top = note_height + HEADING_HEIGHT + lines * HEADING_LINE_HEIGHT
    sheet = Image.new("RGB", (width, top + pictures_HWC.shape[0]), "white")

    draw = ImageDraw.Draw(sheet)
    _draw_lines(draw, (MARGIN, MARGIN), note_lines, font, LINE_HEIGHT)
    _draw_headings(draw, list(columns), note_height, column_width)
    for number, prompt in enumerate(prompts):
        place = (MARGIN, top + number * row_height + MARGIN)
        # A longer prompt would run into the next one.
        prompt_lines = _wrapped(prompt, font, PROMPT_WIDTH, row_height // LINE_HEIGHT)
        _draw_lines(draw, place, prompt_lines, font, LINE_HEIGHT)

    # After the labels, so that no label that is too long covers an image.
    sheet.paste(Image.fromarray(pictures_HWC), (PROMPT_WIDTH, top))
    return np.asarray(sheet)


def _draw_headings(
    draw: ImageDraw.ImageDraw, headings: Sequence[str], top: int, column_width: int
) -> None:
    """Draw the headings of the prompts and of each column, all in one size."""
    lines = [line for heading in headings for line in heading.split("\n")]
    font = _fitting_font(lines, column_width - 2 * MARGIN)
    draw.text((MARGIN, top + MARGIN), "prompt", "black", font)
    for number, heading in enumerate(headings):
        place = (PROMPT_WIDTH + number * column_width + MARGIN, top + MARGIN)
        _draw_lines(draw, place, heading.split("\n"), font, HEADING_LINE_HEIGHT)


def _draw_lines(
    draw: ImageDraw.ImageDraw,
    place: tuple[int, int],
    lines: Sequence[str],
    font: Font,
    line_height: int,
) -> None:
    """Draw lines one under another; ``place`` is the left and the top of the first."""
    left, top = place
    for number, line in enumerate(lines):
        draw.text((left, top + number * line_height), line, "black", font)


def _wrapped(text: str, font: Font, width: int, most: int | None = None) -> list[str]:
    """The lines of a text that is as wide as ``width`` pixels; at most ``most`` of them."""
    # An n is a little wider than letters are on average, and no narrower than a digit.
    characters = int((width - 2 * MARGIN) / font.getlength("n"))
    return textwrap.wrap(text, characters, max_lines=most, placeholder=" ...")


def _fitting_font(lines: Sequence[str], width: int) -> Font:
    """Pillow's own font, as large as the widest line allows."""
    for size in range(HEADING_SIZE, SMALLEST_SIZE, -1):
        font = ImageFont.load_default(size)
        if max(font.getlength(line) for line in lines) <= width:
            return font
    return ImageFont.load_default(SMALLEST_SIZE)


def _side_by_side(left_HWC: np.ndarray, right_HWC: np.ndarray) -> np.ndarray:
    """Two pictures, their upper edges in line, on white."""
    height = max(len(left_HWC), len(right_HWC))
    padded = []
    for picture_HWC in (left_HWC, right_HWC):
        missing = ((0, height - len(picture_HWC)), (0, 0), (0, 0))
        padded.append(np.pad(picture_HWC, missing, constant_values=255))
    return np.concatenate(padded, axis=1)

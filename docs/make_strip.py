"""Draw docs/images/one-step.png: one step of the base model, one of HiPA, 25 of the teacher.

    python docs/make_strip.py

All three rows start from the same noise: a column has one prompt and one seed. Needs the extra
``train``. The prompts are chosen to show all four styles; the ones with a star were held out from
every training. docs/explanation/measured.md has the numbers over all held-out prompts.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from hipa_deploy import embedded
from hipa_deploy.train.evaluation.quality import one_step_images, teacher_images
from hipa_deploy.train.recipes.recipe import TeacherSettings

OUT = Path(__file__).parent / "images/one-step.png"
PROMPTS = (
    "noto emoji of a lemon",
    "twemoji emoji of a strawberry",
    "3d emoji of a full moon",
    "flat emoji of a glowing star",
    "3d emoji of a turtle",
    "flat emoji of a pear",
    "flat emoji of cherries",
)
# As of hipa_deploy/embedded/model/README.md: DDIM, 25 steps, guidance 3.
TEACHER = TeacherSettings(sampler="ddim", steps=25, guidance=3.0, pairs=1)

SCALE = 2  # the model's images have 64 pixels
TILE = 64 * SCALE
GAP = 8
MARGIN = 12
LABELS = 150  # width of the column of row labels
HEADINGS = 50  # height of the row of prompts
INK = (24, 28, 36)
PALE = (96, 104, 118)
PAPER = (255, 255, 255)  # the images have white backgrounds; readable on a dark page too


def main() -> None:
    """Make the images and lay them out with headings."""
    prompts = list(PROMPTS)
    seeds = list(range(len(prompts)))
    rows = {
        ("Base model", "one step"): one_step_images(embedded.MODEL, None, prompts, seeds),
        ("HiPA", "one step"): one_step_images(embedded.MODEL, embedded.ADAPTOR, prompts, seeds),
        ("Teacher", "25 guided steps"): teacher_images(embedded.MODEL, prompts, seeds, TEACHER),
    }
    OUT.parent.mkdir(exist_ok=True)
    draw(rows).save(OUT, optimize=True)
    print(OUT)


def draw(rows: dict[tuple[str, str], np.ndarray]) -> Image.Image:
    """Lay out images uint8 [N, H, W, 3], one row for each (title, subtitle)."""
    columns = len(PROMPTS)
    width = 2 * MARGIN + LABELS + columns * (TILE + GAP) - GAP
    height = 2 * MARGIN + HEADINGS + len(rows) * (TILE + GAP) - GAP
    sheet = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(sheet)
    small = ImageFont.load_default(15)
    large = ImageFont.load_default(22)

    held_out = (embedded.MODEL / "prompts_pair.txt").read_text(encoding="utf-8").splitlines()
    for column, prompt in enumerate(PROMPTS):
        style, concept = prompt.split(" emoji of ")
        star = " *" if prompt in held_out else ""
        middle = MARGIN + LABELS + column * (TILE + GAP) + TILE // 2
        pen.text((middle, MARGIN), f"{style} emoji of", PALE, small, anchor="ma")
        pen.text((middle, MARGIN + 19), concept + star, INK, small, anchor="ma")

    for row, ((title, subtitle), images_NHWC) in enumerate(rows.items()):
        top = MARGIN + HEADINGS + row * (TILE + GAP)
        pen.text((MARGIN, top + TILE // 2 - 4), title, INK, large, anchor="ls")
        pen.text((MARGIN, top + TILE // 2 + 20), subtitle, PALE, small, anchor="ls")
        for column, image_HWC in enumerate(images_NHWC):
            tile = Image.fromarray(image_HWC).resize((TILE, TILE), Image.Resampling.LANCZOS)
            sheet.paste(tile, (MARGIN + LABELS + column * (TILE + GAP), top))
    return sheet


if __name__ == "__main__":
    main()

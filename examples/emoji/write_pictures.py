"""Write the training pictures as a folder of captioned images, for ``source.images`` of a recipe.

    python examples/emoji/write_pictures.py --run runs/emoji128 --out pictures

Each emoji fills its picture twice: on white, and on a colour that the caption names. So a caption
stands for one picture, but for the colour's shade.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from augment import PLAIN, Pictures, draw, shade_of
from captions import COLOURS, on_background
from PIL import Image
from rich.progress import track


def main(
    run: Annotated[Path, typer.Option(help="Folder of build_dataset.py, of 128 pixels.")],
    out: Annotated[Path, typer.Option(help="Folder to write; it must not exist.")],
    seed: Annotated[int, typer.Option(help="Draws the colours and their shades.")] = 20,
) -> None:
    """Write each training emoji on white and on a colour, with metadata.jsonl."""
    if out.exists():
        raise SystemExit(f"--out {out} exists already. Give a new folder.")
    pictures = Pictures(run, "train")
    rng = np.random.default_rng(seed)
    out.mkdir(parents=True)

    # All on white come first: a recipe's strengths take turns along the files' names.
    lines = []
    for number in track(range(len(pictures)), "on white"):
        caption = pictures.rows[number]["caption"]
        lines.append(
            _write(out, f"a{number:05d}.png", caption, draw(pictures.sprite(number), PLAIN))
        )
    for number in track(range(len(pictures)), "on colours"):
        colour = str(rng.choice(COLOURS))
        placement = replace(PLAIN, colour=colour, shade=shade_of(colour, rng))
        caption = on_background(pictures.rows[number]["caption"], colour)
        picture_HWC = draw(pictures.sprite(number), placement)
        lines.append(_write(out, f"b{number:05d}.png", caption, picture_HWC))
    (out / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    print(f"{out}: {len(lines):,} pictures")


def _write(out: Path, name: str, caption: str, picture_HWC: np.ndarray) -> str:
    """Write a picture, uint8 [H, W, 3], and return its line of metadata.jsonl."""
    Image.fromarray(picture_HWC).save(out / name)
    return json.dumps({"file_name": name, "text": caption}) + "\n"


if __name__ == "__main__":
    typer.run(main)

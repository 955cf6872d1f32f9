"""Render the images of a style that the embedded model does not know, with captions.

    npm install --ignore-scripts --prefix examples/style_lora
    pip install resvg-py==0.5.0
    python examples/style_lora/build_images.py --out runs/style

writes ``images``, the few images to train the LoRA on, with a ``metadata.jsonl`` of their captions;
and ``held_out``, images of all other concepts in the same style, to compare with. The style is
OpenMoji (https://openmoji.org, CC BY-SA 4.0): flat colours with black outlines.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image

# examples/ is no package: its folders are found by path.
sys.path.insert(0, str(Path(__file__).parents[1] / "emoji"))

from build_dataset import CONCEPTS, IconifySet, caption_of, fraction, on_white

MODULES = Path(__file__).parent / "node_modules"
STYLE = "flat"
# The few images of a style that a user has: chosen for variety.
FEW = """
cat face; fox; panda; penguin; turtle; butterfly; rose; palm tree; strawberry; banana; carrot; pizza
hamburger; birthday cake; rocket; sailboat; house; gem stone; grinning face; guitar
"""
TRAINED = {concept.strip() for concept in FEW.replace("\n", ";").split(";")} - {""}


def is_known(concept: str) -> bool:
    """Whether the embedded model was trained on the concept, in any of its own styles."""
    return concept == "red apple" or fraction("concept", concept) >= 0.12


def write_folder(folder: Path, concepts: list[str], icons: IconifySet) -> None:
    """Render these concepts as PNG files, with their captions in metadata.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for concept in concepts:
        name = concept.replace(" ", "-")
        image = icons.find(name)
        if image is None:
            raise SystemExit(f"OpenMoji has no icon {name!r}. Install the version of package.json.")
        Image.fromarray(on_white(image)).save(folder / f"{name}.png")
        row = {"file_name": f"{name}.png", "text": caption_of(STYLE, concept), "concept": concept}
        lines.append(json.dumps(row) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")


def main(
    out: Annotated[Path, typer.Option(help="Folder to write images/ and held_out/ to.")],
    modules: Annotated[Path, typer.Option(help="Where npm installed OpenMoji.")] = MODULES,
) -> None:
    """Render the images of the LoRA's training, and those of the other concepts."""
    path = modules / "@iconify-json/fluent-emoji-high-contrast/icons.json"
    if not path.is_file():
        folder = Path(__file__).parent
        raise SystemExit(
            f"{path} does not exist. Run: npm install --ignore-scripts --prefix {folder}"
        )
    icons = IconifySet(path)
    known = sorted(concept for concept in CONCEPTS if is_known(concept))
    held_out = [concept for concept in known if concept not in TRAINED]
    write_folder(out / "images", sorted(TRAINED), icons)
    write_folder(out / "held_out", held_out, icons)
    print(f"{len(TRAINED)} images to train on, {len(held_out)} to compare with -> {out}")


if __name__ == "__main__":
    typer.run(main)

"""Render images of a style that the embedded model does not know, with captions.

    npm install --ignore-scripts --prefix examples/style_lora
    pip install resvg-py==0.5.0
    python examples/style_lora/build_images.py --out runs/style

writes these:

- ``images``: the few images to train the LoRA on, with a ``metadata.jsonl`` of their captions.
- ``held_out``: images of other concepts, to compare with, in the same form.
- ``rest``: the images of the concepts that are left, which say what the style looks like.
- ``prompts.txt``: prompts for a training of HiPA, without the concepts of ``held_out``.

The style is Fluent Emoji High Contrast (Microsoft, MIT): thick black shapes on white. The captions
name the nearest style that the model knows, 'flat': a word that it does not know would change what
it draws, since its text encoder has seen few words.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image

ROOT = Path(__file__).parents[2]
# examples/ is no package: its folders are found by path.
sys.path.insert(0, str(ROOT / "examples/emoji"))

from build_dataset import CONCEPTS, IconifySet, fraction, split_of  # noqa: E402
from captions import COLOURS, exact_caption, on_background  # noqa: E402

ICONS = "@iconify-json/fluent-emoji-high-contrast/icons.json"
MODULES = Path(__file__).parent / "node_modules"
PROMPTS = ROOT / "hipa_deploy/embedded/model/prompts_words.txt"
WORD = "flat"  # the style's name in the captions
HELD_OUT = 48  # concepts to measure on

# The few images that a user has of a style, chosen by hand for variety.
FEW = """
cat face; fox; panda; penguin; turtle; butterfly; rose; palm tree; strawberry; banana; carrot; pizza
hamburger; birthday cake; rocket; sailboat; house; gem stone; grinning face; guitar
"""
TRAINED = {concept.strip() for concept in FEW.replace("\n", ";").split(";")} - {""}


def known_concepts() -> list[str]:
    """The concepts that the embedded model was trained on, in one of its styles or more."""
    return sorted(concept for concept in CONCEPTS if split_of(WORD, concept) != "concept")


def held_out_concepts() -> list[str]:
    """The concepts to measure on: known to the model, and not among the LoRA's images."""
    left = [concept for concept in known_concepts() if concept not in TRAINED]
    # By a hash of the names: an arbitrary choice that is the same everywhere.
    return sorted(sorted(left, key=lambda concept: fraction("style lora", concept))[:HELD_OUT])


def on_white(image: Image.Image) -> Image.Image:
    """RGBA -> RGB of the same size, on white."""
    paper = Image.new("RGBA", image.size, "white")
    paper.alpha_composite(image.convert("RGBA"))
    return paper.convert("RGB")


def write_folder(folder: Path, concepts: list[str], icons: IconifySet) -> None:
    """Render these concepts as PNG files, with their captions in metadata.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for concept in concepts:
        name = concept.replace(" ", "-")
        image = icons.find(name)
        if image is None:
            raise SystemExit(f"there is no icon {name!r}. Install the version of package.json.")
        on_white(image).save(folder / f"{name}.png")
        row = {"file_name": f"{name}.png", "text": exact_caption(WORD, concept)}
        lines.append(json.dumps(row) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")


def training_prompts(held_out: list[str]) -> list[str]:
    """The model's prompts of the captions' style, without those of the concepts to measure on."""
    left_out = set()
    for concept in held_out:
        caption = exact_caption(WORD, concept)
        left_out.update(on_background(caption, colour) for colour in ("", *COLOURS))
    prompts = PROMPTS.read_text(encoding="utf-8").splitlines()
    return [
        prompt
        for prompt in prompts
        if prompt.startswith(f"{WORD} emoji of ") and prompt not in left_out
    ]


def main(
    out: Annotated[Path, typer.Option(help="Folder to write into.")],
    modules: Annotated[Path, typer.Option(help="Where npm installed the icons.")] = MODULES,
) -> None:
    """Render the images of the LoRA's training, and those to compare with."""
    if not (modules / ICONS).is_file():
        raise SystemExit(
            f"{modules / ICONS} does not exist. "
            f"Run: npm install --ignore-scripts --prefix {Path(__file__).parent}"
        )
    icons = IconifySet(modules / ICONS)
    held_out = held_out_concepts()
    rest = [concept for concept in known_concepts() if concept not in {*TRAINED, *held_out}]
    write_folder(out / "images", sorted(TRAINED), icons)
    write_folder(out / "held_out", held_out, icons)
    write_folder(out / "rest", rest, icons)

    prompts = training_prompts(held_out)
    (out / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    counts = f"{len(TRAINED)} images to train on, {len(held_out)} to compare with"
    print(f"{counts}, {len(rest)} others, {len(prompts)} prompts -> {out}")


if __name__ == "__main__":
    typer.run(main)

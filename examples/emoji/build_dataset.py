"""Build the captioned emoji set that the embedded model is trained on.

    npm install --ignore-scripts --prefix examples/emoji
    python examples/emoji/build_dataset.py --out runs/emoji

writes ``emoji.npz`` (``images`` uint8 [N, 64, 64, 3], white background) and ``captions.csv`` (a row
for each image: caption, style, concept, group, split).

The split is a function of the names alone, so every rebuild agrees. Rows of the split ``concept``
have concepts that are trained on in no style. Rows of the split ``pair`` have a concept that is
trained on in the other styles only. The others are ``train``.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import resvg_py
import typer
from PIL import Image
from rich.progress import track

MODULES = Path(__file__).parent / "node_modules"
SIZE = 64
RENDER_SIZE = 256  # rendered large, then reduced with Lanczos: cleaner edges than at 64 pixels
ICONIFY_STYLES = {"flat": "fluent-emoji-flat", "noto": "noto", "twemoji": "twemoji"}
STYLES = ("3d", *ICONIFY_STYLES)

# The domain: few enough for a small model to learn each one, and different enough for a person to
# distinguish them at 64 pixels.
DOMAIN = """
grinning face; face with tears of joy; winking face; smiling face with hearts
smiling face with heart eyes
star struck; thinking face; sleeping face; hot face; cold face; cowboy hat face
smiling face with sunglasses
angry face; crying face; smiling face with horns; skull; clown face; ghost; alien; robot
pile of poo; jack o lantern
red heart; orange heart; yellow heart; green heart; blue heart; purple heart; black heart
monkey face; gorilla; dog face; cat face; fox; raccoon; lion; tiger face; horse face; unicorn
zebra; cow face
pig face; mouse face; hamster; rabbit face; bear; koala; panda; frog; chicken; baby chick; penguin
owl; eagle
parrot; duck; swan; flamingo; peacock; crocodile; turtle; snake; dragon; spouting whale; dolphin
fish
tropical fish; blowfish; shark; octopus; snail; butterfly; spider; crab; shrimp; squid; elephant
camel; giraffe
bat; hedgehog; jellyfish; spiral shell; honeybee
bouquet; rose; tulip; sunflower; hibiscus; blossom; cherry blossom; evergreen tree; deciduous tree
palm tree; cactus
four leaf clover; maple leaf; mushroom; seedling
red apple; green apple; grapes; watermelon; tangerine; lemon; banana; pineapple; mango; pear
peach; cherries
strawberry; blueberries; kiwi fruit; tomato; coconut; avocado; eggplant; carrot; hot pepper
cucumber; broccoli; bread
croissant; pretzel; pancakes; cheese wedge; meat on bone; poultry leg; bacon; hamburger
french fries; pizza; hot dog
sandwich; taco; egg; popcorn; rice ball; spaghetti; sushi; soft ice cream; doughnut; cookie
birthday cake; shortcake
cupcake; chocolate bar; lollipop; honey pot; wine glass; cocktail glass; tropical drink; beer mug
rocket; bus; ambulance; fire engine; taxi; automobile; delivery truck; tractor; racing car
bicycle; sailboat
airplane; helicopter; house; castle; full moon; crescent moon; sun; ringed planet; star
glowing star; cloud
rainbow; umbrella; high voltage; snowflake; snowman; fire; droplet; christmas tree; balloon
wrapped gift; trophy
soccer ball; basketball; volleyball; american football; baseball; pool 8 ball; crystal ball
game die; teddy bear
artist palette; crown; top hat; t shirt; jeans; glasses; running shoe; ring; gem stone; bell
musical note; guitar
trumpet; violin; drum; mobile phone; laptop; television; camera; light bulb; candle; closed book
green book
blue book; money bag; pencil; scissors; locked; key; hammer; magnet; alarm clock; hourglass done
"""
CONCEPTS = {concept.strip() for concept in DOMAIN.replace("\n", ";").split(";")} - {""}
ALWAYS_TRAINED = {"red apple"}  # the documentation's example


class Sample(NamedTuple):
    """A line of captions.csv: an image's caption, and where the image belongs."""

    caption: str
    style: str
    concept: str
    group: str
    split: str


def fraction(*names: str) -> float:
    """A reproducible number in [0, 1) that depends on nothing but the names."""
    digest = hashlib.sha256("\0".join(names).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def split_of(style: str, concept: str) -> str:
    """'concept' (12 % of concepts), 'pair' (one style of a quarter of the others) or 'train'."""
    if concept in ALWAYS_TRAINED:
        return "train"
    if fraction("concept", concept) < 0.12:
        return "concept"
    if fraction("pair", concept) < 0.25 and style == STYLES[int(4 * fraction("style", concept))]:
        return "pair"
    return "train"


def caption_of(style: str, concept: str) -> str:
    """'3d', 'red apple' -> '3d emoji of a red apple'; plurals take no article."""
    plural = concept.endswith("s") and not concept.endswith(("ss", "us", "is"))
    article = "" if plural else "an " if concept[0] in "aeiou" else "a "
    return f"{style} emoji of {article}{concept}"


def concepts(modules: Path) -> Iterator[tuple[str, str, str, str]]:
    """Yield (character, Iconify key, readable concept, Unicode group) of the domain's emoji."""
    names = json.loads((modules / "emojilib/dist/emoji-en-US.json").read_text(encoding="utf-8"))
    unicode = json.loads(
        (modules / "unicode-emoji-json/data-by-emoji.json").read_text(encoding="utf-8")
    )
    for character, words in names.items():
        entry = unicode.get(character)
        concept = words[0].replace("_", " ").replace("-", " ").lower()
        if entry and concept in CONCEPTS:
            yield character, words[0].replace("_", "-"), concept, entry["group"]


def on_white(image: Image.Image) -> np.ndarray:
    """RGBA of any size -> uint8 [64, 64, 3], aspect kept, centred on white."""
    image = image.convert("RGBA")
    side = max(image.size)
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(image, ((side - image.width) // 2, (side - image.height) // 2))
    return np.asarray(square.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS))


def render_svg(body: str, width: int, height: int) -> Image.Image:
    """An Iconify icon's body, drawn in a view box of this size, as RGBA of RENDER_SIZE pixels."""
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{body}</svg>'
    png = resvg_py.svg_to_bytes(svg_string=svg, width=RENDER_SIZE, height=RENDER_SIZE)
    return Image.open(io.BytesIO(bytes(png)))


class IconifySet:
    """One ``icons.json``: SVG bodies by name.

    An alias that only names another icon is followed; one that flips or rotates it is skipped.
    """

    def __init__(self, path: Path) -> None:
        data = json.loads(path.read_text(encoding="utf-8"))
        self.icons = data["icons"]
        self.aliases = data.get("aliases", {})
        self.width = data.get("width", 16)
        self.height = data.get("height", 16)

    def find(self, key: str) -> Image.Image | None:
        """The icon of this name or alias, rendered; None if the set has none."""
        alias = self.aliases.get(key)
        if alias and alias.keys() <= {"parent"}:
            key = alias["parent"]
        icon = self.icons.get(key)
        if icon is None:
            return None
        width = icon.get("width", self.width)
        height = icon.get("height", self.height)
        return render_svg(icon["body"], width, height)


def find_3d(assets: Path, character: str) -> Image.Image | None:
    """The Fluent 3D image of an emoji; None if there is none."""
    # The files are named by code points, with or without the variation selector FE0F.
    points = [f"{ord(letter):04x}" for letter in character]
    without_selector = [point for point in points if point != "fe0f"]
    for parts in (points, without_selector, [*points, "fe0f"]):
        name = "-".join(parts)
        path = assets / f"{name}.webp"
        if path.exists():
            return Image.open(path)
    return None


def render_all(modules: Path) -> Iterator[tuple[Sample, np.ndarray]]:
    """Yield each concept in all four styles, uint8 [64, 64, 3]."""
    sets = {}
    for style, name in ICONIFY_STYLES.items():
        sets[style] = IconifySet(modules / f"@iconify-json/{name}/icons.json")
    assets = modules / "@lobehub/fluent-emoji-3d/assets"
    for character, key, concept, group in track(list(concepts(modules)), "rendering"):
        images = {"3d": find_3d(assets, character)}
        for style, icons in sets.items():
            images[style] = icons.find(key)

        # Four styles or none: held-out pairs need the concept in the other styles.
        if any(image is None for image in images.values()):
            continue
        for style, image in images.items():
            sample = Sample(
                caption_of(style, concept), style, concept, group, split_of(style, concept)
            )
            yield sample, on_white(image)


def main(
    out: Annotated[Path, typer.Option(help="Folder to write emoji.npz and captions.csv to.")],
    modules: Annotated[
        Path, typer.Option(help="Where npm installed the emoji packages.")
    ] = MODULES,
) -> None:
    """Render the emoji set in four styles at 64x64 pixels, with captions."""
    if not modules.is_dir():
        raise SystemExit(
            f"{modules} does not exist. Run: npm install --ignore-scripts --prefix {modules.parent}"
        )

    samples, images = zip(*render_all(modules), strict=True)
    out.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(out / "emoji.npz", images=np.stack(images))
    with (out / "captions.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(Sample._fields)
        writer.writerows(samples)

    splits = [sample.split for sample in samples]
    counts = {split: splits.count(split) for split in ("train", "pair", "concept")}
    found = {sample.concept for sample in samples}
    print(f"{len(samples)} images, {len(found)} concepts, {counts} -> {out}")


if __name__ == "__main__":
    typer.run(main)

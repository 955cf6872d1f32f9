"""Build the captioned emoji set that the embedded model is trained on.

    npm install --ignore-scripts --prefix examples/emoji
    python examples/emoji/build_dataset.py --out runs/emoji

writes ``emoji.npz`` (``images`` uint8 [N, 64, 64, 3], white background) and ``captions.csv`` (a row
for each image: caption, style, concept, group, split, kind, mirror).

With ``--size 128`` it takes every emoji that any of the four sets has, not only the domain below,
and also writes ``sprites.npy`` (uint8 [N, 192, 192, 4], RGBA): augment.py draws them into pictures.

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
import typer
from augment import PLAIN, SPRITE, draw
from augment import SIZE as LARGE
from captions import KIND_BY_SUBGROUP, STYLES, exact_caption, may_mirror
from PIL import Image
from rich.progress import track

MODULES = Path(__file__).parent / "node_modules"
SMALL = 64  # pixels of the first embedded model
RENDER_SIZE = 256  # rendered large, then reduced with Lanczos: cleaner edges than at 64 pixels
ICONIFY_STYLES = {"flat": "fluent-emoji-flat", "noto": "noto", "twemoji": "twemoji"}

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
    """A line of captions.csv: an image's exact caption, and where the image belongs."""

    caption: str
    style: str
    concept: str
    group: str
    split: str
    kind: str
    mirror: int


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


class Emoji(NamedTuple):
    """One emoji, whatever its style: its character, Iconify key, readable name and place."""

    character: str
    key: str
    concept: str
    group: str
    kind: str


def all_emoji(modules: Path) -> Iterator[Emoji]:
    """Yield every emoji without a skin tone."""
    names = json.loads((modules / "emojilib/dist/emoji-en-US.json").read_text(encoding="utf-8"))
    unicode = json.loads(
        (modules / "unicode-emoji-json/data-by-emoji.json").read_text(encoding="utf-8")
    )
    listed = json.loads((modules / "emoji.json/emoji.json").read_text(encoding="utf-8"))
    # The lists differ in the variation selector FE0F.
    subgroups = {entry["char"].replace("\ufe0f", ""): entry["subgroup"] for entry in listed}
    for character, words in names.items():
        entry = unicode.get(character)
        subgroup = subgroups.get(character.replace("\ufe0f", ""))
        concept = words[0].replace("_", " ").replace("-", " ").lower().strip()
        if entry and subgroup and concept:
            key = words[0].replace("_", "-")
            yield Emoji(character, key, concept, entry["group"], KIND_BY_SUBGROUP[subgroup])


def squared(image: Image.Image, side: int) -> np.ndarray:
    """RGBA of any size -> uint8 [side, side, 4], aspect kept, centred on nothing."""
    image = image.convert("RGBA")
    longest = max(image.size)
    square = Image.new("RGBA", (longest, longest))
    square.alpha_composite(image, ((longest - image.width) // 2, (longest - image.height) // 2))
    return np.asarray(square.resize((side, side), Image.Resampling.LANCZOS))


def on_white(image: Image.Image) -> np.ndarray:
    """RGBA of any size -> uint8 [64, 64, 3], aspect kept, centred on white."""
    image = image.convert("RGBA")
    side = max(image.size)
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(image, ((side - image.width) // 2, (side - image.height) // 2))
    return np.asarray(square.convert("RGB").resize((SMALL, SMALL), Image.Resampling.LANCZOS))


def render_svg(body: str, width: int, height: int) -> Image.Image:
    """An Iconify icon's body, drawn in a view box of this size, as RGBA of RENDER_SIZE pixels."""
    # Imported here: the names and splits of this module are of use without it.
    import resvg_py

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


def render_all(modules: Path, chosen: list[Emoji]) -> Iterator[dict[str, Image.Image]]:
    """Yield each emoji's images by style, RGBA; a style that lacks it is not there."""
    sets = {}
    for style, name in ICONIFY_STYLES.items():
        sets[style] = IconifySet(modules / f"@iconify-json/{name}/icons.json")
    assets = modules / "@lobehub/fluent-emoji-3d/assets"
    for emoji in track(chosen, "rendering"):
        found = {"3d": find_3d(assets, emoji.character)}
        for style, icons in sets.items():
            found[style] = icons.find(emoji.key)
        yield {style: image for style, image in found.items() if image is not None}


def sample_of(emoji: Emoji, style: str) -> Sample:
    """The line of captions.csv for this emoji in this style."""
    return Sample(
        exact_caption(style, emoji.concept),
        style,
        emoji.concept,
        emoji.group,
        split_of(style, emoji.concept),
        emoji.kind,
        int(may_mirror(emoji.concept, emoji.kind)),
    )


def small_set(modules: Path, out: Path) -> list[Sample]:
    """Write emoji.npz of the domain at 64 pixels."""
    chosen = [emoji for emoji in all_emoji(modules) if emoji.concept in CONCEPTS]
    samples = []
    images = []
    for emoji, found in zip(chosen, render_all(modules, chosen), strict=True):
        # Four styles or none: held-out pairs need the concept in the other styles.
        if len(found) == len(STYLES):
            for style, image in found.items():
                samples.append(sample_of(emoji, style))
                images.append(on_white(image))
    np.savez_compressed(out / "emoji.npz", images=np.stack(images))
    return samples


def large_set(modules: Path, out: Path) -> list[Sample]:
    """Write sprites.npy of every emoji, and emoji.npz: each on white, filling the 128 pixels."""
    chosen = list(all_emoji(modules))
    samples = []
    sprites = []
    for emoji, found in zip(chosen, render_all(modules, chosen), strict=True):
        for style, image in found.items():
            samples.append(sample_of(emoji, style))
            sprites.append(squared(image, SPRITE))
    np.save(out / "sprites.npy", np.stack(sprites))
    np.savez_compressed(out / "emoji.npz", images=np.stack([draw(one, PLAIN) for one in sprites]))
    return samples


def main(
    out: Annotated[Path, typer.Option(help="Folder to write emoji.npz and captions.csv to.")],
    modules: Annotated[
        Path, typer.Option(help="Where npm installed the emoji packages.")
    ] = MODULES,
    size: Annotated[int, typer.Option(help="Pixels: 64 or 128.")] = SMALL,
) -> None:
    """Render the emoji set in four styles, with captions."""
    if not modules.is_dir():
        raise SystemExit(
            f"{modules} does not exist. Run: npm install --ignore-scripts --prefix {modules.parent}"
        )
    if size not in (SMALL, LARGE):
        raise SystemExit(f"--size {size} is not possible. Give {SMALL} or {LARGE}.")

    out.mkdir(parents=True, exist_ok=True)
    samples = small_set(modules, out) if size == SMALL else large_set(modules, out)
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

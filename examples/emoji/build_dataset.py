"""Build the captioned emoji set that the embedded model is trained on.

    npm install --ignore-scripts --prefix examples/emoji
    python examples/emoji/build_dataset.py --out runs/emoji

writes ``emoji.npz`` (``images`` uint8 [N, 64, 64, 3], white background) and ``captions.csv`` (one row per
image: caption, style, concept, group, split). The split is a function of the names alone, so every rebuild
agrees: ``concept`` rows are concepts never trained on in any style; ``pair`` rows are (style, concept) pairs
whose concept is trained on in the other styles only.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import resvg_py
import typer
from PIL import Image
from rich.progress import track

SIZE = 64
RENDER_SIZE = 256  # rendered large, then reduced with Lanczos: cleaner edges than rendering at 64 px
ICONIFY_STYLES = {"flat": "fluent-emoji-flat", "noto": "noto", "twemoji": "twemoji"}
STYLES = ("3d", *ICONIFY_STYLES)

# The domain: animals, plants and food whole, less a few that are scenes or hard to tell at 64 px ...
WHOLE_GROUPS = ("Animals & Nature", "Food & Drink")
EXCLUDED = re.compile(
    r"^(guide|service) dog|globe|moon|sun\b|cloud|star|fog|wind|cyclone|tornado|wave|comet|collision|dizzy|dashing"
    r"|sweat|stuffed flat|oden|falafel|microbe|amphora|canned|shallow|takeout|mate$|tumbler|beverage|rice cracker"
    r"|fish cake"
    r"|bento|moon cake|^ice$|spider web|paw prints|lady beetle|ewe|worm|hut|rock|wood"
)
# ... and, of faces, things and vehicles, these.
CHOSEN = """
grinning face; beaming face with smiling eyes; face with tears of joy; slightly smiling face; winking face
smiling face with halo; smiling face with hearts; smiling face with heart eyes; star struck; face blowing a kiss
face with tongue; money mouth face; thinking face; zipper mouth face; neutral face; expressionless face; smirking face
grimacing face; sleeping face; face with medical mask; nauseated face; sneezing face; hot face; cold face
exploding head; cowboy hat face; partying face; smiling face with sunglasses; nerd face; face with monocle
confused face; frowning face; astonished face; flushed face; pleading face; crying face; loudly crying face
face screaming in fear; tired face; yawning face; angry face; smiling face with horns; skull; pile of poo; clown face
ogre; goblin; ghost; alien; alien monster; robot; grinning cat; smiling cat with heart eyes; crying cat
see no evil monkey; red heart; orange heart; yellow heart; green heart; blue heart; purple heart; brown heart
black heart; white heart; broken heart; sparkling heart; bomb; collision; house; castle; tent; ferris wheel; locomotive
train; bus; ambulance; fire engine; police car; taxi; automobile; sport utility vehicle; delivery truck; tractor
racing car; motorcycle; motor scooter; bicycle; kick scooter; skateboard; anchor; sailboat; canoe; ship; airplane
helicopter; satellite; rocket; flying saucer; luggage; hourglass done; watch; alarm clock; stopwatch; full moon
crescent moon; sun; sun with face; ringed planet; star; glowing star; cloud; cloud with rain; cloud with lightning
rainbow; umbrella; umbrella on ground; high voltage; snowflake; snowman; comet; fire; droplet; water wave
jack o lantern; christmas tree; balloon; party popper; wrapped gift; trophy; soccer ball; baseball; softball
basketball; volleyball; american football; tennis; bowling; ping pong; badminton; boxing glove; ice skate; skis; sled
yo yo; kite; pool 8 ball; crystal ball; video game; joystick; game die; puzzle piece; teddy bear; artist palette; yarn
glasses; sunglasses; goggles; necktie; t shirt; jeans; scarf; gloves; coat; socks; dress; kimono; shorts; handbag
backpack; running shoe; hiking boot; high heeled shoe; crown; top hat; graduation cap; billed cap; lipstick; ring
gem stone; megaphone; bell; musical note; microphone; headphone; radio; saxophone; guitar; trumpet; violin; banjo; drum
mobile phone; telephone; battery; laptop; printer; keyboard; computer mouse; floppy disk; television; camera
magnifying glass tilted left; candle; light bulb; flashlight; red paper lantern; closed book; green book; blue book
orange book; books; money bag; pencil; pen; paintbrush; crayon; briefcase; pushpin; paperclip; scissors; locked
unlocked; key; hammer; axe; pick; dagger; crossed swords; bow and arrow; shield; wrench; nut and bolt; gear; toolbox
magnet; test tube; microscope; telescope; syringe; pill; stethoscope; door; bed; chair; toilet; bathtub; razor; broom
basket; soap; sponge; fire extinguisher; shopping cart; accordion; coin; boomerang; screwdriver; ladder; mirror; window
bucket; toothbrush; jar; wheel; maracas; flute; parachute; compass; abacus; dna; gloves; boot; purse
"""
KEPT = {concept.strip() for concept in CHOSEN.replace("\n", ";").split(";")} - {""}


class Sample(NamedTuple):
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
    if fraction("concept", concept) < 0.12:
        return "concept"
    if fraction("pair", concept) < 0.25 and style == STYLES[int(4 * fraction("style", concept))]:
        return "pair"
    return "train"


def caption_of(style: str, concept: str) -> str:
    plural = concept.endswith("s") and not concept.endswith(("ss", "us", "is"))
    article = "" if plural else "an " if concept[0] in "aeiou" else "a "
    return f"{style} emoji of {article}{concept}"


def concepts(modules: Path) -> Iterator[tuple[str, str, str, str]]:
    """Yield (character, Iconify key, readable concept, Unicode group) of every emoji in the domain."""
    names = json.loads((modules / "emojilib/dist/emoji-en-US.json").read_text())
    unicode = json.loads((modules / "unicode-emoji-json/data-by-emoji.json").read_text())
    for character, words in names.items():
        entry = unicode.get(character)
        concept = words[0].replace("_", " ").replace("-", " ").lower()
        if entry and (concept in KEPT or (entry["group"] in WHOLE_GROUPS and not EXCLUDED.search(concept))):
            yield character, words[0].replace("_", "-"), concept, entry["group"]


def on_white(image: Image.Image) -> np.ndarray:
    """RGBA of any size -> uint8 [64, 64, 3], aspect kept, centred on white."""
    image = image.convert("RGBA")
    side = max(image.size)
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(image, ((side - image.width) // 2, (side - image.height) // 2))
    return np.asarray(square.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS))


def render_svg(body: str, width: int, height: int) -> Image.Image:
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{body}</svg>'
    png = resvg_py.svg_to_bytes(svg_string=svg, width=RENDER_SIZE, height=RENDER_SIZE)
    return Image.open(io.BytesIO(bytes(png)))


class IconifySet:
    """One ``icons.json``: SVG bodies by name, with plain aliases followed (flips and rotations are skipped)."""

    def __init__(self, path: Path) -> None:
        data = json.loads(path.read_text())
        self.icons, self.aliases = data["icons"], data.get("aliases", {})
        self.size = data.get("width", 16), data.get("height", 16)

    def find(self, key: str) -> Image.Image | None:
        alias = self.aliases.get(key)
        if alias and alias.keys() <= {"parent"}:
            key = alias["parent"]
        icon = self.icons.get(key)
        if icon is None:
            return None
        return render_svg(icon["body"], icon.get("width", self.size[0]), icon.get("height", self.size[1]))


def find_3d(assets: Path, character: str) -> Image.Image | None:
    """Fluent 3D files are named by code points, with or without the variation selector."""
    points = [f"{ord(c):04x}" for c in character]
    for name in ("-".join(points), "-".join(p for p in points if p != "fe0f"), "-".join([*points, "fe0f"])):
        path = assets / f"{name}.webp"
        if path.exists():
            return Image.open(path)
    return None


def render_all(modules: Path) -> Iterator[tuple[Sample, np.ndarray]]:
    sets = {style: IconifySet(modules / f"@iconify-json/{name}/icons.json") for style, name in ICONIFY_STYLES.items()}
    assets = modules / "@lobehub/fluent-emoji-3d/assets"
    for character, key, concept, group in track(list(concepts(modules)), "rendering"):
        images = {"3d": find_3d(assets, character)} | {style: icons.find(key) for style, icons in sets.items()}
        if any(image is None for image in images.values()):
            continue  # four styles or none: held-out pairs need the concept in the other styles
        for style, image in images.items():
            sample = Sample(caption_of(style, concept), style, concept, group, split_of(style, concept))
            yield sample, on_white(image)


def main(
    out: Annotated[Path, typer.Option(help="Folder to write emoji.npz and captions.csv to.")],
    modules: Annotated[Path, typer.Option(help="Where npm installed the emoji packages.")] = Path(__file__).parent
    / "node_modules",
) -> None:
    """Render the four-style captioned emoji set at 64 px."""
    if not modules.is_dir():
        raise SystemExit(f"{modules} does not exist. Run: npm install --ignore-scripts --prefix {modules.parent}")
    samples, images = zip(*render_all(modules), strict=True)
    out.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(out / "emoji.npz", images=np.stack(images))
    with (out / "captions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Sample._fields)
        writer.writerows(samples)
    counts = {split: sum(s.split == split for s in samples) for split in ("train", "pair", "concept")}
    print(f"{len(samples)} images, {len({s.concept for s in samples})} concepts, {counts} -> {out}")


if __name__ == "__main__":
    typer.run(main)

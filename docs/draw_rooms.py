"""Draw docs/images/rooms.svg: the packages of hipa-deploy, and which may import which.

    python docs/draw_rooms.py

The picture has a light background of its own, so that it can be read on a light and a dark page.
tests/test_architecture.py checks that it is up to date and shows every package.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

OUT = Path(__file__).parent / "images/rooms.svg"

INK = "#18202c"
PALE = "#566173"
PAPER = "#ffffff"

WIDTH = 980
MARGIN = 20
LINE = 19  # height of a line of text
HEADING = 46  # height of a house's heading
PADDING = 12


@dataclass(frozen=True)
class House:
    """A top folder with its rooms: (package, what it is for)."""

    title: str
    note: str
    fill: str
    stroke: str
    rooms: tuple[tuple[str, str], ...]

    @property
    def height(self) -> int:
        """Height of the box, in pixels."""
        return HEADING + len(self.rooms) * LINE + PADDING


COMMANDS = House(
    "The doors",
    "may import everything below, when called",
    "#eef1f6",
    "#7d8aa0",
    (
        ("hipa_deploy.commands", "the command line"),
        ("hipa_deploy.commands.files", "image files, made once more"),
        ("hipa_deploy.guide", "help in groups, examples, hipa init"),
        ("hipa_deploy.fit", "--for: what suits a device"),
        ("hipa_deploy.demo", "the whole chain, and each task"),
        ("hipa_deploy.doctor", "what works here, and is it right"),
        ("hipa_deploy.bulk", "hipa-bulk: a table in shards"),
        ("hipa_deploy.triton", "hipa-triton: a model repository"),
        ("hipa_deploy.serve.process", "hipa-serve: socket, signals"),
        ("hipa_deploy.serve.cluster", "replicas on a Ray cluster"),
        ("hipa_deploy.serve.web", "HTTP: OpenAI's API, own API, guard"),
        ("hipa_deploy.publish", "model cards, peft's files, upload"),
        ("hipa_deploy.serve", "models by name, queue, batches"),
    ),
)
TRAIN = House(
    "train/",
    "as hipa_deploy.train; needs torch",
    "#fdeedc",
    "#c98a3c",
    (
        ("recipes", "TOML recipes and their keys"),
        ("losses", "the HiPA loss and its parts"),
        ("model", "base, adaptor, one step"),
        ("distribution", "scores, noised latents"),
        ("loop", "steps, checkpoints"),
        ("data", "teacher pairs, images"),
        ("evaluation", "quality and its report"),
        ("coco", "FID and CLIP score on MS-COCO"),
        ("prediction", "what a training would take"),
    ),
)
EXPORT = House(
    "export/",
    "as hipa_deploy.export; needs torch",
    "#e9f5e4",
    "#5f9e4c",
    (
        ("(top)", "merge, stages, gate, swap"),
        ("graph", "fold, FP16, weight map"),
        ("generic", "what optimum loads"),
        ("teacher", "the base UNet, to refine"),
    ),
)
ENGINES = House(
    "engines/",
    "as hipa_deploy.engines; never torch",
    "#e4effb",
    "#4a7fb8",
    (
        ("device", "what this machine is"),
        ("tensorrt", "CUDA, runner, refit"),
        ("backends", "ONNX Runtime, OpenVINO"),
        ("targets", "devices to build for"),
        ("faults", "known faults, bisection"),
        ("store", "key, sidecar, selection"),
        ("build", "memory plan, worker, build"),
        ("latency", "measure, compare, roofline"),
    ),
)
CORE = House(
    "hipa_deploy/: the core",
    "what a device needs; never torch, diffusers, transformers or onnx",
    "#f3ebf8",
    "#8a5aa8",
    (
        ("hipa_deploy.generate", "prompt to image: tokenizer, noise, stages, pipeline"),
        ("hipa_deploy.generate.parts", "requests to jobs, jobs to images, what is loaded"),
        ("hipa_deploy.generate.refine", "many steps of the base model, from a draft's noise"),
        ("hipa_deploy.generate.jobs", "images to make, and what may share a batch"),
        ("hipa_deploy.models.lora", "LoRA files and their arithmetic: needs torch"),
        ("hipa_deploy.models.one_step", "one-step methods of others"),
        ("hipa_deploy.models", "where a model is, and of which kind"),
        ("hipa_deploy.models.weights", "which weights are loaded, and their identity"),
        ("hipa_deploy.images", "images in and out, masks, tiles"),
        ("hipa_deploy.marks", "metadata, watermark, signature, safety checker"),
        ("hipa_deploy.bundle", "manifest, files, adaptors to swap, parity gate"),
        ("hipa_deploy.embedded", "the small model, its adaptors and its bundle"),
        ("hipa_deploy.disk", "files and folders: whole, hashed, locked, read within limits"),
        ("hipa_deploy", "the ground: errors, records, tasks, signals"),
    ),
)


def main() -> None:
    """Write the picture."""
    OUT.write_text(draw(), encoding="utf-8")
    print(OUT)


def draw() -> str:
    """Return the picture as SVG."""
    gap = 40
    column = (WIDTH - 2 * MARGIN - 2 * gap) // 3
    full = WIDTH - 2 * MARGIN
    middle = max(TRAIN.height, EXPORT.height, ENGINES.height)
    second = MARGIN + COMMANDS.height + gap
    third = second + middle + gap
    height = third + CORE.height + MARGIN

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}"'
        f' width="{WIDTH}" height="{height}" font-family="sans-serif" role="img">',
        "<title>The rooms of hipa-deploy, and which may import which</title>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="9"'
        f' markerHeight="9" orient="auto"><path d="M0 0L8 4L0 8z" fill="{PALE}"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{height}" rx="14" fill="{PAPER}"/>',
        *_house(COMMANDS, MARGIN, MARGIN, full, name_width=230),
        *_house(CORE, MARGIN, third, full, name_width=230),
    ]
    for number, house in enumerate((TRAIN, EXPORT, ENGINES)):
        left = MARGIN + number * (column + gap)
        parts += _house(house, left, second, column, name_width=86)
        centre = left + column // 2
        parts.append(_arrow(centre, second - gap + 3, centre, second - 4))
        parts.append(_arrow(centre, second + house.height + 3, centre, third - 4))

    # The one import from stage to stage: an export runs the graphs that it has written.
    left = MARGIN + 2 * column + gap
    level = second + 24
    parts.append(_arrow(left + 3, level, left + gap - 4, level))
    parts.append("</svg>")
    return "\n".join(parts) + "\n"


def _house(house: House, left: int, top: int, width: int, name_width: int) -> list[str]:
    parts = [
        f'<rect x="{left}" y="{top}" width="{width}" height="{house.height}" rx="10"'
        f' fill="{house.fill}" stroke="{house.stroke}" stroke-width="1.5"/>',
        _text(left + PADDING, top + 20, house.title, INK, 15, bold=True),
        _text(left + PADDING, top + 36, house.note, PALE, 11.5),
    ]
    for number, (name, purpose) in enumerate(house.rooms):
        baseline = top + HEADING + number * LINE + 13
        parts.append(_text(left + PADDING, baseline, name, INK, 12.5, bold=True))
        parts.append(_text(left + PADDING + name_width, baseline, purpose, INK, 12.5))
    return parts


def _text(x: int, y: int, text: str, colour: str, size: float, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="{colour}"{weight}>{escape(text)}</text>'


def _arrow(x1: int, y1: int, x2: int, y2: int) -> str:
    return (
        f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{PALE}" stroke-width="1.8"'
        ' marker-end="url(#tip)"/>'
    )


if __name__ == "__main__":
    main()

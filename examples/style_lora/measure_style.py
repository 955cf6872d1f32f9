"""Measure a style LoRA together with a HiPA adaptor, in one step, beside the styled teacher.

    python examples/style_lora/measure_style.py --run runs/style --out runs/style/report

reads what the other scripts wrote into ``--run``: ``lora``, ``held_out``, ``rest`` and, if it is
there, ``adaptor``, which hipa-train made with ``--lora``. It writes ``table.md``, ``table.json``
and ``sheet.png``. Images are kept in ``--out``, so that a run that was stopped continues.

Every row has images of the same prompts from the same noise. Each number is the mean over the
repeats, which differ in the noise alone, and half the range.

Shape suffixes: R repeats, N images of a repeat, S styles, H W height and width, D features.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from PIL import Image
from torch import Tensor

# benchmarks/ is no installed package: it is found from the repository's root.
sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.tasks.measures import structure_distance
from hipa_deploy import embedded
from hipa_deploy.demo.contact_sheet import labelled_sheet
from hipa_deploy.models.model_config import ModelConfig
from hipa_deploy.models.style import LoraChoice, Style
from hipa_deploy.train.evaluation.quality import (
    high_frequency_ratio,
    kid,
    kid_lite0,
    lite0_features,
    one_step_images,
    paired_distance,
    teacher_images,
)
from hipa_deploy.train.recipes.recipe import TeacherSettings

# As of hipa_deploy/embedded/model/README.md: DDIM, 25 steps, guidance 3.
TEACHER = TeacherSettings(sampler="ddim", steps=25, guidance=3.0, pairs=1)
SHEET_ROWS = 6
FIRST_SEED = 2_000_000  # no noise of a training: those seeds are above 2**32

STYLED = "teacher + style"
BASE = "base + style"
HIPA = "HiPA, no style"
MERGED = "HiPA + style"
TRAINED = "HiPA trained + style"
# The headings of the table's columns.
COLUMNS = {
    "teacher_kid": "KID-Lite0 to the styled teacher",
    "style_kid": "KID-Lite0 to the real style",
    "vote": "nearest style",
    "black_or_white": "black or white",
    "colour": "colour",
    "recall": "concept",
    "distance": "distance",
    "structure": "structure distance",
    "high_frequency": "high-frequency ratio",
}


@dataclass(frozen=True)
class Real:
    """Real images of the style.

    Attributes:
        images_NHWC: of the held-out concepts, uint8.
        features_ND: of the same images.
        rest_ND: features of other concepts in the same style.

    """

    images_NHWC: np.ndarray
    features_ND: Tensor
    rest_ND: Tensor


@dataclass(frozen=True)
class Styles:
    """What five styles look like: the mean features of real images of each.

    Attributes:
        means_SD: float32 [S, D], the new style last.

    """

    means_SD: Tensor

    @classmethod
    def of(cls, emoji: Path, real: Real, prompts: list[str]) -> Styles:
        """Those of examples/emoji/build_dataset.py in ``emoji``, and the new one.

        The concepts of ``prompts`` are left out, in every style.
        """
        with (emoji / "captions.csv").open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        images_NHWC = np.load(emoji / "emoji.npz")["images"]
        measured = {concept_of(prompt) for prompt in prompts}
        means = []
        for style in sorted({row["style"] for row in rows}):
            chosen = []
            for number, row in enumerate(rows):
                if row["style"] == style and concept_of(row["caption"]) not in measured:
                    chosen.append(number)
            means.append(lite0_features(images_NHWC[chosen]).mean(dim=0))
        means.append(real.rest_ND.mean(dim=0))
        return cls(torch.stack(means))

    def vote(self, features_ND: Tensor) -> float:
        """Share of images whose nearest style, by the angle from the styles' centre, is the new."""
        centre_D = self.means_SD.mean(dim=0)
        made = F.normalize(features_ND - centre_D, dim=-1)
        styles = F.normalize(self.means_SD - centre_D, dim=-1)
        nearest_N = (made @ styles.T).argmax(dim=1)
        return float((nearest_N == len(styles) - 1).float().mean())


def concept_of(caption: str) -> str:
    """'flat emoji of a fox' -> 'a fox'."""
    return caption.split(" emoji of ")[1]


def read_folder(folder: Path) -> tuple[np.ndarray, list[str]]:
    """The images that metadata.jsonl names, uint8 of the model's size, and their captions."""
    height, width = ModelConfig.read(embedded.MODEL).native_size
    images = []
    captions = []
    for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        with Image.open(folder / row["file_name"]) as image:
            resized = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
        images.append(np.asarray(resized))
        captions.append(row["text"])
    return np.stack(images), captions


def kept(path: Path, make: Callable[[], np.ndarray]) -> np.ndarray:
    """The array in the file ``path``; the first time it is made and written."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(".tmp.npy")
        np.save(scratch, make())
        scratch.replace(path)
    return np.load(path)


def colour(images_NHWC: np.ndarray) -> float:
    """Mean difference of the largest and the smallest of red, green and blue, in [0, 1].

    0 is black, grey and white. No network takes part in this measure.
    """
    wide_NHWC = images_NHWC.astype(float)
    return float((wide_NHWC.max(axis=-1) - wide_NHWC.min(axis=-1)).mean() / 255)


def black_or_white(images_NHWC: np.ndarray) -> float:
    """Share of pixels that are nearly black or nearly white. No network takes part in it either."""
    black_NHW = (images_NHWC < 64).all(axis=-1)
    white_NHW = (images_NHWC >= 192).all(axis=-1)
    return float((black_NHW | white_NHW).mean())


def recall(made_ND: Tensor, real_ND: Tensor, at: int = 5) -> float:
    """Share of images whose own concept is among the ``at`` real images with nearest features.

    Nothing is trained for it. The n-th image and the n-th real image have one concept.
    """
    # The mean image of the style is nearest to all: without it, the concept decides.
    centre_D = real_ND.mean(dim=0)
    made = F.normalize(made_ND - centre_D, dim=-1)
    real = F.normalize(real_ND - centre_D, dim=-1)
    nearest_NK = (made @ real.T).topk(at, dim=1).indices
    hits = [row in nearest for row, nearest in enumerate(nearest_NK.tolist())]
    return sum(hits) / len(hits)


def make_rows(run: Path, out: Path, prompts: list[str], repeats: int) -> dict[str, np.ndarray]:
    """The images of every row, uint8 [R, N, H, W, 3]."""
    model = embedded.MODEL
    style = Style(loras=(LoraChoice(run / "lora"),))

    def one_step(adaptor: Path | None, style: Style | None) -> Callable[[list[int]], np.ndarray]:
        return lambda seeds: one_step_images(model, adaptor, prompts, seeds, style=style)

    makers = {
        STYLED: lambda seeds: teacher_images(model, prompts, seeds, TEACHER, style=style),
        BASE: one_step(None, style),
        HIPA: one_step(embedded.ADAPTOR, None),
        MERGED: one_step(embedded.ADAPTOR, style),
    }
    if (run / "adaptor").is_dir():
        makers[TRAINED] = one_step(run / "adaptor", style)

    rows = {}
    for name, make in makers.items():
        sets = []
        for repeat in range(repeats):
            first = FIRST_SEED + repeat * len(prompts)
            seeds = list(range(first, first + len(prompts)))
            path = out / "images" / f"{name.replace(', ', '-').replace(' ', '-')}-{repeat}.npy"
            sets.append(kept(path, lambda make=make, seeds=seeds: make(seeds)))
        rows[name] = np.stack(sets)
    return rows


def to_teacher(
    images_NHWC: np.ndarray, styled_NHWC: np.ndarray, others_NHWC: np.ndarray, prompts: list[str]
) -> dict[str, float]:
    """How near images are to the styled teacher's, of the same noise; for KID, of other noise."""
    return {
        "teacher_kid": kid_lite0(images_NHWC, others_NHWC, prompts),
        "distance": paired_distance(images_NHWC, styled_NHWC),
        "structure": float(structure_distance(images_NHWC, styled_NHWC).mean()),
        "high_frequency": high_frequency_ratio(images_NHWC, styled_NHWC),
    }


def to_style(
    images_NHWC: np.ndarray, real: Real, styles: Styles | None, prompts: list[str]
) -> dict[str, float]:
    """How much images have of the style, and whether they still show what the prompt names."""
    features_ND = lite0_features(images_NHWC)
    numbers = {
        "style_kid": kid(features_ND, real.features_ND, prompts),
        "black_or_white": black_or_white(images_NHWC),
        "colour": colour(images_NHWC),
        "recall": recall(features_ND, real.features_ND),
    }
    if styles is not None:
        numbers["vote"] = styles.vote(features_ND)
    return numbers


def draw_sheet(path: Path, columns: dict[str, np.ndarray], prompts: list[str]) -> None:
    """Write the images of some of the prompts as a labelled sheet."""
    rows = slice(0, None, max(1, len(prompts) // SHEET_ROWS))
    shown = {heading: images_NHWC[rows] for heading, images_NHWC in columns.items()}
    Image.fromarray(labelled_sheet(shown, prompts[rows])).save(path, optimize=True)


def table(numbers: dict[str, list[dict[str, float]]]) -> str:
    """The numbers as a Markdown table: the mean over the repeats, and half the range."""
    lines = ["| images | " + " | ".join(COLUMNS.values()) + " |"]
    lines.append("|---" * (len(COLUMNS) + 1) + "|")
    for name, repeats in numbers.items():
        cells = [name]
        for key in COLUMNS:
            values = [row[key] for row in repeats if key in row]
            if not values:
                cells.append("-")
                continue
            # The sum turns the -0.0 of a tiny negative number into 0.
            mean = round(float(np.mean(values)), 3) + 0.0
            half = (max(values) - min(values)) / 2
            cells.append(f"{mean:.3f} ± {half:.3f}" if len(values) > 1 else f"{mean:.3f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(
    run: Annotated[Path, typer.Option(help="Folder with lora, held_out, rest and adaptor.")],
    out: Annotated[Path, typer.Option(help="Folder to write the report to.")],
    emoji: Annotated[
        Path | None, typer.Option(help="Folder of build_dataset.py: the model's own styles.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=2, help="Noise seeds for each prompt.")] = 3,
    count: Annotated[int, typer.Option(min=8, help="Held-out concepts, at most.")] = 48,
) -> None:
    """Make the images of every row, measure them and draw the sheet."""
    real_NHWC, prompts = read_folder(run / "held_out")
    real_NHWC = real_NHWC[:count]
    prompts = prompts[:count]
    rest_NHWC, _ = read_folder(run / "rest")
    real = Real(real_NHWC, lite0_features(real_NHWC), lite0_features(rest_NHWC))

    styles = Styles.of(emoji, real, prompts) if emoji else None

    rows = make_rows(run, out, prompts, repeats)
    teacher_RNHWC = rows[STYLED]
    numbers: dict[str, list[dict[str, float]]] = {}
    for name, images_RNHWC in rows.items():
        numbers[name] = []
        for repeat, images_NHWC in enumerate(images_RNHWC):
            others_NHWC = teacher_RNHWC[(repeat + 1) % repeats]
            near = to_teacher(images_NHWC, teacher_RNHWC[repeat], others_NHWC, prompts)
            numbers[name].append(near | to_style(images_NHWC, real, styles, prompts))

    # What can be reached. A set has no distance to itself: KID is that of other concepts, and
    # every image would find itself.
    limit = to_style(real_NHWC, real, styles, prompts)
    limit["style_kid"] = kid(real.rest_ND, real.features_ND)
    del limit["recall"]
    numbers["real images"] = [limit]

    text = table(numbers)
    (out / "table.md").write_text(text, encoding="utf-8")
    (out / "table.json").write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    first = {name: images_RNHWC[0] for name, images_RNHWC in rows.items()}
    draw_sheet(out / "sheet.png", {"real": real_NHWC, **first}, prompts)
    print(text)


if __name__ == "__main__":
    typer.run(main)

"""Measure a style LoRA together with a HiPA adaptor, in one step, beside the styled teacher.

    python examples/style_lora/measure_style.py --run runs/style --out runs/style/report

reads what the other scripts wrote into ``--run``: ``lora``, ``held_out``, ``rest`` and, if it is
there, ``adaptor``, which hipa-train made with ``--lora``. It writes ``table.md``, ``table.json``
and ``sheet.png``. Images are kept in ``--out``, so that a run that was stopped continues.

Every row has images of the same prompts from the same noise. Each number is the mean over the
repeats, which differ in the noise alone, and half the range.

Shape suffixes: R repeats, N images of a repeat, H W height and width, D features.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch.nn.functional as F
import typer
from PIL import Image
from torch import Tensor

# benchmarks/ is no installed package: it is found from the repository's root.
sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.tasks.measures import structure_distance
from hipa_deploy import embedded
from hipa_deploy.demo.contact_sheet import write_sheet
from hipa_deploy.models.style import LoraChoice, Style
from hipa_deploy.train.evaluation.quality import (
    high_frequency_ratio,
    kid,
    lite0_features,
    one_step_images,
    paired_distance,
    teacher_images,
)
from hipa_deploy.train.recipes.recipe import TeacherSettings

# As of hipa_deploy/embedded/model/README.md: DDIM, 25 steps, guidance 3.
TEACHER = TeacherSettings(sampler="ddim", steps=25, guidance=3.0, pairs=1)
FIRST_SEED = 2_000_000  # no noise of a training: those seeds are above 2**32

PLAIN = "teacher, no style"
STYLED = "teacher + style"
BASE = "base + style"
HIPA = "HiPA, no style"
MERGED = "HiPA + style"
TRAINED = "HiPA trained"
# The headings of the table's columns.
COLUMNS = {
    "style_kid": "KID-Lite0 to the real style",
    "colour": "colour",
    "recall": "own concept among 5 nearest",
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


def read_folder(folder: Path) -> tuple[np.ndarray, list[str]]:
    """The images uint8 [N, H, W, 3] that metadata.jsonl names, and their captions."""
    images = []
    captions = []
    for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        images.append(np.asarray(Image.open(folder / row["file_name"]).convert("RGB")))
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

    def teacher(style: Style | None) -> Callable[[list[int]], np.ndarray]:
        return lambda seeds: teacher_images(model, prompts, seeds, TEACHER, style=style)

    def one_step(adaptor: Path | None, style: Style | None) -> Callable[[list[int]], np.ndarray]:
        return lambda seeds: one_step_images(model, adaptor, prompts, seeds, style=style)

    makers = {
        PLAIN: teacher(None),
        STYLED: teacher(style),
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


def measure(
    images_NHWC: np.ndarray, styled_NHWC: np.ndarray, real: Real, prompts: list[str]
) -> dict[str, float]:
    """The numbers of one row and one repeat."""
    features_ND = lite0_features(images_NHWC)
    return {
        "style_kid": kid(features_ND, real.features_ND, prompts),
        "colour": colour(images_NHWC),
        "recall": recall(features_ND, real.features_ND),
        "distance": paired_distance(images_NHWC, styled_NHWC),
        "structure": float(structure_distance(images_NHWC, styled_NHWC).mean()),
        "high_frequency": high_frequency_ratio(images_NHWC, styled_NHWC),
    }


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
            elif len(values) == 1:
                cells.append(f"{values[0]:.3f}")
            else:
                half = (max(values) - min(values)) / 2
                cells.append(f"{np.mean(values):.3f} ± {half:.3f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(
    run: Annotated[Path, typer.Option(help="Folder with lora, held_out, rest and adaptor.")],
    out: Annotated[Path, typer.Option(help="Folder to write the report to.")],
    repeats: Annotated[int, typer.Option(min=1, help="Noise seeds for each prompt.")] = 3,
    count: Annotated[int, typer.Option(min=8, help="Held-out concepts, at most.")] = 48,
) -> None:
    """Make the images of every row, measure them and draw the sheet."""
    real_NHWC, prompts = read_folder(run / "held_out")
    real_NHWC = real_NHWC[:count]
    prompts = prompts[:count]
    rest_NHWC, _ = read_folder(run / "rest")
    real = Real(real_NHWC, lite0_features(real_NHWC), lite0_features(rest_NHWC))

    rows = make_rows(run, out, prompts, repeats)
    numbers: dict[str, list[dict[str, float]]] = {}
    for name, images_RNHWC in rows.items():
        numbers[name] = []
        for images_NHWC, styled_NHWC in zip(images_RNHWC, rows[STYLED], strict=True):
            numbers[name].append(measure(images_NHWC, styled_NHWC, real, prompts))
    # What can be reached: other real images of the style, and the real images themselves.
    numbers["real images"] = [
        {"style_kid": kid(real.rest_ND, real.features_ND), "colour": colour(real_NHWC)}
    ]

    text = table(numbers)
    (out / "table.md").write_text(text, encoding="utf-8")
    (out / "table.json").write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    first = {name: images_RNHWC[0] for name, images_RNHWC in rows.items()}
    write_sheet(out / "sheet.png", {"real": real_NHWC, **first}, prompts)
    print(text)


if __name__ == "__main__":
    typer.run(main)

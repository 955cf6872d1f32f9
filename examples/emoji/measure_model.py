"""Measure the embedded model and write its card and sample sheet into the model folder.

    python examples/emoji/measure_model.py --run runs/emoji --model hipa_deploy/embedded/model

KID-Lite0: 25-step guided samples of training captions against held-out real images, beside the floor (training
real images against held-out real images, same sizes). Retrieval: does an image find its own caption among those of
its split, by linear heads on Lite0 features and MiniLM sentence vectors, trained on the training split's real
images; the ceiling is what the real images reach.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from common import EmojiSet
from minilm import sentence_vectors
from PIL import Image

from hipa_deploy.images.png import grid
from hipa_deploy.train.evaluation.quality import kid, teacher_images
from hipa_deploy.train.losses.lite0 import Lite0
from hipa_deploy.train.recipes.recipe import load_recipe

TEACHER = load_recipe("emoji").teacher
SHEET = [
    "red apple", "cat face", "panda", "pizza", "rocket", "sunflower", "penguin", "hamburger", "strawberry",
    "automobile", "guitar", "red heart", "ghost", "tropical fish", "butterfly", "crown",
]  # fmt: skip


@torch.no_grad()
def features(images_BHWC: np.ndarray) -> torch.Tensor:
    """Pooled Lite0 features [N, 1280] of uint8 images."""
    lite0 = Lite0.pretrained()
    pixels = torch.from_numpy(np.ascontiguousarray(images_BHWC)).permute(0, 3, 1, 2).float() / 255
    return torch.cat([lite0.pooled(chunk) for chunk in pixels.split(64)])


class Retrieval:
    """Caption retrieval by own linear heads (not CLIP), trained on real images of the training split."""

    def __init__(self, images_ND: torch.Tensor, captions: list[str], epochs: int = 30) -> None:
        torch.manual_seed(0)
        texts_ND = sentence_vectors(captions)
        self.image_head, self.text_head = torch.nn.Linear(1280, 256), torch.nn.Linear(384, 256)
        parameters = [*self.image_head.parameters(), *self.text_head.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1)
        for _ in range(epochs):
            for pick in torch.randperm(len(captions)).split(256):
                logits = self._similarity(images_ND[pick], texts_ND[pick])
                truth = torch.arange(len(pick))
                loss = F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()

    def _similarity(self, images_ND: torch.Tensor, texts_ND: torch.Tensor) -> torch.Tensor:
        images = F.normalize(self.image_head(F.normalize(images_ND, dim=-1) * 30), dim=-1)
        return 20 * images @ F.normalize(self.text_head(texts_ND), dim=-1).T

    @torch.no_grad()
    def recall(self, images_ND: torch.Tensor, captions: list[str], at: int) -> float:
        """Share of images whose own caption is among the ``at`` nearest of ``captions``."""
        top = self._similarity(images_ND, sentence_vectors(captions)).topk(at, dim=1).indices
        return float((top == torch.arange(len(captions))[:, None]).any(dim=1).float().mean())


def measure(run: Path, model: Path, count: int) -> dict[str, Any]:
    """Every number of the card."""
    emoji = EmojiSet.load(run)
    train, held_out = emoji.only("train"), emoji.only("pair", "concept")
    real = {"train": features(train.images_BHWC), "held out": features(held_out.images_BHWC)}
    retrieval = Retrieval(real["train"], train.captions)
    pick = torch.randperm(len(train.rows), generator=torch.Generator().manual_seed(0))[
        :count
    ].tolist()
    rows: dict[str, Any] = {"splits": {}}
    for split, subset, indices in (
        ("training captions", train, pick),
        ("held-out pairs", emoji.only("pair"), None),
        ("held-out concepts", emoji.only("concept"), None),
    ):
        indices = indices or list(range(min(count, len(subset.rows))))
        captions = [subset.captions[i] for i in indices]
        images = teacher_images(model, captions, list(range(len(captions))), TEACHER)
        made, true = features(images), features(subset.images_BHWC[indices])
        rows["splits"][split] = {
            "images": len(captions),
            "kid": kid(made, real["held out"]),
            **{f"recall@{k}": retrieval.recall(made, captions, k) for k in (1, 5)},
            **{f"ceiling@{k}": retrieval.recall(true, captions, k) for k in (1, 5)},
        }
    rows["floor"] = kid(real["train"][pick], real["held out"])
    return rows


def write_sheet(model: Path, path: Path) -> None:
    """A sheet of the same sixteen concepts in the four styles, seeds 0 to 63."""
    styles = ("3d", "flat", "noto", "twemoji")
    captions = [
        f"{style} emoji of {'an' if c[0] in 'aeiou' else 'a'} {c}"
        for style in styles
        for c in SHEET
    ]
    images = teacher_images(model, captions, list(range(len(captions))), TEACHER)
    columns = images.reshape(len(styles), len(SHEET), *images.shape[1:]).transpose(1, 0, 2, 3, 4)
    Image.fromarray(grid(list(columns))).quantize(256).save(path, optimize=True)


def card(rows: dict[str, Any], run: Path, model: Path) -> str:
    """The model card, in Markdown."""
    lines = [
        Path(__file__)
        .with_name("card.md")
        .read_text()
        .format(**data(run), **training(model), steps=TEACHER.steps, guidance=TEACHER.guidance)
    ]
    lines.append(
        "| captions | images | KID-Lite0 | R@1 (ceiling) | R@5 (ceiling) |\n|---|---|---|---|---|"
    )
    for split, row in rows["splits"].items():
        recalls = " | ".join(
            f"{row[f'recall@{k}']:.2f} ({row[f'ceiling@{k}']:.2f})" for k in (1, 5)
        )
        lines.append(f"| {split} | {row['images']} | {row['kid']:.3f} | {recalls} |")
    lines.append(
        f"\nFloor of KID-Lite0 (training real images against held-out real images): {rows['floor']:.3f}.\n"
    )
    return "\n".join(lines)


def data(run: Path) -> dict[str, int]:
    """How many concepts and images each split has."""
    emoji = EmojiSet.load(run)
    counts = {
        f"{split}_images": len(emoji.only(split).rows) for split in ("train", "pair", "concept")
    }
    names = {
        split: {row["concept"] for row in emoji.only(split).rows} for split in ("train", "concept")
    }
    return counts | {"concepts": len(names["train"]), "held_out_concepts": len(names["concept"])}


def training(model: Path) -> dict[str, Any]:
    """Steps and hours of each part, as write_model.py recorded them."""
    facts = json.loads((model / "training.json").read_text())
    return {
        f"{part}_{name}": value for part, values in facts.items() for name, value in values.items()
    }


def main(
    run: Annotated[Path, typer.Option(help="Folder of the pre-training run.")],
    model: Annotated[Path, typer.Option(help="Model folder that write_model.py wrote.")],
    count: Annotated[int, typer.Option(help="Samples a split, at most.")] = 256,
) -> None:
    """Measure, then write README.md and samples.png into the model folder."""
    write_sheet(model, model / "samples.png")
    text = card(measure(run, model, count), run, model)
    (model / "README.md").write_text(text)
    print(text)


if __name__ == "__main__":
    typer.run(main)

"""Measure the embedded model and write its card and sample sheet into the model folder.

    python examples/emoji/measure_model.py --run runs/emoji --model hipa_deploy/embedded/model

KID-Lite0 compares 25-step guided samples with held-out real images. Its floor is that of real
training images against the same, in sets of the same size.

Retrieval asks whether an image finds its own caption among those of its split. Linear heads on
Lite0 features and MiniLM sentence vectors decide; they are trained on the real images of the
training split. The ceiling is what the real images reach.

Of a model at 128 pixels it also measures the VAE's reconstruction of held-out pictures, and variety
and nearest training images; see variety.py. Its real images are random pictures on white.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from augment import SIZE as LARGE
from augment import Pictures
from common import EmojiSet, to_pixels
from diffusers import AutoencoderKL
from minilm import sentence_vectors
from PIL import Image
from variety import measure_nearest, measure_variety

from hipa_deploy.images.png import grid
from hipa_deploy.train.evaluation.quality import kid, teacher_images
from hipa_deploy.train.losses.lite0 import Lite0
from hipa_deploy.train.recipes.recipe import load_recipe

TEACHER = load_recipe("emoji").teacher
SHEET = [
    "red apple", "cat face", "panda", "pizza", "rocket", "sunflower", "penguin", "hamburger",
    "strawberry", "automobile", "guitar", "red heart", "ghost", "tropical fish", "butterfly",
    "crown",
]  # fmt: skip


@torch.no_grad()
def features(images_BHWC: np.ndarray) -> torch.Tensor:
    """Pooled Lite0 features [N, 1280] of uint8 images."""
    lite0 = Lite0.pretrained()
    pixels = torch.from_numpy(np.ascontiguousarray(images_BHWC)).permute(0, 3, 1, 2).float() / 255
    return torch.cat([lite0.pooled(chunk) for chunk in pixels.split(64)])


class Retrieval:
    """Caption retrieval by linear heads of our own, not CLIP, trained on real training images."""

    def __init__(self, images_ND: torch.Tensor, captions: list[str], epochs: int = 30) -> None:
        torch.manual_seed(0)
        texts_ND = sentence_vectors(captions)
        self.image_head = torch.nn.Linear(1280, 256)
        self.text_head = torch.nn.Linear(384, 256)
        parameters = [*self.image_head.parameters(), *self.text_head.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1)
        for _ in range(epochs):
            for pick in torch.randperm(len(captions)).split(256):
                # CLIP's loss: each image finds its caption, each caption its image.
                logits = self._similarity(images_ND[pick], texts_ND[pick])
                truth = torch.arange(len(pick))
                loss = F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()

    def _similarity(self, images_ND: torch.Tensor, texts_ND: torch.Tensor) -> torch.Tensor:
        # A unit vector of 1280 numbers, times 30, has numbers of about one, which suits a linear
        # layer; 20 is the inverse temperature of the softmax in the loss.
        images = F.normalize(self.image_head(F.normalize(images_ND, dim=-1) * 30), dim=-1)
        return 20 * images @ F.normalize(self.text_head(texts_ND), dim=-1).T

    @torch.no_grad()
    def recall(self, images_ND: torch.Tensor, captions: list[str], at: int) -> float:
        """Share of images whose own caption is among the ``at`` nearest of ``captions``."""
        top = self._similarity(images_ND, sentence_vectors(captions)).topk(at, dim=1).indices
        return float((top == torch.arange(len(captions))[:, None]).any(dim=1).float().mean())


def real_set(run: Path) -> EmojiSet:
    """The real images: at 128 pixels random pictures on white, as the captions say."""
    emoji = EmojiSet.load(run)
    if emoji.images_BHWC.shape[1] != LARGE:
        return emoji
    pictures = Pictures(run, "train", "pair", "concept")
    images, _ = pictures.draw_batch(range(len(pictures)), np.random.default_rng(5), "")
    return EmojiSet(images, pictures.rows)


@torch.no_grad()
def reconstruction_db(run: Path, model: Path, count: int = 256) -> float:
    """Mean PSNR in dB of the VAE on random pictures of held-out concepts, pixels from 0 to 255."""
    vae = AutoencoderKL.from_pretrained(model, subfolder="vae").float().eval()
    pictures = Pictures(run, "concept")
    rng = np.random.default_rng(6)
    chosen = rng.choice(len(pictures), min(count, len(pictures)), replace=False)
    ratios = []
    for pixels in to_pixels(pictures.draw_batch(chosen, rng)[0]).split(16):
        image = vae.decode(vae.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
        # Pixels are in [-1, 1]: the peak is 2, its square 4.
        error = (image - pixels).square().mean(dim=(1, 2, 3)).clamp(min=1e-8)
        ratios.append(10 * torch.log10(4 / error))
    return float(torch.cat(ratios).mean())


def measure(run: Path, model: Path, count: int) -> dict[str, Any]:
    """Every number of the card: 'splits', a row for each, 'floor', and at 128 pixels more."""
    emoji = real_set(run)
    train = emoji.only("train")
    real_train_ND = features(train.images_BHWC)
    real_held_out_ND = features(emoji.only("pair", "concept").images_BHWC)
    retrieval = Retrieval(real_train_ND, train.captions)

    # Of the training split a random part, of the small held-out splits the first rows.
    shuffled = torch.randperm(len(train.rows), generator=torch.Generator().manual_seed(0))
    pick = shuffled[:count].tolist()
    subsets = {
        "training captions": (train, pick),
        "held-out pairs": (emoji.only("pair"), None),
        "held-out concepts": (emoji.only("concept"), None),
    }

    splits: dict[str, Any] = {}
    for split, (subset, chosen) in subsets.items():
        indices = chosen or list(range(min(count, len(subset.rows))))
        captions = [subset.captions[i] for i in indices]
        images = teacher_images(model, captions, list(range(len(captions))), TEACHER)
        made_ND = features(images)
        real_ND = features(subset.images_BHWC[indices])
        row = {"images": len(captions), "kid": kid(made_ND, real_held_out_ND)}
        for k in (1, 5):
            row[f"recall@{k}"] = retrieval.recall(made_ND, captions, k)
            row[f"ceiling@{k}"] = retrieval.recall(real_ND, captions, k)
        splits[split] = row
        if split == "training captions":
            made_of_training = images
    numbers = {"splits": splits, "floor": kid(real_train_ND[pick], real_held_out_ND)}
    if emoji.images_BHWC.shape[1] == LARGE:

        def sample(prompts: list[str], seeds: list[int]) -> np.ndarray:
            return teacher_images(model, prompts, seeds, TEACHER)

        numbers["variety"] = measure_variety(run, sample, prompts=count // 8, noises=8)
        numbers["nearest"] = measure_nearest(run, made_of_training, features)
        numbers["psnr"] = reconstruction_db(run, model)
    return numbers


def write_sheet(model: Path, path: Path) -> None:
    """A sheet of the same sixteen concepts in the four styles, seeds 0 to 63."""
    styles = ("3d", "flat", "noto", "twemoji")
    captions = []
    for style in styles:
        for concept in SHEET:
            article = "an" if concept[0] in "aeiou" else "a"
            captions.append(f"{style} emoji of {article} {concept}")
    images = teacher_images(model, captions, list(range(len(captions))), TEACHER)

    # [4 styles * 16 concepts, H, W, 3] -> a column for each concept, a row for each style.
    columns = images.reshape(len(styles), len(SHEET), *images.shape[1:]).transpose(1, 0, 2, 3, 4)
    Image.fromarray(grid(list(columns))).quantize(256).save(path, optimize=True)


def card(rows: dict[str, Any], run: Path, model: Path) -> str:
    """The model card, in Markdown."""
    name = "card_128.md" if "variety" in rows else "card.md"
    template = Path(__file__).with_name(name).read_text(encoding="utf-8")
    facts = {**data(run), **training(model)}
    text = template.format(**facts, steps=TEACHER.steps, guidance=TEACHER.guidance)

    lines = [text, "| captions | images | KID-Lite0 | R@1 (ceiling) | R@5 (ceiling) |"]
    lines.append("|---|---|---|---|---|")
    for split, row in rows["splits"].items():
        first = f"{row['recall@1']:.2f} ({row['ceiling@1']:.2f})"
        fifth = f"{row['recall@5']:.2f} ({row['ceiling@5']:.2f})"
        lines.append(f"| {split} | {row['images']} | {row['kid']:.3f} | {first} | {fifth} |")
    lines.append(
        "\nFloor of KID-Lite0 (training real images against held-out real images): "
        f"{rows['floor']:.3f}.\n"
    )
    if "variety" in rows:
        lines += variety_lines(rows)
    return "\n".join(lines)


def variety_lines(rows: dict[str, Any]) -> list[str]:
    """Variety, nearest training images and the VAE's reconstruction, in Markdown."""
    lines = ["## Variety\n", "| captions | prompts | model | real pictures | share |"]
    lines.append("|---|---|---|---|---|")
    for level, row in rows["variety"].items():
        share = f"{100 * row['model'] / row['real']:.0f} %"
        numbers = f"{row['prompts']} | {row['model']:.3f} | {row['real']:.3f} | {share}"
        lines.append(f"| {level} | {numbers} |")
    lines.append(
        "\nMean paired distance (DISTS-like, Lite0 features) between images of one prompt from"
        " several noises, and between real pictures of that caption. Noise differs too: read this"
        " with KID-Lite0.\n"
    )
    lines += ["## Nearest training image\n", "| images | mean cosine distance |", "|---|---|"]
    for name, distance in rows["nearest"].items():
        lines.append(f"| {name} | {distance:.3f} |")
    lines.append("\nThe model's images are of training captions on white.\n")
    lines.append(f"VAE: {rows['psnr']:.1f} dB PSNR on pictures of held-out concepts.\n")
    return lines


def data(run: Path) -> dict[str, int]:
    """How many concepts and images each split has."""
    emoji = EmojiSet.load(run)
    train = emoji.only("train").rows
    held_out = emoji.only("concept").rows
    return {
        "train_images": len(train),
        "pair_images": len(emoji.only("pair").rows),
        "concept_images": len(held_out),
        "concepts": len({row["concept"] for row in train}),
        "rounds": len(list(run.glob("latents/round-*.pt"))),
        "held_out_concepts": len({row["concept"] for row in held_out}),
    }


def training(model: Path) -> dict[str, Any]:
    """Steps and hours of each part, as write_model.py recorded them."""
    parts = json.loads((model / "training.json").read_text(encoding="utf-8"))
    facts = {}
    for part, values in parts.items():
        for name, value in values.items():
            facts[f"{part}_{name}"] = value
    return facts


def main(
    run: Annotated[Path, typer.Option(help="Folder of the pre-training run.")],
    model: Annotated[Path, typer.Option(help="Model folder that write_model.py wrote.")],
    count: Annotated[int, typer.Option(help="Samples a split, at most.")] = 256,
) -> None:
    """Measure, then write README.md and samples.png into the model folder."""
    write_sheet(model, model / "samples.png")
    text = card(measure(run, model, count), run, model)
    (model / "README.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    typer.run(main)

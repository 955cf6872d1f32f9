"""Assemble the pre-trained parts into the StableDiffusionPipeline folder that the package ships.

    python examples/emoji/write_model.py --run runs/emoji --out hipa_deploy/embedded/model

FP16 safetensors, the prompts of each split beside them. Measure it with measure_model.py, which writes the card.
With --prompts-only it writes the prompts alone, into the model folder that is there.
"""

from __future__ import annotations

import json
from itertools import permutations
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from build_dataset import CONCEPTS, MODULES, STYLES, caption_of, split_of
from common import EmojiSet
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from train_text_encoder import emoji_words
from train_unet import SCHEDULE
from transformers import CLIPTextModel, CLIPTokenizer

from hipa_deploy.files import new_folder

SIZE_LIMIT_BYTES = 25_000_000
WIDE_PROMPTS = 11_008
WORD_STYLES = 2  # in how many styles each word is asked for


def assemble(run: Path, vae: str) -> StableDiffusionPipeline:
    """The parts of a run as one pipeline, in float16."""
    scheduler = DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    pipe = StableDiffusionPipeline(
        tokenizer=CLIPTokenizer.from_pretrained(run / "tokenizer"),
        text_encoder=CLIPTextModel.from_pretrained(run / "text_encoder"),
        unet=UNet2DConditionModel.from_pretrained(run / "unet"),
        vae=AutoencoderKL.from_pretrained(run / vae),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return pipe.to(torch.float16)


def write_prompts(emoji: EmojiSet, modules: Path, out: Path) -> None:
    """prompts.txt (trained on), prompts_pair and _concept (held out), prompts_words and _wide (for adaptors)."""
    splits = {
        name: list(dict.fromkeys(emoji.only(name).captions))
        for name in ("train", "pair", "concept")
    }
    written = {
        "prompts": splits["train"],
        "prompts_pair": splits["pair"],
        "prompts_concept": splits["concept"],
        "prompts_words": blended_prompts(splits["train"]) + word_prompts(modules),
        "prompts_wide": wide_prompts(splits["train"]),
    }
    for name, prompts in written.items():
        (out / f"{name}.txt").write_text("\n".join(prompts) + "\n")


def by_concept(prompts: list[str]) -> dict[str, list[str]]:
    """The styles in which each concept is trained on: those in which it is held out are not among them."""
    styles: dict[str, list[str]] = {}
    for prompt in prompts:
        style, concept = prompt.split(" emoji of ", maxsplit=1)
        styles.setdefault(concept, []).append(style)
    return styles


def blended_prompts(prompts: list[str]) -> list[str]:
    """The prompts, then each concept without a style and in every two styles."""
    blended = list(prompts)
    for concept, known in by_concept(prompts).items():
        twice = [f"{one} {other} emoji of {concept}" for one, other in permutations(known, 2)]
        blended += [f"emoji of {concept}", *twice]
    return blended


def wide_prompts(prompts: list[str]) -> list[str]:
    """The blended prompts, then two concepts in one image, in several styles.

    Adaptors learn from the model's own images of prompts, so that these need no pictures.
    """
    blended = blended_prompts(prompts)
    return blended + two_concepts(by_concept(prompts), WIDE_PROMPTS - len(blended))


def word_prompts(modules: Path) -> list[str]:
    """Names and keywords of emoji that are no concept of the model, in some styles each: its text encoder knows them.

    What belongs to a held-out concept is left out: its name, its keywords, and whatever contains a word of its name
    that no trained concept has.
    """
    entries = [{word.replace("-", " ") for word in words} for words in emoji_words(modules)]
    held_out = {concept for concept in CONCEPTS if split_of(STYLES[0], concept) == "concept"}
    known = {word for concept in CONCEPTS - held_out for word in concept.split()}
    telling = {word for concept in held_out for word in concept.split()} - known
    barred = CONCEPTS.union(*(words for words in entries if words & held_out))
    words = sorted(
        word for word in set().union(*entries) - barred if not any(part in word for part in telling)
    )
    rng = np.random.default_rng(1)
    return [
        caption_of(STYLES[i], word)
        for word in words
        for i in sorted(rng.permutation(len(STYLES))[:WORD_STYLES])
    ]


def two_concepts(styles: dict[str, list[str]], count: int) -> list[str]:
    """At least ``count`` prompts of two concepts each, in every style that both have and in two of them at once."""
    concepts, seen, made = sorted(styles), set[tuple[str, str]](), list[str]()
    rng = np.random.default_rng(0)
    while len(made) < count:
        first, second = (concepts[index] for index in rng.choice(len(concepts), 2, replace=False))
        known = [style for style in styles[first] if style in styles[second]]
        if len(known) < 2 or (first, second) in seen:
            continue
        seen.add((first, second))
        blend = " ".join(rng.permutation(known)[:2])
        made += [f"{style} emoji of {first} and {second}" for style in [*known, blend]]
    return made


def training(run: Path) -> dict[str, dict[str, float]]:
    """Steps and hours of each part: of this run's checkpoints, and of the model it started from, if any."""
    earlier = run / "earlier.json"
    facts = json.loads(earlier.read_text()) if earlier.exists() else {}
    for part in ("text_encoder", "vae", "unet"):
        before = facts.get(part, {"steps": 0, "hours": 0.0})
        if (path := run / part / "state.pt").exists():
            state = torch.load(path, weights_only=True)
            before = {
                "steps": before["steps"] + state["step"],
                "hours": before["hours"] + state["seconds"] / 3600,
            }
        facts[part] = before
    return facts


def forget_paths(model: Path) -> None:
    """Drop from the configurations where the parts happened to lie."""
    for path in model.glob("*/config.json"):
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)
        path.write_text(json.dumps(config, indent=2) + "\n")


def main(
    run: Annotated[Path, typer.Option(help="Folder of the pre-training run.")],
    out: Annotated[Path, typer.Option(help="Model folder to write; must not exist.")],
    vae: Annotated[
        str, typer.Option(help="'vae', or 'vae_decoder' after train_vae.py --decoder-only.")
    ] = "vae",
    modules: Annotated[Path, typer.Option(help="Where npm installed emojilib.")] = MODULES,
    prompts_only: Annotated[
        bool, typer.Option(help="Write the prompts into the folder that is there.")
    ] = False,
) -> None:
    """Write the model folder, whole or not at all."""
    if prompts_only:
        write_prompts(EmojiSet.load(run), modules, out)
        return
    with new_folder(out) as scratch:
        assemble(run, vae).save_pretrained(scratch, safe_serialization=True)
        forget_paths(scratch)
        write_prompts(EmojiSet.load(run), modules, scratch)
        (scratch / "training.json").write_text(json.dumps(training(run), indent=2) + "\n")
        size = sum(path.stat().st_size for path in scratch.rglob("*") if path.is_file())
        if size > SIZE_LIMIT_BYTES:
            raise SystemExit(f"the model takes {size} bytes, more than {SIZE_LIMIT_BYTES}")
    print(f"{out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    typer.run(main)

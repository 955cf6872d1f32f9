"""Assemble the pre-trained parts into the StableDiffusionPipeline folder that the package ships.

    python examples/emoji/write_model.py --run runs/emoji --out hipa_deploy/embedded/model

The weights are FP16 safetensors, with the prompts of each split beside them. measure_model.py then
measures the model and writes its card. With --prompts-only the prompts alone are written, into a
model folder that exists.
"""

from __future__ import annotations

import json
from itertools import permutations
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from augment import SIZE as LARGE
from build_dataset import CONCEPTS, MODULES, split_of
from captions import COLOURS, STYLES, exact_caption, levels, on_background, style_caption
from common import EmojiSet
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from train_text_encoder import emoji_words
from train_unet import SCHEDULE
from transformers import CLIPTextModel, CLIPTokenizer

from hipa_deploy.disk.files import new_folder

SIZE_LIMIT_BYTES = {64: 25_000_000, LARGE: 23_200_000}  # by the size of the images
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
    """Write the files of prompts, one prompt a line.

    prompts.txt was trained on; prompts_pair.txt and prompts_concept.txt are held out;
    prompts_words.txt and prompts_wide.txt are for training adaptors. A model at 128 pixels was also
    trained on prompts_kind.txt and prompts_style.txt.
    """
    train = unique_captions(emoji, "train")
    written = {
        "prompts": train,
        "prompts_pair": unique_captions(emoji, "pair"),
        "prompts_concept": unique_captions(emoji, "concept"),
    }
    if emoji.images_BHWC.shape[1] == LARGE:
        concepts = {row["concept"] for row in emoji.rows}
        kinds = kind_prompts(emoji)
        styles = style_prompts()
        written["prompts_kind"] = kinds
        written["prompts_style"] = styles
        # The kinds and styles first: wide prompts fill up what is left with pairs of concepts.
        coloured = half_on_colours(train) + kinds + styles
        pairs = two_concepts(by_concept(train), WIDE_PROMPTS - len(coloured))
        written["prompts_wide"] = coloured + pairs
        words = half_on_colours(train + word_prompts(modules, concepts))
        written["prompts_words"] = words + kinds + styles
        # Some things have the name of a kind, and that caption was trained on.
        for held_out in ("prompts_pair", "prompts_concept"):
            written[held_out] = [each for each in written[held_out] if each not in kinds]
    else:
        written["prompts_words"] = blended_prompts(train) + word_prompts(modules, CONCEPTS)
        written["prompts_wide"] = wide_prompts(train)
    for name, prompts in written.items():
        (out / f"{name}.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")


def half_on_colours(prompts: list[str]) -> list[str]:
    """Each prompt once, every second one on a background whose colour is drawn at random."""
    rng = np.random.default_rng(2)
    written = []
    for number, prompt in enumerate(prompts):
        colour = COLOURS[rng.integers(len(COLOURS))] if number % 2 else ""
        written.append(on_background(prompt, colour))
    return written


def kind_prompts(emoji: EmojiSet) -> list[str]:
    """The kinds of the training split in each style, on white and on each colour."""
    captions = {}
    for row in emoji.only("train").rows:
        for colour in ("", *COLOURS):
            captions[levels(row["style"], row["concept"], row["kind"], colour)[1]] = None
    return list(captions)


def style_prompts() -> list[str]:
    """Each style alone, on white and on each colour."""
    captions = []
    for style in STYLES:
        for colour in ("", *COLOURS):
            captions.append(on_background(style_caption(style), colour))
    return captions


def unique_captions(emoji: EmojiSet, split: str) -> list[str]:
    """The captions of a split, each once, in order."""
    return list(dict.fromkeys(emoji.only(split).captions))


def by_concept(prompts: list[str]) -> dict[str, list[str]]:
    """The styles in which each concept is trained on, without those in which it is held out."""
    styles: dict[str, list[str]] = {}
    for prompt in prompts:
        style, concept = prompt.split(" emoji of ", maxsplit=1)
        styles.setdefault(concept, []).append(style)
    return styles


def blended_prompts(prompts: list[str]) -> list[str]:
    """The prompts, then each concept without a style and in every two styles."""
    blended = list(prompts)
    for concept, known in by_concept(prompts).items():
        blended.append(f"emoji of {concept}")
        for one, other in permutations(known, 2):
            blended.append(f"{one} {other} emoji of {concept}")
    return blended


def wide_prompts(prompts: list[str]) -> list[str]:
    """The blended prompts, then two concepts in one image, in several styles.

    Adaptors learn from the model's own images of prompts, so that these need no pictures.
    """
    blended = blended_prompts(prompts)
    return blended + two_concepts(by_concept(prompts), WIDE_PROMPTS - len(blended))


def word_prompts(modules: Path, concepts: set[str]) -> list[str]:
    """Names and keywords of emoji that are none of the model's concepts, in some styles each.

    The text encoder knows these words. What belongs to a held-out concept is left out: its name,
    its keywords, and whatever contains a word of its name that no trained concept has.
    """
    entries = [{word.replace("-", " ") for word in words} for words in emoji_words(modules)]
    held_out = {concept for concept in concepts if split_of(STYLES[0], concept) == "concept"}

    # Words that occur in the names of held-out concepts alone: they would give a concept away.
    revealing = words_of(held_out) - words_of(concepts - held_out)

    # Every name and keyword, without the concepts themselves and what describes a held-out one.
    candidates: set[str] = set()
    excluded = set(concepts)
    for words in entries:
        candidates |= words
        if words & held_out:
            excluded |= words
    allowed = []
    for word in sorted(candidates - excluded):
        if not any(part in word for part in revealing):
            allowed.append(word)

    # Styles are drawn at random, word after word, from one seeded generator.
    rng = np.random.default_rng(1)
    prompts = []
    for word in allowed:
        for style in sorted(rng.permutation(len(STYLES))[:WORD_STYLES]):
            prompts.append(exact_caption(STYLES[style], word))
    return prompts


def words_of(concepts: set[str]) -> set[str]:
    """Every single word of the concepts' names."""
    return set(" ".join(concepts).split())


def two_concepts(styles: dict[str, list[str]], count: int) -> list[str]:
    """At least ``count`` prompts of two concepts each.

    A pair of concepts is prompted in every style that both have, and in two of them at once.
    """
    concepts = sorted(styles)
    seen: set[tuple[str, str]] = set()
    made: list[str] = []
    rng = np.random.default_rng(0)
    while len(made) < count:
        first, second = [concepts[index] for index in rng.choice(len(concepts), 2, replace=False)]
        known = [style for style in styles[first] if style in styles[second]]
        if len(known) < 2 or (first, second) in seen:
            continue
        seen.add((first, second))
        blend = " ".join(rng.permutation(known)[:2])
        made += [f"{style} emoji of {first} and {second}" for style in [*known, blend]]
    return made


def training(run: Path) -> dict[str, dict[str, float]]:
    """Steps and hours of each part, those of the model that this run started from included."""
    earlier = run / "earlier.json"
    facts = json.loads(earlier.read_text(encoding="utf-8")) if earlier.exists() else {}
    for part in ("text_encoder", "vae", "unet"):
        total = facts.get(part, {"steps": 0, "hours": 0.0})
        path = run / part / "state.pt"
        if path.exists():
            state = torch.load(path, weights_only=True)
            total = {
                "steps": total["steps"] + state["step"],
                "hours": total["hours"] + state["seconds"] / 3600,
            }
        facts[part] = total
    return facts


def forget_paths(model: Path) -> None:
    """Remove the paths of the run's folder from the configurations: elsewhere they mean nothing."""
    for path in model.glob("*/config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


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
    emoji = EmojiSet.load(run)
    if prompts_only:
        write_prompts(emoji, modules, out)
        return
    with new_folder(out) as scratch:
        assemble(run, vae).save_pretrained(scratch, safe_serialization=True)
        forget_paths(scratch)
        write_prompts(emoji, modules, scratch)
        (scratch / "training.json").write_text(
            json.dumps(training(run), indent=2) + "\n", encoding="utf-8"
        )
        size = sum(path.stat().st_size for path in scratch.rglob("*") if path.is_file())
        limit = SIZE_LIMIT_BYTES[emoji.images_BHWC.shape[1]]
        if size > limit:
            raise SystemExit(f"the model takes {size} bytes, more than {limit}")
    print(f"{out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    typer.run(main)

"""Train the embedded model's tokenizer and CLIP text encoder.

    python examples/emoji/train_text_encoder.py --run runs/emoji

The tokenizer is CLIP's byte-pair encoding with its own merges, learned from the captions and
keywords. The encoder is taught what words mean before the UNet is trained: its pooled output learns
to agree with MiniLM's sentence vectors (of all names and keywords, text only) and, as in CLIP, with
EfficientNet-Lite0 features of the training images.

A set at 128 pixels has captions of three levels, with backgrounds: the encoder learns these too.
With ``--start`` it keeps an earlier model's tokenizer, and begins with its weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from augment import Pictures
from build_dataset import MODULES
from captions import COLOURS, levels
from common import EmojiSet, Run, set_learning_rate, to_pixels, warmup_stable_decay
from minilm import sentence_vectors
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from hipa_deploy.train.losses.lite0 import Lite0

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
# OpenAI CLIP's word pattern (clip/simple_tokenizer.py) without its special tokens.
WORDS = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
CONTEXT = 77
# Captions have fewer. The UNet sees the padding beyond them too; its positions stay untrained.
TRAINED_TOKENS = 16
TRAINED_TOKENS_LARGE = 24  # with '… on a blue background'
WIDTH = 192


def train_tokenizer(texts: list[str], folder: Path, merges: int = 1600) -> CLIPTokenizer:
    """Learn a byte-pair encoding with CLIP's vocabulary order, and write it to ``folder``.

    The order is: 256 bytes, the same 256 at the end of a word, the merges, two special tokens.
    """
    # Text is split into words as CLIP does, then merges are learned inside the words.
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(WORDS, "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=512 + merges,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)

    # The library's own vocabulary has another order; CLIP's follows from the merges.
    pairs = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    ending = [letter + "</w>" for letter in alphabet]
    merged = [first + second for first, second in pairs]
    words = dict.fromkeys([*alphabet, *ending, *merged, BOS, EOS])
    vocabulary = {word: number for number, word in enumerate(words)}

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in pairs)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=CONTEXT
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A small CLIP text encoder with random weights."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=6,
        max_position_embeddings=CONTEXT,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        hidden_act="quick_gelu",
    )
    return CLIPTextModel(config)


def all_texts(modules: Path, captions: list[str]) -> list[str]:
    """Captions, emoji names and keywords: words only, no image of a held-out concept."""
    words: set[str] = set()
    for entry in emoji_words(modules):
        words.update(entry)
    return captions + sorted(words)


def emoji_words(modules: Path) -> list[list[str]]:
    """The name of each emoji, then its keywords: of ASCII, with letters, short."""
    names = json.loads((modules / "emojilib/dist/emoji-en-US.json").read_text(encoding="utf-8"))
    entries = []
    for entry in names.values():
        words = [word.replace("_", " ").lower() for word in entry]
        entries.append([word for word in words if _is_plain(word)])
    return entries


def _is_plain(word: str) -> bool:
    has_letter = any(letter.isalpha() for letter in word)
    return word.isascii() and has_letter and len(word) < 40


@torch.no_grad()
def image_features(pixels_BCHW: torch.Tensor) -> torch.Tensor:
    """Pooled Lite0 features [B, 1280] of pixels in [-1, 1]."""
    model = Lite0.pretrained()
    return torch.cat([model.pooled(chunk.add(1).div(2)) for chunk in pixels_BCHW.split(64)])


def tokens_of(tokenizer: CLIPTokenizer, texts: list[str], length: int) -> torch.Tensor:
    """Token ids int64 [N, length], padded or cut."""
    return tokenizer(
        texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids


def small_set(run: Path) -> tuple[list[str], list[str], torch.Tensor]:
    """Of the set at 64 pixels: all captions, those of the training split, and its pixels."""
    emoji = EmojiSet.load(run)
    train = emoji.only("train")
    return sorted(set(emoji.captions)), train.captions, train.pixels_BCHW()


def large_set(run: Path) -> tuple[list[str], list[str], torch.Tensor]:
    """The same at 128 pixels, where each training emoji is drawn once, at random."""
    rng = np.random.default_rng(0)
    texts = set()
    for number, row in enumerate(EmojiSet.load(run).rows):
        texts.update(levels(row["style"], row["concept"], row["kind"]))
        # A background is the same words after any caption: some captions are enough.
        if number % 4 == 0:
            colour = COLOURS[rng.integers(len(COLOURS))]
            texts.update(levels(row["style"], row["concept"], row["kind"], colour))
    pictures = Pictures(run, "train")
    images_BHWC, colours = pictures.draw_batch(range(len(pictures)), rng)
    captions = []
    for row, colour in zip(pictures.rows, colours, strict=True):
        captions.append(levels(row["style"], row["concept"], row["kind"], colour)[0])
    return sorted(texts), captions, to_pixels(images_BHWC)


def main(
    run: Annotated[
        Path, typer.Option(help="Folder with emoji.npz; writes tokenizer/ and text_encoder/.")
    ],
    modules: Annotated[Path, typer.Option(help="Where npm installed emojilib.")] = MODULES,
    steps: int = 260,
    batch: int = 96,
    rate: float = 1e-3,
    start: Annotated[
        Path | None, typer.Option(help="A model whose tokenizer and text encoder to start from.")
    ] = None,
) -> None:
    """Train the tokenizer, then the text encoder."""
    torch.manual_seed(0)
    large = (run / "sprites.npy").exists()
    every_caption, train_captions, train_pixels = large_set(run) if large else small_set(run)
    texts = all_texts(modules, every_caption)
    if start:
        tokenizer = CLIPTokenizer.from_pretrained(start, subfolder="tokenizer")
        tokenizer.save_pretrained(run / "tokenizer")
    else:
        tokenizer = train_tokenizer(texts, run / "tokenizer")
    length = TRAINED_TOKENS_LARGE if large else TRAINED_TOKENS
    tokens = tokens_of(tokenizer, texts, length)
    caption_tokens = tokens_of(tokenizer, train_captions, length)

    # What the encoder is to agree with: sentence vectors and image features, both unit vectors.
    meaning = sentence_vectors(texts)
    looks = F.normalize(image_features(train_pixels), dim=-1)

    # Linear heads bring the three kinds of vectors to a common width; only the encoder is kept.
    if start:
        encoder = CLIPTextModel.from_pretrained(start, subfolder="text_encoder").float()
    else:
        encoder = new_text_encoder(tokenizer)
    heads = torch.nn.ModuleDict(
        {
            "meaning": torch.nn.Linear(WIDTH, 384),
            "caption": torch.nn.Linear(WIDTH, 256),
            "image": torch.nn.Linear(1280, 256),
        }
    )
    parameters = [*encoder.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.05)
    state = Run(
        run / "text_encoder", {"encoder": encoder, "heads": heads}, optimizer, steps, ema_decay=0.99
    )
    state.resume()
    for index, generator in state.batches(batch, len(texts)):
        set_learning_rate(
            optimizer, rate * warmup_stable_decay(state.step, steps, warmup=50, decay=0.5)
        )

        # Meaning: the angle to MiniLM's vector of the same text.
        pooled = encoder(tokens[index]).pooler_output
        distil = 1 - F.cosine_similarity(heads["meaning"](pooled), meaning[index]).mean()

        # Looks: CLIP's loss over a batch of captions and their images.
        pick = torch.randint(len(looks), (batch,), generator=generator)
        caption = F.normalize(heads["caption"](encoder(caption_tokens[pick]).pooler_output), dim=-1)
        image = F.normalize(heads["image"](looks[pick]), dim=-1)
        logits = 20 * caption @ image.T
        truth = torch.arange(batch)
        contrast = (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2

        (4 * distil + contrast).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        state.show(distil=distil, contrast=contrast)
    encoder.load_state_dict(state.ema["encoder"])
    encoder.save_pretrained(run / "text_encoder")


if __name__ == "__main__":
    typer.run(main)

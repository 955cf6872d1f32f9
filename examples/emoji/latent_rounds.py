"""The training set of the UNet at 128 pixels: latents of drawn pictures, contexts of captions.

A round has one random picture of every emoji of the training split, as latents. The training begins
with a few rounds and encodes another one now and then: so it begins early, and an emoji is never
seen in the same few pictures for long. All files stay in the run's folder.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from augment import Pictures
from captions import COLOURS, levels
from common import to_pixels
from diffusers import AutoencoderKL
from transformers import CLIPTextModel, CLIPTokenizer

FIRST_ROUNDS = 3  # encoded before the first step
MOST_ROUNDS = 24
STEPS_A_ROUND = 600
# Shares of the exact, kind and style captions among the captions that are not dropped.
LEVEL_SHARES = torch.tensor([0.60, 0.28, 0.12])


def rounds_at(step: int) -> int:
    """How many rounds the training draws from at this step."""
    return min(MOST_ROUNDS, FIRST_ROUNDS + step // STEPS_A_ROUND)


def kind_weights(rows: list[dict[str, str]]) -> torch.Tensor:
    """How often the emoji of each row is drawn.

    A kind counts with the root of its size: otherwise every seventh picture is a flag, or a person
    at work.
    """
    kinds = [row["kind"] for row in rows]
    return torch.tensor([kinds.count(kind) ** -0.5 for kind in kinds])


class LatentRounds:
    """Scaled latents of random pictures, and the backgrounds of these pictures."""

    def __init__(self, run: Path) -> None:
        """Open the run; nothing is encoded yet."""
        self.pictures = Pictures(run, "train")
        self._folder = run / "latents"
        self._folder.mkdir(exist_ok=True)
        self._vae = AutoencoderKL.from_pretrained(run / "vae").eval()
        self._latents: list[torch.Tensor] = []
        self._colours: list[list[str]] = []

    def extend(self, rounds: int) -> None:
        """Load rounds, and encode those that no earlier run has encoded."""
        while len(self._latents) < rounds:
            number = len(self._latents)
            path = self._folder / f"round-{number:02}.pt"
            if not path.exists():
                torch.save(self._encode(number), path.with_suffix(".tmp"))
                path.with_suffix(".tmp").replace(path)
            saved = torch.load(path, weights_only=True)
            self._latents.append(saved["latents"])
            self._colours.append(saved["colours"])

    @torch.no_grad()
    def _encode(self, number: int) -> dict[str, object]:
        """One picture of every emoji: float16 latents [N, 4, 16, 16] and N colours."""
        rng = np.random.default_rng((number, 128))
        latents = []
        colours = []
        for indices in torch.arange(len(self.pictures)).split(32):
            images_BHWC, names = self.pictures.draw_batch(indices.tolist(), rng)
            mean = self._vae.encode(to_pixels(images_BHWC)).latent_dist.mean
            latents.append((mean * self._vae.config.scaling_factor).half())
            colours += names
        return {"latents": torch.cat(latents), "colours": colours}

    def weights(self) -> torch.Tensor:
        """How often each emoji is drawn."""
        return kind_weights(self.pictures.rows)

    def batch(
        self, index: torch.Tensor, rounds: int, generator: torch.Generator
    ) -> tuple[torch.Tensor, list[tuple[str, str, str]]]:
        """Latents float32 [B, 4, 16, 16], and the captions of the three levels of each."""
        which = torch.randint(rounds, (len(index),), generator=generator)
        latents = []
        captions = []
        for number, emoji in zip(which.tolist(), index.tolist(), strict=True):
            row = self.pictures.rows[emoji]
            latents.append(self._latents[number][emoji])
            colour = self._colours[number][emoji]
            captions.append(levels(row["style"], row["concept"], row["kind"], colour))
        return torch.stack(latents).float(), captions


class CaptionContexts:
    """The text encoder's output for every caption of the training split, encoded once.

    float16 on disk, [captions, 77, width], read as needed: it is larger than one would like to keep
    in memory.
    """

    def __init__(self, run: Path, rows: list[dict[str, str]]) -> None:
        """Encode all captions, unless an earlier run has."""
        captions = {"": None}
        for row in rows:
            for colour in ("", *COLOURS):
                for caption in levels(row["style"], row["concept"], row["kind"], colour):
                    captions[caption] = None
        self._numbers = {caption: number for number, caption in enumerate(captions)}
        path = run / "latents" / "contexts.npy"
        if not path.exists():
            _write_contexts(run, list(captions), path)
        self._contexts = np.load(path, mmap_mode="r")
        if len(self._contexts) != len(captions):
            raise SystemExit(f"{path} belongs to another set of captions. Remove it.")

    def of(self, captions: list[str]) -> torch.Tensor:
        """float32 [B, 77, width]."""
        numbers = [self._numbers[caption] for caption in captions]
        return torch.from_numpy(self._contexts[numbers]).float()


@torch.no_grad()
def _write_contexts(run: Path, captions: list[str], path: Path) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(run / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(run / "text_encoder").eval()
    shape = (len(captions), 77, encoder.config.hidden_size)
    scratch = path.with_suffix(".tmp")
    contexts = np.lib.format.open_memmap(scratch, "w+", dtype=np.float16, shape=shape)
    for start in range(0, len(captions), 256):
        chunk = captions[start : start + 256]
        tokens = tokenizer(
            chunk, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        ).input_ids
        hidden = encoder(tokens).last_hidden_state
        contexts[start : start + len(chunk)] = hidden.half().numpy()
    contexts.flush()
    scratch.replace(path)


def choose_captions(
    captions: list[tuple[str, str, str]], dropout: float, generator: torch.Generator
) -> list[str]:
    """One caption of each picture, of a random level; some are replaced by the empty one."""
    level = torch.multinomial(LEVEL_SHARES, len(captions), True, generator=generator)
    dropped = torch.rand(len(captions), generator=generator) < dropout
    chosen = []
    for number, texts in enumerate(captions):
        chosen.append("" if dropped[number] else texts[level[number]])
    return chosen

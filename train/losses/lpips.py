"""LPIPS, a perceptual distance that compares features place by place, with a pluggable backbone.

    D = sum_i mean_hw sum_c w_ic ( x_ic - y_ic )^2

x and y are the feature maps of the two images, divided by their length over the channels at each
place. Zhang et al. 2018, 'The Unreasonable Effectiveness of Deep Features as a Perceptual Metric',
equation 1; https://github.com/richzhang/PerceptualSimilarity. The published weights w, 'linear
heads', are those of VGG16's channels: with that backbone this is LPIPS (version 0.1, VGG). With any
other backbone w = 1, as in that repository's baseline: 'LPIPS-like', and its values are not LPIPS
scores.

Shape suffixes: B batch, C channels, H W size of an image or a feature map.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor, nn

from hipa_deploy.train.losses.backbones import Backbone, load_backbone, resized

# Added to the squared length, as torchmetrics does: the gradient of a zero vector stays finite.
EPSILON = 1e-8


class LpipsLike(nn.Module):
    """Distance between images in [0, 1], differentiable: 0 when equal.

    Args:
        backbone: Image [B, 3, H, W] -> feature maps. Default: EfficientNet-Lite0.
        size: Resize the short side to this first. Default: the image's own size.
        heads: The weights w of each map's channels, [C_i] each. Default: all 1.

    Example:
        >>> distance = LpipsLike()
        >>> distance(torch.rand(2, 3, 64, 64), torch.rand(2, 3, 64, 64)).shape
        torch.Size([2])

    """

    def __init__(
        self,
        backbone: Backbone | None = None,
        size: int | None = None,
        heads: Sequence[Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone or load_backbone("lite0")
        self.size = size
        self.heads: nn.ParameterList | None = None
        if heads is not None:
            # Parameters and not a plain list, so that .to(device) moves them.
            self.heads = nn.ParameterList(nn.Parameter(h, requires_grad=False) for h in heads)

    def forward(self, image01_BCHW: Tensor, target01_BCHW: Tensor) -> Tensor:
        """Distance of each pair, [B]."""
        return self.distance(self.maps(image01_BCHW), self.maps(target01_BCHW))

    def maps(self, image01_BCHW: Tensor) -> list[Tensor]:
        """The image's feature maps, [B, C_i, H_i, W_i] each."""
        return list(self.backbone(resized(image01_BCHW, self.size)))

    def distance(self, maps: Sequence[Tensor], target_maps: Sequence[Tensor]) -> Tensor:
        """Distance of each pair, [B], from the ``maps`` of its images."""
        heads = None if self.heads is None else list(self.heads)
        return lpips_distance(maps, target_maps, heads)


def lpips_distance(
    maps: Sequence[Tensor], target_maps: Sequence[Tensor], heads: Sequence[Tensor] | None = None
) -> Tensor:
    """D of each pair, [B].

    Args:
        maps: Feature maps, [B, C_i, H_i, W_i] each.
        target_maps: The same of the targets.
        heads: The weights w, [C_i] each. Default: all 1.

    """
    # At unit length the pattern over the channels counts, not how strong all of them are.
    squares = [(_unit(x) - _unit(y)).square() for x, y in zip(maps, target_maps, strict=True)]
    if heads is not None:
        pairs = zip(squares, heads, strict=True)
        squares = [square * head.view(1, -1, 1, 1) for square, head in pairs]
    return reduce(torch.add, (square.sum(dim=1).mean(dim=(1, 2)) for square in squares))


def _unit(map_BCHW: Tensor) -> Tensor:
    """The map with length 1 over the channels at each place."""
    return map_BCHW / (map_BCHW.square().sum(dim=1, keepdim=True) + EPSILON).sqrt()

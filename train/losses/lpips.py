"""LPIPS, a perceptual distance of features place by place, with a pluggable backbone.

    D = sum_i mean_hw sum_c w_ic ( x_ic - y_ic )^2,    x, y divided by their length over the channels at each place

Zhang et al. 2018, 'The Unreasonable Effectiveness of Deep Features as a Perceptual Metric', equation 1;
https://github.com/richzhang/PerceptualSimilarity. The published linear heads w weigh VGG16's channels: with that
backbone this is LPIPS (version 0.1, VGG). With any other w = 1, as in that repository's baseline: 'LPIPS-like'.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from hipa_deploy.train.losses.backbones import Backbone, load_backbone, resized

EPSILON = 1e-8  # added to the squared length, as torchmetrics does: the gradient of a zero vector stays finite


class LpipsLike(nn.Module):
    """Distance between images in [0, 1], differentiable: 0 when equal.

    ``backbone`` defaults to EfficientNet-Lite0. With ``size`` the short side is resized first. ``heads`` are the
    weights of each map's channels, [C_i]; all 1 when left out.
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
        self.heads = (
            None
            if heads is None
            else nn.ParameterList(nn.Parameter(h, requires_grad=False) for h in heads)
        )

    def forward(self, image01_BCHW: Tensor, target01_BCHW: Tensor) -> Tensor:
        """Distance of each pair, [B]."""
        return self.between(self.maps(image01_BCHW), self.maps(target01_BCHW))

    def maps(self, image01_BCHW: Tensor) -> list[Tensor]:
        """The image's feature maps."""
        return list(self.backbone(resized(image01_BCHW, self.size)))

    def between(self, maps: Sequence[Tensor], target_maps: Sequence[Tensor]) -> Tensor:
        """Distance of each pair, [B], from the maps of its images."""
        return lpips_distance(maps, target_maps, self.heads)


def lpips_distance(
    maps: Sequence[Tensor], target_maps: Sequence[Tensor], heads: Sequence[Tensor] | None = None
) -> Tensor:
    """D of each pair, [B]; the heads [C_i] are 1 when left out."""
    squares = [(_unit(x) - _unit(y)).square() for x, y in zip(maps, target_maps, strict=True)]
    if heads is not None:
        squares = [
            square * head.view(1, -1, 1, 1) for square, head in zip(squares, heads, strict=True)
        ]
    return sum(square.sum(dim=1).mean(dim=(1, 2)) for square in squares)


def _unit(map_BCHW: Tensor) -> Tensor:
    return map_BCHW / (map_BCHW.square().sum(dim=1, keepdim=True) + EPSILON).sqrt()

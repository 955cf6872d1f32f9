"""DISTS, a perceptual distance of structure and texture, with a pluggable backbone.

    D = 1 - sum_i sum_c ( alpha_ic S1_ic + beta_ic S2_ic ),    sum alpha + sum beta = 1
    S1 = (2 mx my + c1) / (mx^2 + my^2 + c1)      texture: the means of a feature map agree
    S2 = (2 cov + c2) / (vx + vy + c2)            structure: the maps correlate
    c1 = c2 = 1e-6

Ding et al. 2020, 'Image Quality Assessment: Unifying Structure and Texture Similarity', equations 4
to 8; https://github.com/dingkeyan93/DISTS. The published alpha and beta weigh VGG16's channels:
with that backbone this is DISTS. With any other backbone all channels weigh the same: 'DISTS-like',
and its values are not DISTS scores.

HiPA (arXiv 2311.18158) has a spatial perceptual loss; that it is DISTS is likely, not known.

Shape suffixes: B batch, C channels, H W size of an image or a feature map.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor, nn

from hipa_deploy.errors import HipaError
from hipa_deploy.train.losses.backbones import (
    Backbone,
    load_backbone,
    published_dists,
    published_lpips,
    resized,
)
from hipa_deploy.train.losses.lpips import LpipsLike

C1 = C2 = 1e-6


class DistsLike(nn.Module):
    """Distance between images in [0, 1], differentiable: 0 when equal, about 1 when nothing agrees.

    Args:
        backbone: Image [B, 3, H, W] -> feature maps. Default: EfficientNet-Lite0.
        size: Resize the short side to this first; the official DISTS evaluation uses 256. Default:
            the image's own size.
        weights: alpha and beta of all channels, [channels] each, those of the image first. Default:
            all channels weigh the same.

    Example:
        >>> distance = DistsLike()
        >>> distance(torch.rand(2, 3, 64, 64), torch.rand(2, 3, 64, 64)).shape
        torch.Size([2])

    """

    alpha: Tensor | None
    beta: Tensor | None

    def __init__(
        self,
        backbone: Backbone | None = None,
        size: int | None = None,
        weights: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__()
        # A backbone that is a module becomes a submodule, so that .to(device) moves it.
        self.backbone = backbone or load_backbone("lite0")
        self.size = size
        alpha, beta = weights or (None, None)
        self.register_buffer("alpha", alpha)
        self.register_buffer("beta", beta)

    def forward(self, image01_BCHW: Tensor, target01_BCHW: Tensor) -> Tensor:
        """Distance of each pair, [B]."""
        return self.distance(self.maps(image01_BCHW), self.maps(target01_BCHW))

    def maps(self, image01_BCHW: Tensor) -> list[Tensor]:
        """The image itself, which is DISTS' first stage, and its feature maps."""
        image01_BCHW = resized(image01_BCHW, self.size)
        return [image01_BCHW, *self.backbone(image01_BCHW)]

    def distance(self, maps: Sequence[Tensor], target_maps: Sequence[Tensor]) -> Tensor:
        """Distance of each pair, [B], from the ``maps`` of its images."""
        return dists_distance(maps, target_maps, self.alpha, self.beta)


def perceptual_distance(
    kind: str, backbone: str = "lite0", size: int | None = None
) -> DistsLike | LpipsLike:
    """The perceptual distance that a recipe names.

    The published channel weights are used with vgg16, which they were fitted to. With any other
    backbone all channels weigh the same.

    Args:
        kind: 'dists' or 'lpips'.
        backbone: A name for ``load_backbone``: lite0, vgg16 or module:function.
        size: Resize the short side to this first.

    Raises:
        HipaError: a package or its weights are missing, or there is no such distance.

    """
    # The pooling is part of the distance: DISTS replaces VGG16's maximum, LPIPS keeps it.
    published = backbone == "vgg16"
    if kind == "dists":
        weights = published_dists() if published else None
        return DistsLike(load_backbone(backbone, "l2"), size, weights)
    if kind == "lpips":
        heads = published_lpips() if published else None
        return LpipsLike(load_backbone(backbone, "max"), size, heads)
    raise HipaError(f"perceptual loss {kind!r} is unknown. Expected dists or lpips.")


def dists_distance(
    maps: Sequence[Tensor],
    target_maps: Sequence[Tensor],
    alpha_C: Tensor | None = None,
    beta_C: Tensor | None = None,
) -> Tensor:
    """1 - sum(alpha S1 + beta S2) of each pair, [B] (DISTS, equations 6 to 8).

    Args:
        maps: Feature maps, [B, C_i, H_i, W_i] each.
        target_maps: The same of the targets.
        alpha_C: alpha of the channels of all maps in turn, [sum C_i].
        beta_C: beta of the same. Without alpha or beta, both are 1 / (2 sum C_i) everywhere.

    """
    # The similarities of all channels of all maps form one weighted sum: the published weights are
    # normalised over all of them, not for each map.
    channels = [features.shape[1] for features in maps]
    pairs = [_similarities(x, y) for x, y in zip(maps, target_maps, strict=True)]
    if alpha_C is None or beta_C is None:
        similarity_B = reduce(torch.add, ((s1 + s2).sum(dim=1) for s1, s2 in pairs))
        return 1 - similarity_B / (2 * sum(channels))

    weights = zip(pairs, alpha_C.split(channels), beta_C.split(channels), strict=True)
    return 1 - reduce(torch.add, ((a * s1 + b * s2).sum(dim=1) for (s1, s2), a, b in weights))


def _similarities(x_BCHW: Tensor, y_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Texture S1 and structure S2 of each channel, [B, C] each."""
    # Biased variances, and the covariance as E[xy] - E[x] E[y], as in the authors' code.
    mean_x = x_BCHW.mean(dim=(2, 3))
    mean_y = y_BCHW.mean(dim=(2, 3))
    variance_x = x_BCHW.var(dim=(2, 3), correction=0)
    variance_y = y_BCHW.var(dim=(2, 3), correction=0)
    covariance = (x_BCHW * y_BCHW).mean(dim=(2, 3)) - mean_x * mean_y
    texture = (2 * mean_x * mean_y + C1) / (mean_x.square() + mean_y.square() + C1)
    structure = (2 * covariance + C2) / (variance_x + variance_y + C2)
    return texture, structure

"""A DISTS-like perceptual distance with a pluggable backbone.

The structure and texture terms are those of DISTS (Ding et al. 2020, 'Image Quality Assessment: Unifying Structure
and Texture Similarity', https://github.com/dingkeyan93/DISTS). The published alpha and beta weigh the channels of
VGG16, which no package carries, so all channels weigh the same here: 'DISTS-like', and its values are not DISTS scores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from hipa_deploy.train.lite0 import Lite0

Backbone = Callable[[Tensor], Sequence[Tensor]]  # image in [0, 1], [B, 3, H, W] -> feature maps [B, C_i, H_i, W_i]
C1 = C2 = 1e-6


class DistsLike(nn.Module):
    """Distance between images in [0, 1], differentiable: 0 when equal, about 1 when nothing agrees.

    ``backbone`` defaults to EfficientNet-Lite0; the image itself is the first stage, as in DISTS. With ``size`` the
    short side is resized first (the official DISTS evaluation uses 256).
    """

    def __init__(self, backbone: Backbone | None = None, size: int | None = None) -> None:
        super().__init__()
        if backbone is None:
            self.lite0 = Lite0.pretrained()  # a submodule, so that .to(device) moves it
            backbone = self.lite0.features
        self.backbone = backbone
        self.size = size

    def forward(self, image01_BCHW: Tensor, target01_BCHW: Tensor) -> Tensor:
        """Distance of each pair, [B]."""
        return dists_distance(self.maps(image01_BCHW), self.maps(target01_BCHW))

    def maps(self, image01_BCHW: Tensor) -> list[Tensor]:
        """The image and its feature maps."""
        if self.size is not None:
            scale = self.size / min(image01_BCHW.shape[-2:])
            image01_BCHW = F.interpolate(image01_BCHW, scale_factor=scale, mode="bilinear", antialias=True)
        return [image01_BCHW, *self.backbone(image01_BCHW)]


def dists_distance(maps: Sequence[Tensor], target_maps: Sequence[Tensor]) -> Tensor:
    """1 - sum(alpha S1 + beta S2) with alpha = beta = 1 / (2 channels): [B] (DISTS, equations 6 to 8)."""
    channels = sum(features.shape[1] for features in maps)
    similarity = sum(
        (structure + texture).sum(dim=1)
        for structure, texture in (_similarities(x, y) for x, y in zip(maps, target_maps, strict=True))
    )
    return 1 - similarity / (2 * channels)


def _similarities(x_BCHW: Tensor, y_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Texture S1 (means agree) and structure S2 (maps correlate) of each channel, [B, C]."""
    mean_x, mean_y = x_BCHW.mean(dim=(2, 3)), y_BCHW.mean(dim=(2, 3))
    variance_x = x_BCHW.var(dim=(2, 3), correction=0)
    variance_y = y_BCHW.var(dim=(2, 3), correction=0)
    covariance = (x_BCHW * y_BCHW).mean(dim=(2, 3)) - mean_x * mean_y
    texture = (2 * mean_x * mean_y + C1) / (mean_x.square() + mean_y.square() + C1)
    structure = (2 * covariance + C2) / (variance_x + variance_y + C2)
    return texture, structure

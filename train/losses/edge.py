"""The edge term of the high-frequency promoted loss (HiPA, arXiv 2311.18158, names edge information, not the operator).

    L_E = mean | E(image) - E(target) |,    E linear: Sobel-x and Sobel-y, or the Laplacian

This project's choice: the responses themselves rather than the gradient's magnitude, which is singular where an image
is flat. Sobel & Feldman 1968; the Laplacian is the five-point stencil. Images are float [B, C, H, W] in [0, 1].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hipa_deploy.train.losses.frequency import dissimilarity

WINDOW = 8  # pixels


def sobel(image_BCHW: Tensor) -> Tensor:
    """Sobel-x and Sobel-y of every channel, scaled so that a ramp gives its slope per pixel: [B, 2 C, H - 2, W - 2]."""
    across = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 8
    return _filter(image_BCHW, torch.stack([across, across.T]))


def laplacian(image_BCHW: Tensor) -> Tensor:
    """d2/dx2 + d2/dy2 of every channel, per pixel squared: [B, C, H - 2, W - 2]."""
    return _filter(image_BCHW, torch.tensor([[[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]]]))


OPERATORS = {"sobel": sobel, "laplacian": laplacian}


def edge_loss(image_BCHW: Tensor, target_BCHW: Tensor, operator: str = "sobel") -> Tensor:
    """L_E with an operator of OPERATORS, a scalar."""
    return OPERATORS[operator](image_BCHW - target_BCHW).abs().mean()


def edge_similarity_loss(
    image_BCHW: Tensor, target_BCHW: Tensor, operator: str = "sobel"
) -> Tensor:
    """L_E as a similarity: mean over windows of 1 - (2 <E(x), E(y)> + c) / (|E(x)|^2 + |E(y)|^2 + c), a scalar.

    As frequency.fourier_similarity_loss: least where edges are as strong as the target's, whatever they share.
    """
    image, target = OPERATORS[operator](image_BCHW), OPERATORS[operator](target_BCHW)
    cross, own, other = (
        F.avg_pool2d(power, WINDOW, WINDOW // 2) for power in (image * target, image**2, target**2)
    )
    return dissimilarity(cross, own, other)


def _filter(image_BCHW: Tensor, kernels_KHW: Tensor) -> Tensor:
    channels = image_BCHW.shape[1]
    weight = kernels_KHW.to(image_BCHW).unsqueeze(1).repeat(channels, 1, 1, 1)
    return F.conv2d(image_BCHW, weight, groups=channels)

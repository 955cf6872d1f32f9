"""The edge term of the high-frequency promoted loss.

    L_E = mean | E(image) - E(target) |,    E linear: Sobel-x and Sobel-y, or the Laplacian

HiPA (arXiv 2311.18158) names edge information, not the operator (docs/explanation/hipa.md). This
project's
choice: the responses themselves, not the gradient's magnitude, which has no derivative where an
image is flat. Sobel & Feldman 1968; the Laplacian is the five-point stencil.

Shape suffixes: B batch, C channels, H W image size, K filters. Images are float, in [0, 1].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hipa_deploy.train.losses.frequency import dissimilarity

WINDOW = 8  # pixels: the side of a window of the similarity; windows overlap by half


def sobel(image_BCHW: Tensor) -> Tensor:
    """Sobel-x and Sobel-y of every channel, in turn: [B, 2 C, H - 2, W - 2].

    They are scaled so that a ramp gives its slope per pixel.
    """
    across_HW = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 8
    return _filter(image_BCHW, torch.stack([across_HW, across_HW.T]))


def laplacian(image_BCHW: Tensor) -> Tensor:
    """d2/dx2 + d2/dy2 of every channel, per pixel squared: [B, C, H - 2, W - 2]."""
    stencil_HW = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])
    return _filter(image_BCHW, stencil_HW[None])


OPERATORS = {"sobel": sobel, "laplacian": laplacian}


def edge_loss(image_BCHW: Tensor, target_BCHW: Tensor, operator: str = "sobel") -> Tensor:
    """L_E, a scalar.

    Args:
        image_BCHW: Float [B, C, H, W], H and W at least 3.
        target_BCHW: The same.
        operator: A key of OPERATORS.

    Example:
        >>> ramp = (0.1 * torch.arange(8.0)).expand(1, 3, 6, 8)
        >>> edge_loss(ramp, torch.zeros_like(ramp))  # slope 0.1 across, 0 down
        tensor(0.0500)

    """
    # E is linear: filtering the difference is filtering both, at half the cost.
    return OPERATORS[operator](image_BCHW - target_BCHW).abs().mean()


def edge_similarity_loss(
    image_BCHW: Tensor, target_BCHW: Tensor, operator: str = "sobel"
) -> Tensor:
    """L_E as a similarity, a scalar.

        mean over windows of 1 - (2 <E(x), E(y)> + c) / (|E(x)|^2 + |E(y)|^2 + c)

    Ours, as ``frequency.fourier_similarity_loss``: it is least where edges are as strong as the
    target's, even if they do not lie in the same place.
    """
    image = OPERATORS[operator](image_BCHW)
    target = OPERATORS[operator](target_BCHW)
    cross = image * target
    power = image**2
    target_power = target**2
    return dissimilarity(_window_means(cross), _window_means(power), _window_means(target_power))


def _window_means(values_BCHW: Tensor) -> Tensor:
    return F.avg_pool2d(values_BCHW, WINDOW, WINDOW // 2)


def _filter(image_BCHW: Tensor, kernels_KHW: Tensor) -> Tensor:
    """All K filters on every channel: [B, K C, H - 2, W - 2], the filters of a channel in turn."""
    channels = image_BCHW.shape[1]
    weight = kernels_KHW.to(image_BCHW).unsqueeze(1).repeat(channels, 1, 1, 1)  # [K C, 1, 3, 3]
    return F.conv2d(image_BCHW, weight, groups=channels)

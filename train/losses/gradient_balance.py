"""Loss terms balanced by the norms of their gradients at the decoded image.

    scale_i = | d L_1 / d image | / | d L_i / d image |        (1: the first term, which keeps its
    scale)

A term w_i scale_i L_i then pulls w_i / w_1 times as hard as the first, whatever the units of the
terms. This is VQGAN's adaptive weight (Esser et al. 2021, 'Taming Transformers', equation 7), which
balances two terms at the decoder's last layer. As there, a scale is at most 10^4 and has no
gradient. HiPA's own weights of its terms are not public (docs/explanation/hipa.md, 'Not published,
and our choice').
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

MAX_SCALE = 1e4  # VQGAN's limit, for a term whose gradient vanishes


# Why ``divides_batch`` is a fault.
WHOLE_BATCHES = "loss.balance = 'gradient' needs whole batches: one process, and no micro_batch."


def divides_batch(balance: str, micro_batch: int | None, processes: int) -> bool:
    """Whether gradients are measured that must be those of one whole batch, and none sees one."""
    return balance == "gradient" and (processes > 1 or bool(micro_batch))


class GradientBalance(nn.Module):
    """The scales of several loss terms, measured now and then and kept between.

    ``state`` is float32 [1 + count]: the number of evaluations so far, then the scales. A run whose
    checkpoint restores it resumes exactly.

    Args:
        count: How many terms there are.
        every: A measurement takes place at every so many evaluations that have a gradient. It costs
            a backward pass from each term to the image.

    """

    def __init__(self, count: int, every: int) -> None:
        super().__init__()
        self.every = every
        start = torch.cat([torch.zeros(1), torch.ones(count)])
        self.state = nn.Parameter(start, requires_grad=False)

    def forward(self, terms: list[Tensor], image_BCHW: Tensor) -> Tensor:
        """The scales, [count], of scalar ``terms`` that were computed from the image."""
        if torch.is_grad_enabled() and image_BCHW.requires_grad:
            if int(self.state[0]) % self.every == 0:
                self.state.data[1:] = gradient_scales(terms, image_BCHW)
            self.state.data[0] += 1
        return self.state[1:]


def gradient_scales(terms: list[Tensor], image_BCHW: Tensor) -> Tensor:
    """scale_i of each scalar term, [count]; the graph is kept for the backward pass that follows.

    Example:
        >>> image = torch.ones(1, 3, 4, 4, requires_grad=True)
        >>> gradient_scales([image.sum(), 10 * image.sum()], image)
        tensor([1.0000, 0.1000])

    """
    norms = []
    for term in terms:
        (gradient,) = torch.autograd.grad(term, image_BCHW, retain_graph=True)
        norms.append(gradient.norm())
    norm_N = torch.stack(norms)
    # The smallest normal number in place of zero: 0 / 0 would be NaN.
    return (norm_N[0] / norm_N.clamp_min(torch.finfo(norm_N.dtype).tiny)).clamp_max(MAX_SCALE)

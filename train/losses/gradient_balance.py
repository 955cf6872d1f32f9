"""Loss terms balanced by the norms of their gradients at the decoded image.

    scale_i = | d L_1 / d image | / | d L_i / d image |        (1: the first term, which keeps its scale)

so that share_i scale_i L_i pulls share_i times as hard as the first term, whatever the terms' units. This is VQGAN's
adaptive weight (Esser et al. 2021, 'Taming Transformers', equation 7), there between two terms and at the decoder's
last layer; as there, a scale is at most 10^4 and has no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

LARGEST = 1e4


class GradientBalance(nn.Module):
    """Scales of ``count`` terms, measured at every ``every``-th evaluation that has a gradient and kept between.

    ``state`` is float32 [1 + count]: evaluations so far, then the scales. With it restored a run resumes exactly.
    """

    def __init__(self, count: int, every: int) -> None:
        super().__init__()
        self.every = every
        self.state = nn.Parameter(
            torch.cat([torch.zeros(1), torch.ones(count)]), requires_grad=False
        )

    def forward(self, terms: list[Tensor], image_BCHW: Tensor) -> Tensor:
        """The scales [count] for scalar ``terms`` of an image that they were computed from."""
        if torch.is_grad_enabled() and image_BCHW.requires_grad:
            if int(self.state[0]) % self.every == 0:
                self.state.data[1:] = gradient_scales(terms, image_BCHW)
            self.state.data[0] += 1
        return self.state[1:]


def gradient_scales(terms: list[Tensor], image_BCHW: Tensor) -> Tensor:
    """scale_i of each term, [count]; the graph stays for the backward pass that follows."""
    norms = torch.stack(
        [torch.autograd.grad(term, image_BCHW, retain_graph=True)[0].norm() for term in terms]
    )
    return (norms[0] / norms.clamp_min(torch.finfo(norms.dtype).tiny)).clamp_max(LARGEST)

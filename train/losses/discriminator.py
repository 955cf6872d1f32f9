"""A discriminator on the perceptual distance's features, so that one step's images look like the teacher's. Ours.

    L_D = mean relu(1 - D(target)) + mean relu(1 + D(image)),    L_G = -mean D(image)

HiPA has no such term. Full-reference losses are least where the student hedges between details that it cannot tell
apart, which is a blur; whether an image is sharp needs no reference. The backbone stays frozen, small heads judge its
maps at a quarter of the image's size and below, which cost little: Sauer et al. 2021, 'Projected GANs Converge Faster',
and 2023, 'Adversarial Diffusion Distillation'; hinge loss of Lim & Ye 2017. The heads train in the same steps as the
student, by an optimiser group of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from hipa_deploy.errors import HipaError

WIDTH = 64
SIDE, FINEST = (
    64,
    4,
)  # of the image that the maps are counted on; its side over that of the finest map judged


class Discriminator(nn.Module):
    """One head for each coarse map of ``backbone``: [B, C_i, H_i, W_i] -> a judgement of every place, [B, 1, H_i, W_i].

    Positive means 'the teacher's'. The heads are the same for the same ``seed``, whatever else draws random numbers.

    Raises:
        HipaError: the backbone has no map at a quarter of the image's size or below.

    """

    def __init__(self, backbone: Callable[[Tensor], Sequence[Tensor]], seed: int = 0) -> None:
        super().__init__()
        with torch.no_grad():
            maps = backbone(torch.zeros(1, 3, SIDE, SIDE))
        self.judged = [i for i, features in enumerate(maps) if features.shape[-1] <= SIDE // FINEST]
        if not self.judged:
            got = "loss.adversarial_weight: the backbone of loss.perceptual has no map at a quarter of the image's size"
            raise HipaError(
                f"{got}. Expected one at least: take lite0 or vgg16, or leave the weight out."
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.heads = nn.ModuleList(_head(maps[i].shape[1]) for i in self.judged)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """A judgement of each coarse map, given all of the backbone's."""
        return [head(maps[i]) for head, i in zip(self.heads, self.judged, strict=True)]

    def loss(self, maps: Sequence[Tensor], target_maps: Sequence[Tensor]) -> Tensor:
        """L_D, a scalar with a gradient for the heads alone."""
        judged, expected = self([m.detach() for m in maps]), self([m.detach() for m in target_maps])
        losses = [
            F.relu(1 - y).mean() + F.relu(1 + x).mean()
            for x, y in zip(judged, expected, strict=True)
        ]
        return torch.stack(losses).mean()

    def adversarial(self, maps: Sequence[Tensor]) -> Tensor:
        """L_G, a scalar with a gradient for the image alone."""
        fixed = {name: weight.detach() for name, weight in self.named_parameters()}
        return -torch.stack(
            [judged.mean() for judged in functional_call(self, fixed, (maps,))]
        ).mean()


def _head(channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, WIDTH, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(WIDTH, WIDTH, 3, padding=1),
        nn.GroupNorm(8, WIDTH),
        nn.LeakyReLU(0.2),
        nn.Conv2d(WIDTH, 1, 1),
    )

"""A discriminator on the perceptual distance's features: could this image be the teacher's?

    L_D = mean relu(1 - D(target)) + mean relu(1 + D(image))      for the discriminator's heads
    L_G = -mean D(image)                                          for the student

Ours; HiPA has no such term. A loss with a reference is least where the student hedges between
details that it cannot tell apart, which is a blur. Whether an image is sharp needs no reference.
The backbone stays frozen. Small heads judge its maps at a quarter of the image's size and below,
which costs little: Sauer et al. 2021, 'Projected GANs Converge Faster', and 2023, 'Adversarial
Diffusion Distillation'. The hinge loss is that of Lim & Ye 2017. The heads train in the same steps
as the student, in an optimiser group of their own.

Shape suffixes: B batch, C channels, H W size of an image or a feature map.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from hipa_deploy.errors import HipaError

WIDTH = 64  # channels inside a head
PROBE_SIZE = 64  # pixels: side of the blank image that tells which maps a backbone has
REDUCTION = 4  # a map is judged if its side is the image's divided by this, or less


class Heads(nn.Module):
    """Small heads that judge feature maps, one for each.

    A head turns a map [B, C_i, H_i, W_i] into a judgement [B, 1, H_i, W_i]: positive means that the
    place looks like the teacher's.

    Args:
        channels: C_i of each map.
        seed: It alone decides the heads' weights, whatever else draws random numbers.

    """

    def __init__(self, channels: Sequence[int], seed: int = 0) -> None:
        super().__init__()
        # The global random generator does not change, so that a discriminator does not alter what
        # other parts of a training draw.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.heads = nn.ModuleList(_head(width) for width in channels)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The judgement of each map."""
        return [head(features) for head, features in zip(self.heads, maps, strict=True)]

    def hinge_loss(self, maps: Sequence[Tensor], target_maps: Sequence[Tensor]) -> Tensor:
        """L_D, a scalar with a gradient for the heads alone."""
        # Detached maps: this loss must not teach the student.
        judged = self([features.detach() for features in maps])
        judged_targets = self([features.detach() for features in target_maps])
        losses = []
        for judgement, target_judgement in zip(judged, judged_targets, strict=True):
            target_loss = F.relu(1 - target_judgement).mean()
            losses.append(target_loss + F.relu(1 + judgement).mean())
        return torch.stack(losses).mean()

    def generator_loss(self, maps: Sequence[Tensor]) -> Tensor:
        """L_G, a scalar with a gradient for the image alone."""
        judged = self.fixed(maps)
        return -torch.stack([judgement.mean() for judgement in judged]).mean()

    def fixed(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The judgements with a gradient for the maps alone."""
        # Called with detached weights: the student must not teach the heads to like its images.
        weights = {name: weight.detach() for name, weight in self.named_parameters()}
        judged: list[Tensor] = functional_call(self, weights, (maps,))
        return judged


class Discriminator(Heads):
    """One head for each coarse map of a backbone, which judges every place of it.

    Args:
        backbone: Image [B, 3, H, W] -> feature maps. It is called once here, on a blank image.
        seed: As for ``Heads``.

    Raises:
        HipaError: the backbone has no map at a quarter of the image's size or below.

    """

    def __init__(self, backbone: Callable[[Tensor], Sequence[Tensor]], seed: int = 0) -> None:
        # Which maps are coarse is read off their sizes, since a user's backbone may have any.
        with torch.no_grad():
            maps = backbone(torch.zeros(1, 3, PROBE_SIZE, PROBE_SIZE))
        largest = PROBE_SIZE // REDUCTION
        judged = [i for i, features in enumerate(maps) if features.shape[-1] <= largest]
        if not judged:
            raise HipaError(
                "loss.adversarial_weight: the backbone of loss.perceptual has no map at a quarter "
                "of the image's size or below. Expected at least one: use lite0 or vgg16, or "
                "remove the weight."
            )
        super().__init__([maps[i].shape[1] for i in judged], seed)
        self.judged = judged

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The judgements of the coarse maps; ``maps`` are all maps of the backbone."""
        return super().forward([maps[i] for i in self.judged])


def _head(channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, WIDTH, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(WIDTH, WIDTH, 3, padding=1),
        nn.GroupNorm(8, WIDTH),
        nn.LeakyReLU(0.2),
        nn.Conv2d(WIDTH, 1, 1),
    )

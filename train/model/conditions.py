"""What a UNet is told of each prompt: the text context, and SDXL's added conditions.

SDXL's UNet takes a pooled vector and six numbers beside the context (Podell et al. 2023,
https://arxiv.org/abs/2307.01952, section 2.2). They go together wherever a context goes, so that no
call can have the one without the other.

Shape suffixes: B batch, L tokens, D width of the text context, P width of the pooled vector, C
latent channels, H W latent size; 6 numbers of size and crop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditions:
    """The conditions of B rows.

    Attributes:
        context_BLD: Text contexts, float32.
        pooled_BP: Pooled vectors of SDXL's second text encoder, float32; None for one encoder.
        sizes_B6: Original height and width, the crop's top and left, target height and width, in
            pixels, float32; None for one encoder.

    Example:
        >>> conditions = model.conditions(["a cat", "a dog"])  # of SDXL
        >>> conditions.context_BLD.shape, conditions.pooled_BP.shape, conditions.sizes_B6[0]
        (torch.Size([2, 77, 2048]), torch.Size([2, 1280]), tensor([1024., 1024., 0., 0., ...]))

    """

    context_BLD: Tensor
    pooled_BP: Tensor | None = None
    sizes_B6: Tensor | None = None

    def __len__(self) -> int:
        return len(self.context_BLD)

    def __getitem__(self, rows: Tensor | slice) -> Conditions:
        """Some of the rows, by their indices, a mask or a slice."""
        return self._each(lambda tensor: tensor[rows])

    def repeated(self, count: int) -> Conditions:
        """One row as ``count`` equal rows, which share its memory."""
        return self._each(lambda tensor: tensor.expand(count, *tensor.shape[1:]))

    def zeroed(self) -> Conditions:
        """The same with zeros for the prompt; the sizes stay."""
        pooled = None if self.pooled_BP is None else torch.zeros_like(self.pooled_BP)
        return Conditions(torch.zeros_like(self.context_BLD), pooled, self.sizes_B6)

    def where(self, chosen_B: Tensor, other: Conditions) -> Conditions:
        """The row of ``self`` where ``chosen_B`` (bool [B]) is true, else that of ``other``."""

        def pick(own: Tensor, others: Tensor) -> Tensor:
            chosen = chosen_B.view(-1, *[1] * (own.ndim - 1))
            return torch.where(chosen, own, others)

        return _joined([self, other], lambda tensors: pick(*tensors))

    @property
    def added(self) -> dict[str, Any]:
        """Further keywords of the UNet's call; none for one text encoder."""
        if self.pooled_BP is None:
            return {}
        # The names are those of UNet2DConditionModel.get_aug_embed, for 'text_time'.
        return {"added_cond_kwargs": {"text_embeds": self.pooled_BP, "time_ids": self.sizes_B6}}

    def _each(self, change: Callable[[Tensor], Tensor]) -> Conditions:
        return _joined([self], lambda tensors: change(tensors[0]))


def joined_rows(parts: Sequence[Conditions]) -> Conditions:
    """The rows of all ``parts``, one after another."""
    return _joined(parts, torch.cat)


def _joined(parts: Sequence[Conditions], join: Callable[[list[Tensor]], Tensor]) -> Conditions:
    """One of ``join`` for each tensor that the parts have."""
    made: list[Tensor | None] = []
    for name in ("context_BLD", "pooled_BP", "sizes_B6"):
        tensors = [getattr(part, name) for part in parts]
        made.append(None if tensors[0] is None else join(tensors))
    context, pooled, sizes = made
    assert context is not None
    return Conditions(context, pooled, sizes)


def predict(
    unet: Callable[..., Any], x_BCHW: Tensor, timestep: Any, conditions: Conditions
) -> Tensor:
    """One call of a UNet: the one place that knows how conditions go into it.

    Args:
        unet: diffusers' UNet2DConditionModel, or a function that is called like one.
        x_BCHW: Noised latents, float32.
        timestep: A number, or int64 [B].
        conditions: Of the B rows.

    Returns:
        What the UNet predicts [B, C, H, W], in the precision in which it ran.

    """
    context_BLD = conditions.context_BLD
    output: Tensor = unet(x_BCHW, timestep, context_BLD, return_dict=False, **conditions.added)[0]
    return output

"""The change that each kind of LoRA makes to a layer's weight, in float32.

Shape suffixes: O output and I input features or channels, r rank, k kernel height and width. ``W``
is [O, I] of a linear layer, [O, I, k, k] of a convolution.

Every formula is its format's own, and is tested against peft, which computes the same in other
code:

    LoRA    W + s B A                          Hu et al. 2021, arXiv 2106.09685
    LoCon   the same of convolutions, or with a core tensor between (Tucker), LyCORIS
    LoHa    W + s (w1a w1b) * (w2a w2b)        Hyeon-Woo et al. 2021, arXiv 2108.06098
    LoKr    W + s (w1 kron w2)                 LyCORIS, arXiv 2309.14859
    DoRA    m (W + dW) / |W + dW|              Liu et al. 2024, arXiv 2402.09353

with s = alpha / rank.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hipa_deploy.errors import HipaError, as_line
from hipa_deploy.models.lora.kinds import kind_of


def weight_change(
    layer: str, tensors: Mapping[str, Tensor], weight: Tensor, scaling: float
) -> Tensor:
    """dW, of ``weight``'s shape, before DoRA.

    Args:
        layer: the layer's name, for messages.
        tensors: the layer's tensors by role, float32.
        weight: the layer's weight, [O, I] or [O, I, k, k]; of a norm layer [O].
        scaling: alpha / rank, times how strongly to merge.

    Raises:
        HipaError: tensors that do not fit each other or the weight.

    """
    change_of = _CHANGES[kind_of(layer, tensors)]
    shapes = {role: value.to("meta") for role, value in tensors.items()}
    with as_line(f"layer {layer}: its tensors do not fit each other", "Copy the file again."):
        # First without memory: the product of two small matrices can be of any size.
        shape = change_of(shapes).shape
    fits = shape[:1] == weight.shape[:1] and shape.numel() == weight.numel()
    if not fits:
        raise HipaError(
            f"layer {layer}: the file changes {list(shape)} values, "
            f"the model's weight is {list(weight.shape)}. It is for another model."
        )
    return change_of(tensors).reshape(weight.shape) * scaling


def _lora_change(tensors: Mapping[str, Tensor]) -> Tensor:
    down = tensors["down"]  # [r, I] or [r, I, k, k]
    up = tensors["up"]  # [O, r] or [O, r, 1, 1]
    if "mid" in tensors:  # Tucker: [r, r, k, k] between two 1x1 convolutions
        return torch.einsum(
            "n m k l, i n, m j -> i j k l", tensors["mid"], up.flatten(1), down.flatten(1)
        )
    # DyLoRA stores a convolution's second matrix without a kernel.
    if down.dim() == up.dim() == 4 and down.shape[2:].numel() > 1 and up.shape[2:].numel() == 1:
        # The operation that peft merges a convolution with, so that both round alike.
        return torch.nn.functional.conv2d(down.transpose(0, 1), up).transpose(0, 1)
    return up.flatten(1) @ down.flatten(1)


def _loha_change(tensors: Mapping[str, Tensor]) -> Tensor:
    factors = []
    for number in ("1", "2"):
        a = tensors[f"hada_w{number}_a"]
        b = tensors[f"hada_w{number}_b"]
        core = tensors.get(f"hada_t{number}")
        if core is None:
            factors.append(a @ b)
        else:
            factors.append(torch.einsum("i j k l, j r, i p -> p r k l", core, b, a))
    return factors[0] * factors[1]


def _lokr_change(tensors: Mapping[str, Tensor]) -> Tensor:
    w1 = tensors.get("lokr_w1")
    if w1 is None:
        w1 = tensors["lokr_w1_a"] @ tensors["lokr_w1_b"]
    w2 = tensors.get("lokr_w2")
    if w2 is None and "lokr_t2" in tensors:
        w2 = torch.einsum(
            "i j k l, j r, i p -> p r k l",
            tensors["lokr_t2"],
            tensors["lokr_w2_b"],
            tensors["lokr_w2_a"],
        )
    elif w2 is None:
        w2 = tensors["lokr_w2_a"] @ tensors["lokr_w2_b"]
    # The first factor has no kernel: over a convolution's it is the same at every place.
    for _ in range(w2.dim() - w1.dim()):
        w1 = w1.unsqueeze(-1)
    return torch.kron(w1, w2.contiguous())


def _whole_change(tensors: Mapping[str, Tensor]) -> Tensor:
    return tensors["difference"]


_CHANGES = {
    "lora": _lora_change,
    "loha": _loha_change,
    "lokr": _lokr_change,
    "difference": _whole_change,
}


def with_magnitude(changed: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """DoRA: every row of the changed weight gets a learned length.

    In older LyCORIS files it is every column.

    Args:
        changed: W + dW, [O, I] or [O, I, k, k].
        tensors: the layer's; 'magnitude' is peft's, over rows; 'dora_scale' is LyCORIS', [O, 1, …]
            over rows or [1, I, …] over columns.

    Raises:
        HipaError: lengths that fit neither.

    """
    if "magnitude" in tensors:
        lengths = tensors["magnitude"]
        axis = 0
    elif "dora_scale" in tensors:
        lengths = tensors["dora_scale"]
        axis = 0 if lengths.shape[0] == changed.shape[0] else 1
    else:
        return changed

    if lengths.numel() != changed.shape[axis]:
        raise HipaError(
            f"a DoRA magnitude has shape {list(lengths.shape)}, "
            f"the weight {list(changed.shape)}. It is for another model."
        )
    shape = [1] * changed.dim()
    shape[axis] = changed.shape[axis]
    now = changed.transpose(0, axis).flatten(1).norm(dim=1).reshape(shape)
    # A row of zeros stays zero: there is no direction to give a length to.
    return changed * torch.where(now > 0, lengths.reshape(shape) / now.clamp_min(1e-30), 0.0)

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

# The tensors that make a kind of LoRA: all of the first tuple, any of the second.
KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "lora": (("down", "up"), ("mid",)),
    "loha": (("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), ("hada_t1", "hada_t2")),
    "lokr": (
        (),
        ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    ),
    "difference": (("difference",), ()),
    "bias": (("bias_difference",), ()),
}
# What every kind may have beside.
COMMON = ("alpha", "magnitude", "dora_scale", "bias", "bias_difference")
# Two ways to say the same thing, of which a layer has one: the other would be left over.
EITHER = (
    ("magnitude", "dora_scale"),
    ("bias", "bias_difference"),
    ("lokr_w1", "lokr_w1_a"),
    ("lokr_w1", "lokr_w1_b"),
    ("lokr_w2", "lokr_w2_a"),
    ("lokr_w2", "lokr_w2_b"),
    ("lokr_w2", "lokr_t2"),
)


def kind_of(layer: str, tensors: Mapping[str, Tensor]) -> str:
    """Which kind of LoRA these tensors of a layer are.

    Raises:
        HipaError: none, or two at once, or one that is not whole: the message names what is
            missing.

    """
    for one, other in EITHER:
        if one in tensors and other in tensors:
            raise HipaError(
                f"layer {layer} has both {one} and {other}, which exclude each other. "
                "Convert the file again."
            )
    roles = set(tensors) - set(COMMON)
    if set(tensors) == {"bias_difference"}:
        return "bias"
    for kind, (needed, optional) in KINDS.items():
        known = {*needed, *optional}
        if not roles or not roles <= known:
            continue
        missing = [*sorted(set(needed) - roles), *_missing_factors(kind, roles)]
        if missing:
            raise HipaError(
                f"layer {layer} is not whole: it has {', '.join(sorted(roles))}, "
                f"and {', '.join(missing)} is missing. Copy or convert the file again."
            )
        return kind
    got = ", ".join(sorted(roles)) or ", ".join(sorted(tensors))
    raise HipaError(f"layer {layer} holds {got}, which is no LoRA that is known here.")


def _missing_factors(kind: str, roles: set[str]) -> list[str]:
    """What is missing of LoKr, whose factors are whole or products, or of LoHa, with both cores."""
    missing = []
    if kind == "lokr":
        for factor in ("lokr_w1", "lokr_w2"):
            pair = {f"{factor}_a", f"{factor}_b"}
            if factor not in roles and not pair <= roles:
                missing.append(factor)
    if kind == "loha" and len(roles & {"hada_t1", "hada_t2"}) == 1:
        missing.extend(sorted({"hada_t1", "hada_t2"} - roles))
    return missing


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
    if down.shape[2:].numel() > 1 and up.shape[2:].numel() == 1:
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


def rank_of(kind: str, tensors: Mapping[str, Tensor]) -> int | None:
    """The rank that alpha is divided by; None where the format does not scale by alpha."""
    if kind == "lora":
        return int(tensors["down"].shape[0])
    if kind == "loha":
        return int(tensors["hada_w1_b"].shape[0])
    if kind == "lokr":
        # LyCORIS scales by the rank of whichever factor is decomposed. With both whole there is no
        # rank, and it stores an alpha that stands for 1.
        if "lokr_w2_b" in tensors:
            return int(tensors["lokr_w2_b"].shape[0])
        if "lokr_w1_b" in tensors:
            return int(tensors["lokr_w1_b"].shape[0])
    return None


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

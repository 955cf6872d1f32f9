"""The kinds of LoRA, each known by the tensors that a layer has. Nothing of torch is needed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Protocol

from hipa_deploy.errors import HipaError


class Shaped(Protocol):
    """A tensor, or what the header of a file says of one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""


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
# What an IP-Adapter's tensors, or the tables of its pickled file, begin with.
IP_ADAPTER = ("image_proj", "ip_adapter")
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


def kind_of(layer: str, tensors: Collection[str]) -> str:
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


def rank_of(kind: str, tensors: Mapping[str, Shaped]) -> int | None:
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


def refuse_ip_adapter(file: Path, names: Collection[str]) -> None:
    """Raise HipaError where the names in a file are those of an IP-Adapter."""
    if any(name.startswith(IP_ADAPTER) for name in names):
        raise HipaError(
            f"{file} is an IP-Adapter, which is not supported. Expected a LoRA or an embedding."
        )

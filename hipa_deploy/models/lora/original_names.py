"""The names that a UNet's layers have in the original layout, that of CompVis and Stability.

LoRA files of some tools name layers so: ``input_blocks.1.1.proj_in`` is diffusers'
``down_blocks.0.attentions.0.proj_in``. The numbers count through all blocks of a side, so they
follow from which blocks the UNet has.

Source: diffusers scripts/convert_original_stable_diffusion_to_diffusers.py, read backwards.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

# Layers outside of the blocks: diffusers' name and the original one.
ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",  # SDXL's
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
IN_RESNETS = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def original_names(modules: Iterable[str]) -> dict[str, str]:
    """The original name of each module of a UNet2DConditionModel, and diffusers' name for it.

    Args:
        modules: dotted names of the UNet's modules, in any order.

    Returns:
        Original names to diffusers' names. Modules that the original layout does not have are
        left out.

    Example:
        >>> original_names(["conv_in", "down_blocks.0.resnets.0.conv1"])
        {'input_blocks.0.0': 'conv_in', 'input_blocks.1.0.in_layers.2': ...}

    """
    names = list(modules)
    blocks = {**ENDS, **dict(_down_blocks(names)), **dict(_up_blocks(names))}
    found = {}
    for name in names:
        for block, original in blocks.items():
            if name == block:
                found[original] = name
            elif name.startswith(f"{block}."):
                inner = name.removeprefix(f"{block}.")
                if ".resnets." in f".{block}.":
                    inner = IN_RESNETS.get(inner, inner)
                found[f"{original}.{inner}"] = name
    return found


def _down_blocks(names: list[str]) -> Iterator[tuple[str, str]]:
    """Every resnet has a number, the attention after it the same one, every downsampler its own."""
    number = 1  # 0 is the first convolution
    for block in range(_count(names, r"down_blocks\.(\d+)\.")):
        prefix = f"down_blocks.{block}"
        for layer in range(_count(names, rf"{re.escape(prefix)}\.resnets\.(\d+)\.")):
            yield f"{prefix}.resnets.{layer}", f"input_blocks.{number}.0"
            yield f"{prefix}.attentions.{layer}", f"input_blocks.{number}.1"
            number += 1
        if _has(names, f"{prefix}.downsamplers.0."):
            yield f"{prefix}.downsamplers.0.conv", f"input_blocks.{number}.0.op"
            number += 1


def _up_blocks(names: list[str]) -> Iterator[tuple[str, str]]:
    """An upsampler has the number of the last resnet before it, and the next place there."""
    number = 0
    for block in range(_count(names, r"up_blocks\.(\d+)\.")):
        prefix = f"up_blocks.{block}"
        for layer in range(_count(names, rf"{re.escape(prefix)}\.resnets\.(\d+)\.")):
            yield f"{prefix}.resnets.{layer}", f"output_blocks.{number}.0"
            yield f"{prefix}.attentions.{layer}", f"output_blocks.{number}.1"
            number += 1
        place = 2 if _has(names, f"{prefix}.attentions.") else 1
        yield f"{prefix}.upsamplers.0.conv", f"output_blocks.{number - 1}.{place}.conv"


def _count(names: list[str], pattern: str) -> int:
    """How many numbers the pattern's group has among the names: the largest and one."""
    matches = [re.match(pattern, name) for name in names]
    return max((int(match[1]) + 1 for match in matches if match), default=0)


def _has(names: list[str], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in names)

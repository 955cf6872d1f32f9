"""What the tensors of a LoRA file are called, in every layout, and which layer they belong to.

A key is a layer's name and a role: ``lora_unet_mid_block_attentions_0_proj_in.lora_down.weight`` is
the role 'down' of the layer ``mid_block.attentions.0.proj_in`` of the UNet.

Sources: kohya-ss/sd-scripts networks/lora.py; KohakuBlueleaf/LyCORIS lycoris/modules;
huggingface/peft src/peft/utils/save_and_load.py; huggingface/diffusers
loaders/lora_conversion_utils.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

# Ends of keys and the role that they stand for, the longest first where one ends another.
ROLES = {
    # peft and today's diffusers
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_B.bias": "bias",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_magnitude_vector.default.weight": "magnitude",
    ".lora_magnitude_vector": "magnitude",
    # kohya and LyCORIS
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_mid.weight": "mid",
    ".dora_scale": "dora_scale",
    ".alpha": "alpha",
    ".diff": "difference",
    ".diff_b": "bias_difference",
    ".hada_w1_a": "hada_w1_a",
    ".hada_w1_b": "hada_w1_b",
    ".hada_w2_a": "hada_w2_a",
    ".hada_w2_b": "hada_w2_b",
    ".hada_t1": "hada_t1",
    ".hada_t2": "hada_t2",
    ".lokr_w1": "lokr_w1",
    ".lokr_w1_a": "lokr_w1_a",
    ".lokr_w1_b": "lokr_w1_b",
    ".lokr_w2": "lokr_w2",
    ".lokr_w2_a": "lokr_w2_a",
    ".lokr_w2_b": "lokr_w2_b",
    ".lokr_t2": "lokr_t2",
    # diffusers before peft: a processor's or a layer's own LoRA
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
}
# Which part of the pipeline a key is for, by what it begins with. peft and old diffusers files of a
# UNet alone name no part.
PARTS = {
    "": "unet",
    "unet.base_model.model.": "unet",
    "text_encoder.base_model.model.": "text_encoder",
    "base_model.model.": "unet",
    "unet.": "unet",
    "text_encoder.": "text_encoder",
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    # LyCORIS' full names
    "lycoris_unet_": "unet",
    "lycoris_te_": "text_encoder",
}
# In kohya's layout dots are underscores, so a name is looked up among the model's own.
_UNDERSCORES = ("lora_unet_", "lora_te_", "lora_te1_", "lycoris_unet_", "lycoris_te_")


class LayerKey(NamedTuple):
    """A layer of the pipeline: its part ('unet' or 'text_encoder') and its module's name there."""

    part: str
    module: str

    def __str__(self) -> str:
        return f"{self.part}.{self.module}"


def role_of(key: str) -> tuple[str, str] | None:
    """Split a key into the layer's name as the file has it, and the role; None for an unknown end.

    Example:
        >>> role_of("unet.mid_block.attentions.0.proj_in.lora_A.weight")
        ('unet.mid_block.attentions.0.proj_in', 'down')

    """
    for end in sorted(ROLES, key=len, reverse=True):
        if key.endswith(end):
            return key.removesuffix(end), ROLES[end]
    return None


class ModuleNames:
    """The module names of a pipeline's parts, found by the names that LoRA files have for them.

    Args:
        modules: for each part, the dotted names of its modules.

    """

    def __init__(self, modules: dict[str, Iterable[str]]) -> None:
        self._dotted = {part: set(names) for part, names in modules.items()}
        self._underscored = {
            part: {name.replace(".", "_"): name for name in names}
            for part, names in self._dotted.items()
        }

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that a LoRA may change."""
        return tuple(self._dotted)

    def part_of(self, name: str) -> str:
        """The part of the pipeline that a layer's name in a file is for."""
        return PARTS[_prefix_of(name)]

    def find(self, name: str) -> LayerKey | None:
        """The layer that ``name`` of a file stands for; None if no part has it.

        Example:
            >>> ModuleNames({"unet": ["conv_in"]}).find("lora_unet_conv_in")
            LayerKey(part='unet', module='conv_in')

        """
        prefix = _prefix_of(name)
        part = PARTS[prefix]
        rest = name.removeprefix(prefix)
        module = self._module(part, rest, underscored=prefix in _UNDERSCORES)
        return None if module is None else LayerKey(part, module)

    def _module(self, part: str, name: str, *, underscored: bool) -> str | None:
        if part not in self._dotted:
            return None
        if underscored:
            return self._underscored[part].get(name)
        # attn1.processor.to_out_lora is what diffusers called the adapter of attn1.to_out.0.
        name = re.sub(r"\.processor\.(to_[qkv])$", r".\1", name)
        name = re.sub(r"\.processor\.to_out$", ".to_out.0", name)
        candidates = [name, f"{name}.0", f"text_model.{name}"]
        return next(
            (candidate for candidate in candidates if candidate in self._dotted[part]), None
        )


def _prefix_of(name: str) -> str:
    """The longest key of ``PARTS`` that ``name`` begins with; at least the empty one fits."""
    return max((prefix for prefix in PARTS if name.startswith(prefix)), key=len)

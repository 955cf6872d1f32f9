"""What the tensors of a LoRA file are called, in every layout, and which layer they belong to.

A key is a layer's name and a role: ``lora_unet_mid_block_attentions_0_proj_in.lora_down.weight`` is
the role 'down' of the layer ``mid_block.attentions.0.proj_in`` of the UNet.

Sources: kohya-ss/sd-scripts networks/lora.py; KohakuBlueleaf/LyCORIS lycoris/modules;
huggingface/peft src/peft/utils/save_and_load.py; huggingface/diffusers
loaders/lora_conversion_utils.py; comfyanonymous/ComfyUI comfy/lora.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from hipa_deploy.models.lora.original_names import original_names
from hipa_deploy.models.weights.load_part import TEXT_PREFIX

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
    ".w_norm": "difference",
    ".b_norm": "bias_difference",
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
# Which part of the pipeline a key is for, by what it begins with; None where the file does not say.
# A second text encoder belongs to SDXL.
PARTS: dict[str, str | None] = {
    "": None,
    "base_model.model.": None,
    "unet.": "unet",
    "unet.base_model.model.": "unet",
    "diffusion_model.": "unet",
    "model.diffusion_model.": "unet",
    "text_encoder.": "text_encoder",
    "text_encoder.base_model.model.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "text_encoder_2.base_model.model.": "text_encoder_2",
    # ComfyUI's own names of a pipeline's text encoders: CLIP L, and H of SD 2.x or G of SDXL
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_h.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    # LyCORIS' full names
    "lycoris_unet_": "unet",
    "lycoris_te_": "text_encoder",
    "lycoris_te1_": "text_encoder",
    "lycoris_te2_": "text_encoder_2",
}
# Where a file counts the text encoders, it is of a family that has two; where not, of one with one.
# The first encoders are of one shape in SD 1.x and in SDXL, so that nothing else tells them apart.
_OF_ONE = ("lora_te_", "lycoris_te_")
_OF_TWO = ("lora_te1_", "lycoris_te1_")
# In kohya's layout dots are underscores, so a name is looked up among the model's own.
_UNDERSCORES = tuple(prefix for prefix in PARTS if prefix.startswith(("lora_", "lycoris_")))


# A layer of CLIP's text encoder, with dots or underscores, and its number.
_TEXT_LAYER = re.compile(r"(?:.*[._])?encoder[._]layers[._](\d+)[._].*")
SECOND = "text_encoder_2"  # the part that SDXL has, and SD 1.x and 2.x do not
ADDED = "add_embedding.linear_1"  # the layer of SDXL's UNet that takes the pooled vector


class LayerKey(NamedTuple):
    """A layer of the pipeline: its part ('unet', 'text_encoder') and its module's name there."""

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
        context_width: of the text contexts that the UNet takes; None where that is not known.

    """

    def __init__(self, modules: dict[str, Iterable[str]], context_width: int | None = None) -> None:
        self.context_width = context_width
        self._dotted: dict[str, dict[str, str]] = {}
        self._underscored: dict[str, dict[str, str]] = {}
        for part, names in modules.items():
            own = {name: name for name in names}
            aliases = original_names(own) if part == "unet" else _bare_names(own)
            self._dotted[part] = {**aliases, **own}
            self._underscored[part] = {
                name.replace(".", "_"): module for name, module in self._dotted[part].items()
            }

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that a LoRA may change."""
        return tuple(self._dotted)

    @property
    def is_sdxl(self) -> bool:
        """Whether the model is SDXL or a relative: its UNet embeds a pooled vector."""
        return SECOND in self._dotted or ADDED in self._dotted.get("unet", {})

    def other_family(self, name: str) -> str | None:
        """The family that a text encoder's layer is named for, where it is not the model's.

        Example:
            >>> ModuleNames({"unet": []}).other_family("lora_te1_text_model_final_layer_norm")
            'SDXL'

        """
        if self.is_sdxl and name.startswith(_OF_ONE):
            return "SD 1.x or 2.x"
        if "unet" in self._dotted and not self.is_sdxl and name.startswith(_OF_TWO):
            return "SDXL"
        return None

    def part_of(self, name: str) -> str | None:
        """The part that a layer's name in a file says it is for; None if it does not say."""
        return PARTS[_prefix_of(name)]

    def is_left_out(self, name: str, part: str | None) -> bool:
        """Whether a file's layer is a text encoder's behind the last that the model has.

        A folder says clip skip by fewer layers. Those that it leaves out have no effect.

        Args:
            name: of the layer, in the file.
            part: what the file is for, where its name does not say so.

        """
        part = self.part_of(name) or part
        match = _TEXT_LAYER.fullmatch(name)
        if match is None or part not in ("text_encoder", SECOND):
            return False
        own = [_TEXT_LAYER.fullmatch(f"{module}.") for module in self._dotted.get(part, ())]
        numbers = [int(found[1]) for found in own if found]
        return bool(numbers) and int(match[1]) > max(numbers)

    def find(self, name: str) -> LayerKey | None:
        """The layer that ``name`` of a file stands for; None if no part has it.

        Example:
            >>> ModuleNames({"unet": ["conv_in"]}).find("lora_unet_conv_in")
            LayerKey(part='unet', module='conv_in')

        """
        prefix = _prefix_of(name)
        rest = name.removeprefix(prefix)
        said = PARTS[prefix]
        for part in self.parts if said is None else (said,):
            module = self._module(part, rest, underscored=prefix in _UNDERSCORES)
            if module is not None:
                return LayerKey(part, module)
        return None

    def _module(self, part: str, name: str, *, underscored: bool) -> str | None:
        if part not in self._dotted:
            return None
        if underscored:
            return self._underscored[part].get(name)
        # attn1.processor.to_out_lora is what diffusers called the adapter of attn1.to_out.0.
        name = re.sub(r"\.processor\.(to_[qkv])$", r".\1", name)
        name = re.sub(r"\.processor\.to_out$", ".to_out.0", name)
        # And so CLIP's attention, whose own names are others.
        name = re.sub(r"\.self_attn\.to_([qkv])$", r".self_attn.\1_proj", name)
        name = re.sub(r"\.self_attn\.to_out$", ".self_attn.out_proj", name)
        for candidate in (name, f"{name}.0"):
            if candidate in self._dotted[part]:
                return self._dotted[part][candidate]
        return None


def _bare_names(modules: Iterable[str]) -> dict[str, str]:
    """Names of a text encoder's layers without ``text_model.``, and the names with it.

    Some tools leave it out, and so do files that are written with transformers 5.6 or newer.
    """
    return {name.removeprefix(TEXT_PREFIX): name for name in modules}


def _prefix_of(name: str) -> str:
    """The longest key of ``PARTS`` that ``name`` begins with; at least the empty one fits."""
    return max((prefix for prefix in PARTS if name.startswith(prefix)), key=len)

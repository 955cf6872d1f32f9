"""A diffusers folder written as one checkpoint in the layout of CompVis' Stable Diffusion.

SD 1.x and 2.x were published in it. The names are those of diffusers'
scripts/convert_diffusers_to_original_stable_diffusion.py, for any number of levels.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Weights = dict[str, torch.Tensor]
RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2",
    "norm2": "out_layers.0", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
OPEN_CLIP = {
    "layer_norm": "ln_",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
# Layers outside the blocks of the down and up paths.
UNET_NAMES = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def write_checkpoint(folder: Path, path: Path, *, open_clip: bool = False) -> Path:
    """Write a model as one checkpoint.

    Args:
        folder: a StableDiffusionPipeline folder.
        path: the checkpoint to write.
        open_clip: name the text encoder's weights as SD 2.x does, not as SD 1.x.

    Returns:
        ``path``.

    """

    def load(part: str, name: str = "diffusion_pytorch_model") -> Weights:
        return load_file(folder / part / f"{name}.safetensors")

    text = load("text_encoder", "model")
    weights = _prefixed("model.diffusion_model.", unet_names(load("unet")))
    weights |= _prefixed("first_stage_model.", vae_names(load("vae")))
    if (folder / "text_encoder_2").is_dir():
        weights |= _prefixed("conditioner.embedders.0.transformer.", text)
        second = load("text_encoder_2", "model")
        weights |= open_clip_names(second, "conditioner.embedders.1.model.")
    elif open_clip:
        weights |= open_clip_names(text)
    else:
        weights |= _prefixed("cond_stage_model.transformer.", text)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: weight.contiguous() for name, weight in weights.items()}, path)
    return path


def _prefixed(prefix: str, weights: Weights) -> Weights:
    return {prefix + name: weight for name, weight in weights.items()}


def _count(pattern: str, weights: Weights) -> int:
    """Return how many numbers, from 0, the group of ``pattern`` has among the weights' names."""
    numbers = set()
    for name in weights:
        match = re.match(pattern, name)
        if match:
            numbers.add(int(match[1]))
    return 1 + max(numbers)


def unet_names(unet: Weights) -> Weights:
    """Return the UNet's weights by their original names."""
    layers = _count(r"down_blocks\.0\.resnets\.(\d+)", unet)

    def rename(name: str) -> str:
        for old, new in UNET_NAMES.items():
            name = re.sub(rf"^{re.escape(old)}\.", f"{new}.", name)
        match = re.match(r"(down|up)_blocks\.(\d+)\.(\w+?)s\.(\d+)\.(.*)", name)
        if match:
            path, block, kind, layer, suffix = match.groups()
            has_attention = any(n.startswith(f"up_blocks.{block}.attentions") for n in unet)
            name = _block_name(
                path, int(block), kind, int(layer), suffix, layers, has_attention=has_attention
            )
        # Names inside a ResNet; an attention has some of them too, and keeps them.
        for old, new in RESNET.items():
            name = re.sub(
                rf"^((?:input|output)_blocks\.\d+\.0|middle_block\.[02])\.{old}\.",
                rf"\1.{new}.",
                name,
            )
        return name

    return {rename(name): weight for name, weight in unet.items()}


def _block_name(
    path: str,
    block: int,
    kind: str,
    layer: int,
    suffix: str,
    layers: int,
    *,
    has_attention: bool,
) -> str:
    """Return the original name of a weight in a block of the down or up path.

    The original layout numbers all layers of a path in one sequence: each block has ``layers``
    ResNets with their attentions, and one more layer, which is the downsampler in the down path and
    a third ResNet in the up path. The input convolution is number 0 of the down path.
    """
    first = (layers + 1) * block
    if kind == "upsampler":
        # It belongs to the block's last layer, after the ResNet and the attention if there is one.
        position = 2 if has_attention else 1
        return f"output_blocks.{first + layers}.{position}.{suffix}"
    if kind == "downsampler":
        suffix = suffix.replace("conv.", "op.", 1)
        return f"input_blocks.{first + layers + 1}.0.{suffix}"
    position = 1 if kind == "attention" else 0
    if path == "down":
        return f"input_blocks.{first + layer + 1}.{position}.{suffix}"
    return f"output_blocks.{first + layer}.{position}.{suffix}"


def vae_names(vae: Weights) -> Weights:
    """Return the VAE's weights by their original names and in their original shapes."""
    levels = _count(r"decoder\.up_blocks\.(\d+)", vae)

    def level(match: re.Match[str]) -> int:
        """Return the original number of an up block: counted from the largest image."""
        return levels - 1 - int(match[1])

    def rename(name: str) -> str:
        name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        name = name.replace("mid_block.attentions.0", "mid.attn_1")
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
        name = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{level(m)}.block", name)
        name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
        up = r"up_blocks\.(\d+)\.upsamplers\.0"
        name = re.sub(up, lambda m: f"up.{level(m)}.upsample", name)
        for old, new in VAE_ATTENTION.items():
            name = name.replace(f"attn_1.{old}.", f"attn_1.{new}.")
        return name

    # The original attention is made of 1 x 1 convolutions, diffusers' of linear layers.
    attention = re.compile(r"attn_1\.(q|k|v|proj_out)\.weight$")
    renamed = {}
    for old, weight in vae.items():
        name = rename(old)
        renamed[name] = weight[:, :, None, None] if attention.search(name) else weight
    return renamed


def open_clip_names(text: Weights, prefix: str = "cond_stage_model.model.") -> Weights:
    """Return the text encoder's weights by OpenCLIP's names, which SD 2.x and SDXL have.

    OpenCLIP stores query, key and value as one matrix, and the projection transposed.
    """
    simple = {
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.final_layer_norm.weight": "ln_final.weight",
        "text_model.final_layer_norm.bias": "ln_final.bias",
    }
    out = {prefix + new: text[old] for old, new in simple.items()}
    if "text_projection.weight" in text:
        out[f"{prefix}text_projection"] = text["text_projection.weight"].T
    for name, weight in text.items():
        match = re.match(r"text_model\.encoder\.layers\.(\d+)\.(.*)\.(weight|bias)", name)
        if not match:
            continue
        number, layer, kind = match.groups()
        block = f"{prefix}transformer.resblocks.{number}"
        if layer == "self_attn.q_proj":
            parts = [text[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            out[f"{block}.attn.in_proj_{kind}"] = torch.cat(parts)
        elif layer not in ("self_attn.k_proj", "self_attn.v_proj"):
            for old, new in OPEN_CLIP.items():
                layer = layer.replace(old, new)
            out[f"{block}.{layer}.{kind}"] = weight
    return out

"""A diffusers folder -> one checkpoint in the layout of CompVis' Stable Diffusion.

SD 1.x and 2.x were published so.

Names as in diffusers' scripts/convert_diffusers_to_original_stable_diffusion.py, for any
number of levels.
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
    "layer_norm": "ln_", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}  # fmt: skip


def write_checkpoint(folder: Path, path: Path, *, open_clip: bool = False) -> Path:
    """Write ``path``; with ``open_clip`` the text encoder is named as in SD 2.x."""

    def load(part: str, name: str = "diffusion_pytorch_model") -> Weights:
        return load_file(folder / part / f"{name}.safetensors")

    text = load("text_encoder", "model")
    unet = {f"model.diffusion_model.{name}": w for name, w in unet_names(load("unet")).items()}
    vae = {f"first_stage_model.{name}": w for name, w in vae_names(load("vae")).items()}
    encoder = (
        open_clip_names(text)
        if open_clip
        else {f"cond_stage_model.transformer.{n}": w for n, w in text.items()}
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: w.contiguous() for name, w in {**unet, **vae, **encoder}.items()}, path)
    return path


def unet_names(unet: Weights) -> Weights:
    layers = 1 + max(
        int(m[1]) for n in unet if (m := re.match(r"down_blocks\.0\.resnets\.(\d+)", n))
    )

    def rename(name: str) -> str:
        for start, new in {
            "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
            "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
            "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
            "mid_block.resnets.1": "middle_block.2",
        }.items():  # fmt: skip
            name = re.sub(rf"^{re.escape(start)}\.", f"{new}.", name)
        if m := re.match(r"(down|up)_blocks\.(\d+)\.(\w+?)s\.(\d+)\.(.*)", name):
            way, block, kind, layer, rest = m[1], int(m[2]), m[3], int(m[4]), m[5]
            index = (layers + 1) * block + (layer if kind != "downsampler" else layers)
            index = index + 1 if way == "down" else index
            if kind == "upsampler":
                attention = any(n.startswith(f"up_blocks.{block}.attentions") for n in unet)
                name = f"output_blocks.{index + layers}.{2 if attention else 1}.{rest}"
            else:
                place = {"resnet": "0.", "attention": "1.", "downsampler": "0."}[kind]
                rest = rest.replace("conv.", "op.", 1) if kind == "downsampler" else rest
                name = f"{'in' if way == 'down' else 'out'}put_blocks.{index}.{place}{rest}"
        if re.match(r"(input_blocks\.\d+|output_blocks\.\d+|middle_block)\.[02]?\.?", name):
            for old, new in RESNET.items():
                name = re.sub(
                    rf"^((?:input|output)_blocks\.\d+\.0|middle_block\.[02])\.{old}\.",
                    rf"\1.{new}.",
                    name,
                )
        return name

    return {rename(name): weight for name, weight in unet.items()}


def vae_names(vae: Weights) -> Weights:
    levels = 1 + max(int(m[1]) for n in vae if (m := re.match(r"decoder\.up_blocks\.(\d+)", n)))

    def rename(name: str) -> str:
        name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        name = name.replace("mid_block.attentions.0", "mid.attn_1")
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
        name = re.sub(
            r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{levels - 1 - int(m[1])}.block", name
        )
        name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(
            r"up_blocks\.(\d+)\.upsamplers\.0",
            lambda m: f"up.{levels - 1 - int(m[1])}.upsample",
            name,
        )
        for old, new in {
            "group_norm": "norm",
            "to_q": "q",
            "to_k": "k",
            "to_v": "v",
            "to_out.0": "proj_out",
        }.items():
            name = name.replace(f"attn_1.{old}.", f"attn_1.{new}.")
        return name

    renamed = {rename(name): weight for name, weight in vae.items()}
    attention = re.compile(r"attn_1\.(q|k|v|proj_out)\.weight$")
    return {n: w[:, :, None, None] if attention.search(n) else w for n, w in renamed.items()}


def open_clip_names(text: Weights) -> Weights:
    """Query, key and value are one matrix in OpenCLIP."""
    prefix = "cond_stage_model.model."
    simple = {
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.final_layer_norm.weight": "ln_final.weight",
        "text_model.final_layer_norm.bias": "ln_final.bias",
    }
    out = {prefix + new: text[old] for old, new in simple.items()}
    for name, weight in text.items():
        if not (m := re.match(r"text_model\.encoder\.layers\.(\d+)\.(.*)\.(weight|bias)", name)):
            continue
        block, rest, kind = f"{prefix}transformer.resblocks.{m[1]}", m[2], m[3]
        if rest == "self_attn.q_proj":
            both = [text[name.replace("q_proj", f"{x}_proj")] for x in "qkv"]
            out[f"{block}.attn.in_proj_{kind}"] = torch.cat(both)
        elif rest not in ("self_attn.k_proj", "self_attn.v_proj"):
            for old, new in OPEN_CLIP.items():
                rest = rest.replace(old, new)
            out[f"{block}.{rest}.{kind}"] = weight
    return out

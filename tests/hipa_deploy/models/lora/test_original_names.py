"""The original layout's names, against diffusers' own conversion of a whole UNet."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

from hipa_deploy.models.lora.names import LayerKey, ModuleNames
from hipa_deploy.models.lora.original_names import original_names

SD15 = {
    "block_out_channels": (8, 16, 32, 32),
    "norm_num_groups": 4,
    "cross_attention_dim": 8,
    "attention_head_dim": 2,
    "sample_size": 8,
}


def test_diffusers_converts_the_same_names() -> None:
    """A UNet of SD 1.5's blocks: every parameter, under its original name, lands where it was."""
    unet = UNet2DConditionModel(**SD15)
    names = original_names([name for name, _ in unet.named_modules()])
    by_module = {module: original for original, module in names.items()}
    checkpoint = {}
    expected = {}
    for number, (name, weight) in enumerate(unet.state_dict().items()):
        module, _, end = name.rpartition(".")
        checkpoint[f"model.diffusion_model.{by_module[module]}.{end}"] = torch.full_like(
            weight, number
        )
        expected[name] = number
    converted = convert_ldm_unet_checkpoint(checkpoint, dict(unet.config))
    got = {name: int(weight.flatten()[0]) for name, weight in converted.items()}
    assert got == expected


def test_a_lora_may_use_them() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SD15)
    modules = ModuleNames({"unet": [name for name, _ in unet.named_modules()]})
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    for name in (
        "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q",
        "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q",
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
        f"unet.{layer}",
        f"base_model.model.{layer}",
        layer,
    ):
        assert modules.find(name) == LayerKey("unet", layer), name
    upsampler = "lora_unet_output_blocks_2_1_conv"
    assert modules.find(upsampler) == LayerKey("unet", "up_blocks.0.upsamplers.0.conv")

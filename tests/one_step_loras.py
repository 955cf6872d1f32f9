"""Small models and LoRA files with the key layouts that published one-step methods have.

The weights are random: no author's file is here. The layers, and the rank of 64 in the true size,
are those whose weights fill the published files (``test_one_step_layouts``).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, SchedulerMixin, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from hipa_deploy.models.one_step.one_step_method import OneStepMethod
from tests.tiny_model import tiny_tokenizer
from tests.usual_layout import store_as_4

# The layers of LCM-LoRA (diffusers, examples/consistency_distillation), which TCD and Hyper-SD have
# too.
TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2",
    "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
)  # fmt: skip
RANK = 4


def target_layers(unet: nn.Module) -> dict[str, nn.Module]:
    """The layers of ``TARGETS`` by their names."""
    found = {}
    for name, module in unet.named_modules():
        if any(name == target or name.endswith(f".{target}") for target in TARGETS):
            found[name] = module
    return found


def kohya(name: str, down: torch.Tensor, up: torch.Tensor) -> dict[str, torch.Tensor]:
    """As LCM-LoRA's own training script writes it."""
    key = f"lora_unet_{name.replace('.', '_')}"
    alpha = torch.tensor(float(RANK // 2))
    return {f"{key}.alpha": alpha, f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}


def peft(name: str, down: torch.Tensor, up: torch.Tensor) -> dict[str, torch.Tensor]:
    """As ``save_lora_weights`` of today's diffusers writes it."""
    return {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}


def old_diffusers(name: str, down: torch.Tensor, up: torch.Tensor) -> dict[str, torch.Tensor]:
    """As diffusers wrote it before peft."""
    return {f"unet.{name}.lora.down.weight": down, f"unet.{name}.lora.up.weight": up}


Layout = Callable[[str, torch.Tensor, torch.Tensor], dict[str, torch.Tensor]]


def lora_tensors(unet: nn.Module, layout: Layout, rank: int = RANK) -> dict[str, torch.Tensor]:
    """Random weights for every layer of ``TARGETS``; on the meta device, shapes only."""
    torch.manual_seed(1)
    tensors = {}
    for name, module in target_layers(unet).items():
        weight = module.weight
        rows, columns, *kernel = weight.shape
        # The down matrix of a convolution has its kernel, the up matrix is 1 x 1.
        down = torch.randn(rank, columns, *kernel, device=weight.device) * 0.1
        up = torch.randn(rows, rank, *(1 for _ in kernel), device=weight.device) * 0.1
        tensors |= layout(name, down, up)
    return tensors


def write_lora(model: Path, path: Path, layout: Layout) -> Path:
    """Write a LoRA file for the UNet of ``model``."""
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    save_file(lora_tensors(unet, layout), path)
    return path


def small_model(folder: Path, width: int, scheduler: SchedulerMixin) -> Path:
    """Write a pipeline of random weights whose text context is as wide as a published family's.

    Width 768 is SD 1.x and has convolutions in its transformers, 1024 is SD 2.x and has linear
    layers there, as the published configurations do.
    """
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=514, hidden_size=width, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, bos_token_id=512, eos_token_id=513, pad_token_id=513,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4,
        cross_attention_dim=width, attention_head_dim=2, use_linear_projection=width == 1024,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16), layers_per_block=1, norm_num_groups=4, sample_size=32,
        mid_block_add_attention=False,
    )  # fmt: skip
    # Random layers hardly see their inputs: the output is made as large as a trained model's.
    unet.conv_out.weight.data *= 20
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(text),
        tokenizer=tiny_tokenizer(folder.with_name(folder.name + "-tokenizer")), unet=unet,
        scheduler=scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipe.save_pretrained(folder)
    return store_as_4(folder)


def method(**changes: object) -> OneStepMethod:
    """LCM's, as a user's file would say it, with ``changes``."""
    fields = {"name": "mine", "source": "a test", "scheduler": "LCMScheduler", "timestep": 999}
    return OneStepMethod.model_validate({**fields, **changes})

"""A complete Stable Diffusion of a few thousand random parameters: 8x8x4 latents, 32x32 images."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from hipa_deploy.models.configurations import _byte_letters
from tests.usual_layout import store_as_4

PROMPTS = ["a red apple", "a green pear", "a yellow lemon"]


def tiny_tokenizer(folder: Path) -> CLIPTokenizer:
    """Write CLIP's byte alphabet, inside and at the end of a word, without merges."""
    letters = _byte_letters()
    words = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    vocabulary = str(folder / "vocab.json")
    merges = str(folder / "merges.txt")
    return CLIPTokenizer(vocabulary, merges, model_max_length=77)


def make_model(
    folder: Path,
    prediction_type: str = "epsilon",
    seed: int = 0,
    in_channels: int = 4,
    *,
    attention: bool = False,
) -> Path:
    """Write a StableDiffusionPipeline folder as Stability and Runway published theirs.

    It has a PNDM scheduler, Stable Diffusion's betas and safetensors weights.

    Args:
        folder: where to write.
        prediction_type: what the UNet predicts.
        seed: of the random weights.
        in_channels: of the UNet; 9 is a UNet made for inpainting.
        attention: give the VAE attention, as Stable Diffusion's has.

    Returns:
        ``folder``.

    """
    torch.manual_seed(seed)
    text = CLIPTextConfig(
        vocab_size=514, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, bos_token_id=512, eos_token_id=513, pad_token_id=513,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=in_channels, block_out_channels=(16, 32), layers_per_block=1,
        norm_num_groups=4, cross_attention_dim=16, attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16), layers_per_block=1, norm_num_groups=4, sample_size=32,
        mid_block_add_attention=attention,
    )  # fmt: skip
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        prediction_type=prediction_type, skip_prk_steps=True, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    tokenizer = tiny_tokenizer(folder.with_name(folder.name + "-tokenizer"))
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(text), tokenizer=tokenizer, unet=unet,
        scheduler=scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipe.save_pretrained(folder)
    store_as_4(folder)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return folder

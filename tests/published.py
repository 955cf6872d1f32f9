"""The configuration files of published models, with their own keys and without what they lack.

Values are those of runwayml/stable-diffusion-v1-5 and, of stabilityai, stable-diffusion-2-1-base,
stable-diffusion-2-1 and sd-turbo. diffusers 0.6, 0.8, 0.10 and 0.24 wrote them, so each lacks the
keys that are younger: v1-5 has neither prediction_type nor scaling_factor, for example. A file that
this project wrote would have them all.

``write_published`` scales the sizes down, and leaves every other value as it is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from tests.tiny_model import tiny_tokenizer
from tests.usual_layout import store_as_4

Config = dict[str, Any]
DOWN = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
UP = ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3
WIDTHS = [320, 640, 1280, 1280]

UNET_0_6: Config = {
    "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.6.0", "act_fn": "silu",
    "attention_head_dim": 8, "block_out_channels": WIDTHS, "center_input_sample": False,
    "cross_attention_dim": 768, "down_block_types": DOWN, "downsample_padding": 1,
    "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 4, "layers_per_block": 2,
    "mid_block_scale_factor": 1, "norm_eps": 1e-05, "norm_num_groups": 32, "out_channels": 4,
    "sample_size": 64, "up_block_types": UP,
}  # fmt: skip
UNET_0_10: Config = {
    **UNET_0_6, "_diffusers_version": "0.10.0.dev0", "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024, "dual_cross_attention": False, "num_class_embeds": None,
    "only_cross_attention": False, "use_linear_projection": True,
}  # fmt: skip
UNET_0_24: Config = {
    **UNET_0_10, "_diffusers_version": "0.24.0.dev0", "addition_embed_type": None,
    "addition_embed_type_num_heads": 64, "addition_time_embed_dim": None,
    "attention_type": "default", "class_embed_type": None, "class_embeddings_concat": False,
    "conv_in_kernel": 3, "conv_out_kernel": 3, "cross_attention_norm": None, "dropout": 0.0,
    "encoder_hid_dim": None, "encoder_hid_dim_type": None, "mid_block_only_cross_attention": None,
    "mid_block_type": "UNetMidBlock2DCrossAttn", "num_attention_heads": None,
    "projection_class_embeddings_input_dim": None, "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False, "resnet_time_scale_shift": "default",
    "reverse_transformer_layers_per_block": None, "time_cond_proj_dim": None,
    "time_embedding_act_fn": None, "time_embedding_dim": None,
    "time_embedding_type": "positional", "timestep_post_act": None,
    "transformer_layers_per_block": 1, "upcast_attention": None,
}  # fmt: skip
VAE_0_6: Config = {
    "_class_name": "AutoencoderKL", "_diffusers_version": "0.6.0", "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3, "latent_channels": 4, "layers_per_block": 2, "norm_num_groups": 32,
    "out_channels": 3, "sample_size": 512, "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip
VAE_0_10: Config = {**VAE_0_6, "_diffusers_version": "0.10.0.dev0", "sample_size": 768}
VAE_0_24: Config = {
    **VAE_0_10, "_diffusers_version": "0.24.0.dev0", "force_upcast": True,
    "scaling_factor": 0.18215,
}  # fmt: skip
TEXT_1: Config = {
    "_name_or_path": "openai/clip-vit-large-patch14", "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0, "bos_token_id": 0, "dropout": 0.0, "eos_token_id": 2,
    "hidden_act": "quick_gelu", "hidden_size": 768, "initializer_factor": 1.0,
    "initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77, "model_type": "clip_text_model", "num_attention_heads": 12,
    "num_hidden_layers": 12, "pad_token_id": 1, "projection_dim": 768, "torch_dtype": "float32",
    "transformers_version": "4.22.0.dev0", "vocab_size": 49408,
}  # fmt: skip
TEXT_2: Config = {
    **TEXT_1, "_name_or_path": "hf-models/stable-diffusion-v2-768x768/text_encoder",
    "hidden_act": "gelu", "hidden_size": 1024, "intermediate_size": 4096,
    "num_attention_heads": 16, "num_hidden_layers": 23, "projection_dim": 512,
    "transformers_version": "4.25.0.dev0",
}  # fmt: skip
PNDM_0_6: Config = {
    "_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "num_train_timesteps": 1000,
    "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None,
    "clip_sample": False,
}  # fmt: skip
PNDM_0_10: Config = {
    **PNDM_0_6, "_diffusers_version": "0.10.0.dev0", "prediction_type": "epsilon",
}  # fmt: skip
# skip_prk_steps is PNDM's: the file was made from one of PNDM, and keeps the key.
DDIM_V: Config = {
    **PNDM_0_6, "_class_name": "DDIMScheduler", "_diffusers_version": "0.8.0",
    "prediction_type": "v_prediction",
}  # fmt: skip
EULER_TURBO: Config = {
    **PNDM_0_10, "_class_name": "EulerDiscreteScheduler", "_diffusers_version": "0.24.0.dev0",
    "interpolation_type": "linear", "sample_max_value": 1.0, "sigma_max": None,
    "sigma_min": None, "timestep_spacing": "trailing", "timestep_type": "discrete",
    "use_karras_sigmas": False,
}  # fmt: skip


def _index(version: str, scheduler: str, **others: Any) -> Config:
    return {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": version,
        "feature_extractor": ["transformers", "CLIPFeatureExtractor"],
        "safety_checker": [None, None],
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        **others,
    }


CHECKER = ["stable_diffusion", "StableDiffusionSafetyChecker"]
PUBLISHED: dict[str, dict[str, Config]] = {
    "v1-5": {
        "index": _index("0.6.0", "PNDMScheduler", safety_checker=CHECKER),
        "unet": UNET_0_6, "vae": VAE_0_6, "text_encoder": TEXT_1, "scheduler": PNDM_0_6,
    },
    "2-1-base": {
        "index": _index("0.10.0.dev0", "PNDMScheduler", requires_safety_checker=False),
        "unet": UNET_0_10, "vae": VAE_0_10, "text_encoder": TEXT_2, "scheduler": PNDM_0_10,
    },
    "2-1": {
        "index": _index("0.10.0.dev0", "DDIMScheduler", requires_safety_checker=False),
        "unet": {**UNET_0_10, "sample_size": 96, "upcast_attention": True},
        "vae": VAE_0_10, "text_encoder": TEXT_2, "scheduler": DDIM_V,
    },
    "sd-turbo": {
        "index": _index(
            "0.24.0.dev0", "EulerDiscreteScheduler", feature_extractor=[None, None],
            image_encoder=[None, None], requires_safety_checker=True,
        ),
        "unet": UNET_0_24, "vae": VAE_0_24, "text_encoder": TEXT_2, "scheduler": EULER_TURBO,
    },
}  # fmt: skip


def _token(content: str) -> Config:
    """A special token as the published tokenizer_config.json has it."""
    return {
        "__type": "AddedToken", "content": content, "lstrip": False, "normalized": True,
        "rstrip": False, "single_word": False,
    }  # fmt: skip


def write_configs(name: str, folder: Path) -> Path:
    """Write the published configuration files at their full sizes, without weights."""
    model = PUBLISHED[name]
    for part in ("unet", "vae", "text_encoder"):
        _write(folder / part / "config.json", model[part])
    _write(folder / "scheduler" / "scheduler_config.json", model["scheduler"])
    _write(folder / "model_index.json", model["index"])
    return folder


def write_published(name: str, folder: Path) -> Path:
    """Write a model with a published model's configuration, tiny sizes and random weights.

    Args:
        name: one of PUBLISHED.
        folder: where to write.

    Returns:
        ``folder``. Its latents are 8 x 8 or 12 x 12, an eighth of the published size.

    """
    torch.manual_seed(0)
    model = PUBLISHED[name]
    is_first = name == "v1-5"
    unet = {
        **model["unet"], "block_out_channels": [8, 16], "norm_num_groups": 4,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"], "cross_attention_dim": 16,
        "attention_head_dim": 2 if is_first else [1, 2], "layers_per_block": 1,
        "sample_size": model["unet"]["sample_size"] // 8,
    }  # fmt: skip
    # The pipeline takes 64 for any smaller size of a version before 0.9.
    if is_first:
        unet["sample_size"] = model["unet"]["sample_size"]
    vae = {
        **model["vae"], "block_out_channels": [4, 8], "norm_num_groups": 4,
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2, "layers_per_block": 1,
        "sample_size": model["vae"]["sample_size"] // 8,
    }  # fmt: skip
    text = {
        **model["text_encoder"], "vocab_size": 514, "hidden_size": 16, "intermediate_size": 32,
        "num_hidden_layers": 1, "num_attention_heads": 2,
    }  # fmt: skip
    UNet2DConditionModel.from_config(unet).save_pretrained(folder / "unet")
    AutoencoderKL.from_config(vae).save_pretrained(folder / "vae")
    CLIPTextModel(CLIPTextConfig.from_dict(text)).save_pretrained(folder / "text_encoder")
    store_as_4(folder)
    tiny_tokenizer(folder / "tokenizer")

    # The libraries wrote today's configurations beside the weights: these are the published ones.
    configs = {"unet": unet, "vae": vae, "text_encoder": text}
    for part, config in configs.items():
        _write(folder / part / "config.json", config)
    _write(folder / "scheduler" / "scheduler_config.json", model["scheduler"])
    _write(folder / "model_index.json", model["index"])
    pad = "<|endoftext|>" if is_first else "!"
    special = {
        "bos_token": _token("<|startoftext|>"),
        "eos_token": _token("<|endoftext|>"),
        "unk_token": _token("<|endoftext|>"),
    }
    tokenizer = {
        "add_prefix_space": False, **special, "do_lower_case": True, "errors": "replace",
        "model_max_length": 77, "name_or_path": "openai/clip-vit-large-patch14",
        "pad_token": "<|endoftext|>", "special_tokens_map_file": "./special_tokens_map.json",
        "tokenizer_class": "CLIPTokenizer",
    }  # fmt: skip
    _write(folder / "tokenizer" / "tokenizer_config.json", tokenizer)
    plain = {name: token | {"__type": None} for name, token in special.items()}
    for token in plain.values():
        del token["__type"]
    _write(folder / "tokenizer" / "special_tokens_map.json", {**plain, "pad_token": pad})
    return folder


def _write(path: Path, content: Config) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")

"""The configurations of published models, for a checkpoint in one file, which has none.

Values are those of the repositories that Runway, Stability and Segmind published with the weights.
Most values that are a default of diffusers or transformers are omitted. The tokenizer is CLIP's
(https://github.com/openai/CLIP, MIT License).
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hipa_deploy.embedded import ROOT

INDEX = "model_index.json"
MERGES = ROOT / "clip" / "merges.txt.gz"
START = "<|startoftext|>"
END = "<|endoftext|>"

_UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "layers_per_block": 2,
}
_SD1_UNET = {"cross_attention_dim": 768, "attention_head_dim": 8}
_SD2_UNET = {
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}
_SD1_TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
             "num_attention_heads": 12, "hidden_act": "quick_gelu"}  # fmt: skip
_SD2_TEXT = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23,
             "num_attention_heads": 16, "hidden_act": "gelu"}  # fmt: skip
# OpenCLIP, the text encoder of SD 2.x, was trained with prompts padded by token 0, which is '!'.
_SD1: dict[str, Any] = {"unet": _SD1_UNET, "text_encoder": _SD1_TEXT, "pad_token": END}
_SD2: dict[str, Any] = {"unet": _SD2_UNET, "text_encoder": _SD2_TEXT, "pad_token": "!"}
_SDXL_UNET = {
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
    "transformer_layers_per_block": [1, 2, 10],
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
# Distilled from SDXL (arXiv 2401.02677): fewer transformers, and one ResNet block in the middle.
_SSD_1B_UNET = {
    **_SDXL_UNET,
    "mid_block_type": "UNetMidBlock2D",
    "transformer_layers_per_block": [1, [2, 2], [4, 4]],
    "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
}
_VEGA_UNET = {
    **_SDXL_UNET,
    "mid_block_type": "UNetMidBlock2D",
    "transformer_layers_per_block": [1, [1, 1], [2, 2]],
    "reverse_transformer_layers_per_block": [[2, 2, 2], [1, 1, 1], 1],
}
# The published ids are not the tokenizers' own: transformers then finds the end token as the
# largest id.
_SDXL_IDS = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
_SDXL_TEXT_2 = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
                "num_attention_heads": 20, "hidden_act": "gelu",
                "projection_dim": 1280, **_SDXL_IDS}  # fmt: skip
_SDXL: dict[str, Any] = {
    "unet": _SDXL_UNET,
    "text_encoder": {**_SD1_TEXT, "projection_dim": 768, **_SDXL_IDS},
    "text_encoder_2": _SDXL_TEXT_2,
    "pad_token": END,
    "pad_token_2": "!",
    "scaling_factor": 0.13025,
    "size": 128,
    "prediction_type": "epsilon",
}
# 'transformers' tells models of equal widths apart: how many transformers the UNet has.
MODELS: dict[str, dict[str, Any]] = {
    "sd15": {**_SD1, "size": 64, "prediction_type": "epsilon"},
    "sd21-base": {**_SD2, "size": 64, "prediction_type": "epsilon"},
    "sd21-v": {
        **_SD2,
        "unet": {**_SD2_UNET, "upcast_attention": True},
        "size": 96,
        "prediction_type": "v_prediction",
    },
    # Made for inpainting: noise, mask and source are 4 + 1 + 4 channels.
    "sd15-inpainting": {
        **_SD1,
        "unet": {**_SD1_UNET, "in_channels": 9},
        "size": 64,
        "prediction_type": "epsilon",
    },
    "sd2-inpainting": {
        **_SD2,
        "unet": {**_SD2_UNET, "in_channels": 9},
        "size": 64,
        "prediction_type": "epsilon",
    },
    "sdxl": {**_SDXL, "transformers": 70},
    "ssd-1b": {**_SDXL, "unet": _SSD_1B_UNET, "transformers": 34},
    "vega": {**_SDXL, "unet": _VEGA_UNET, "transformers": 15},
    "sdxl-inpainting": {
        **_SDXL,
        "unet": {**_SDXL_UNET, "in_channels": 9},
        "transformers": 70,
    },
}


def context_width(name: str) -> int:
    """Return the width D of the text context [B, 77, D] of one of ``MODELS``."""
    return int(MODELS[name]["unet"]["cross_attention_dim"])


def input_channels(name: str) -> int:
    """Return how many channels the UNet of one of ``MODELS`` takes: 4, or 9 for inpainting."""
    unet = {**_UNET, **MODELS[name]["unet"]}
    return int(unet["in_channels"])


def transformer_count(name: str) -> int | None:
    """Return how many transformers the UNet of one of ``MODELS`` has; None where none is alike."""
    count: int | None = MODELS[name].get("transformers")
    return count


def write_config(name: str, folder: Path) -> Path:
    """Write a diffusers folder without weights: configurations and tokenizers.

    Args:
        name: one of ``MODELS``.
        folder: where to write; it is made if necessary.

    Returns:
        ``folder``.

    """
    write_files(_configs(MODELS[name]), folder)
    _write_tokenizer(folder / "tokenizer", MODELS[name]["pad_token"])
    if "pad_token_2" in MODELS[name]:
        _write_tokenizer(folder / "tokenizer_2", MODELS[name]["pad_token_2"])
    return folder


def write_files(files: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    """Write JSON files, by their paths in ``folder``."""
    for name, config in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def model_index(scheduler: str, *, has_text_pair: bool = False) -> dict[str, Any]:
    """The content of the model_index.json of a StableDiffusionPipeline, or of SDXL's.

    It lists a library and a class for each part; the absent ones have neither.

    Args:
        scheduler: the class, in diffusers.
        has_text_pair: whether the model has two text encoders, as SDXL has.

    """
    diffusers = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "scheduler": scheduler}
    transformers = {"text_encoder": "CLIPTextModel", "tokenizer": "CLIPTokenizer"}
    absent = ["feature_extractor", "image_encoder"]
    facts: dict[str, Any] = {
        "_class_name": "StableDiffusionXLPipeline",
        "force_zeros_for_empty_prompt": True,
    }
    if has_text_pair:
        transformers["text_encoder_2"] = "CLIPTextModelWithProjection"
        transformers["tokenizer_2"] = "CLIPTokenizer"
    else:
        facts = {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False}
        absent.insert(0, "safety_checker")
    return {
        **facts,
        **{part: ["diffusers", kind] for part, kind in diffusers.items()},
        **{part: ["transformers", kind] for part, kind in transformers.items()},
        **{part: [None, None] for part in absent},
    }


def _configs(model: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the JSON files of a diffusers folder, by path, for a value of ``MODELS``."""
    # The VAE, the noise schedule and CLIP's vocabulary are the same in all of these models. SDXL's
    # VAE was trained anew.
    vae = {
        "latent_channels": 4,
        "scaling_factor": model.get("scaling_factor", 0.18215),
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "sample_size": 8 * model["size"],
    }
    schedule = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "prediction_type": model["prediction_type"],
    }
    text = {
        "model_type": "clip_text_model",
        "vocab_size": 49408,
        "max_position_embeddings": 77,
        **model["text_encoder"],
    }
    second = {}
    if "text_encoder_2" in model:
        values = {**text, "projection_dim": 512, **model["text_encoder_2"]}
        values["architectures"] = ["CLIPTextModelWithProjection"]
        second["text_encoder_2/config.json"] = values
    return {
        INDEX: model_index("DDIMScheduler", has_text_pair="text_encoder_2" in model),
        **second,
        "unet/config.json": {
            "_class_name": "UNet2DConditionModel",
            "sample_size": model["size"],
            **_UNET,
            **model["unet"],
        },
        "vae/config.json": {"_class_name": "AutoencoderKL", **vae},
        "scheduler/scheduler_config.json": {"_class_name": "DDIMScheduler", **schedule},
        "text_encoder/config.json": {"architectures": ["CLIPTextModel"], **text},
    }


def _write_tokenizer(folder: Path, pad_token: str) -> None:
    """Write CLIP's tokenizer as the files that transformers' CLIPTokenizer reads."""
    # The vocabulary, in CLIP's order: the letters of all bytes, the same at the end of a word, the
    # merged pairs (the file's first line is its version), and the two special tokens.
    merges = gzip.decompress(MERGES.read_bytes()).decode("utf-8")
    letters = _byte_letters()
    words = letters + [letter + "</w>" for letter in letters]
    for pair in merges.splitlines()[1:]:
        words.append("".join(pair.split()))
    words += [START, END]
    vocabulary = {word: number for number, word in enumerate(words)}

    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad_token}
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "do_lower_case": True,
        **special,
    }
    files = {
        "merges.txt": merges,
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False),
        "special_tokens_map.json": json.dumps(special),
        "tokenizer_config.json": json.dumps(settings),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(content, encoding="utf-8")


def _byte_letters() -> list[str]:
    """Return a printable letter for each of the 256 bytes, in the order of CLIP's vocabulary.

    Bytes that print as themselves come first; the others get the letters from U+0100 on
    (``bytes_to_unicode`` of https://github.com/openai/CLIP).
    """
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = 256 - len(printable)
    return [*map(chr, printable), *map(chr, range(256, 256 + others))]

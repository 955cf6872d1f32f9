"""Stable Diffusion's folder with its true configuration and headers, and no weights.

The files have holes where the weights would be, so that a model of 2 GB takes no space. Whatever
reads headers alone works with them.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from hipa_deploy.embedded import MODEL

ROOT = Path(__file__).parents[1]
NAMES = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}


def make_model() -> ModuleType:
    """The benchmark's script, which has the published shapes."""
    path = ROOT / "benchmarks/make_model.py"
    spec = importlib.util.spec_from_file_location("make_model", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_sparse(folder: Path, size: str) -> Path:
    """Write a model of a size of ``benchmarks/make_model.py``."""
    published = make_model()
    shapes = published.SIZES[size]
    with torch.device("meta"):
        parts: dict[str, Any] = {
            "unet": UNet2DConditionModel(**shapes["unet"]),
            "vae": AutoencoderKL(**published.VAE, sample_size=shapes["unet"]["sample_size"] * 8),
            "text_encoder": CLIPTextModel(CLIPTextConfig(vocab_size=49408, **shapes["text"])),
        }
    for name, part in parts.items():
        (folder / name).mkdir(parents=True)
        if name == "text_encoder":
            part.config.save_pretrained(folder / name)
        else:
            part.save_config(folder / name)
        write_header(folder / name / NAMES[name], part.state_dict())
    scheduler = DDIMScheduler(prediction_type=shapes["prediction_type"])
    scheduler.save_pretrained(folder / "scheduler")
    shutil.copytree(MODEL / "tokenizer", folder / "tokenizer")
    shutil.copy(MODEL / "model_index.json", folder)
    return folder


def write_header(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """A .safetensors file in float16 whose numbers are a hole."""
    header = {}
    end = 0
    for name, tensor in tensors.items():
        start = end
        end += 2 * tensor.numel()
        header[name] = {
            "dtype": "F16",
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    content = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        file.truncate(8 + len(content) + end)

"""A small folder in the layout of MS-COCO, and a small CLIP of random weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from tests.tiny_model import tiny_tokenizer

WORDS = ("apple", "pear", "lemon", "plum", "fig", "boat", "cat", "dog", "tree", "hat")


def write_coco(folder: Path, images: int = 10, year: int = 2017) -> Path:
    """Write photographs of noise in several shapes, with two captions each.

    Args:
        folder: where ``annotations`` and ``val2017`` are made.
        images: how many.
        year: of the names.

    Returns:
        ``folder``.

    """
    generator = np.random.default_rng(0)
    (folder / "annotations").mkdir(parents=True)
    (folder / f"val{year}").mkdir()
    listed = []
    captions = []
    for place in range(images):
        number = 900 - 7 * place  # neither consecutive nor sorted, as there
        name = f"{number:012d}.jpg"
        height, width = 40 + place, 60 - place
        coarse = generator.integers(0, 256, (5, 5, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((width, height)).save(folder / f"val{year}" / name)
        listed.append({"id": number, "file_name": name, "height": height, "width": width})
        word = WORDS[place % len(WORDS)]
        for text in (f"a {word} \n", f"The {word} number {place}."):
            captions.append({"id": len(captions), "image_id": number, "caption": text})
    content = {"info": {"year": year}, "images": listed, "annotations": captions}
    (folder / "annotations" / f"captions_val{year}.json").write_text(json.dumps(content))
    return folder


def write_clip(folder: Path) -> Path:
    """Write a CLIP of transformers: model, tokenizer, preprocessing."""
    torch.manual_seed(0)
    text = {"vocab_size": 514, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2, "bos_token_id": 512, "eos_token_id": 513}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
              "num_attention_heads": 2, "image_size": 32, "patch_size": 8}  # fmt: skip
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    tiny_tokenizer(folder.with_name(folder.name + "-tokenizer")).save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessor(**size).save_pretrained(folder)
    return folder

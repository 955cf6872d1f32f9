"""One model in every form in which models lie on disks: the same tensors in other files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Weights = dict[str, torch.Tensor]
STEMS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}


def repacked(folder: Path, out: Path, write: Callable[[Path, str, Weights], None]) -> Path:
    """Copy a diffusers folder, with the weights of each part written by ``write``.

    Args:
        folder: a diffusers folder with one .safetensors file a part.
        out: the folder to write.
        write: takes the part's folder, the stem of its files, and its tensors.

    Returns:
        ``out``.

    """
    shutil.copytree(folder, out)
    for part, stem in STEMS.items():
        path = out / part / f"{stem}.safetensors"
        weights = load_file(path)
        path.unlink()
        write(out / part, stem, weights)
    return out


def as_bin(part: Path, stem: str, weights: Weights) -> None:
    """As torch pickles it. transformers has another stem for that."""
    torch.save(weights, part / ("pytorch_model.bin" if stem == "model" else f"{stem}.bin"))


def as_fp16_variant(part: Path, stem: str, weights: Weights) -> None:
    halves = {name: weight.half() for name, weight in weights.items()}
    save_file(halves, part / f"{stem}.fp16.safetensors")


def as_shards(part: Path, stem: str, weights: Weights) -> None:
    """Two shards and their index, as ``save_pretrained(max_shard_size=...)`` writes them."""
    names = sorted(weights)
    halves = (names[: len(names) // 2], names[len(names) // 2 :])
    places = {}
    for number, half in enumerate(halves, start=1):
        file = f"{stem}-{number:05d}-of-00002.safetensors"
        save_file({name: weights[name] for name in half}, part / file)
        places |= dict.fromkeys(half, file)
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (part / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


def with_old_attention(part: Path, stem: str, weights: Weights) -> None:
    """With the VAE's attention as diffusers before 0.12 named it: in SD 1.5 as published."""
    renamed = {}
    for name, weight in weights.items():
        if "transformer_blocks" not in name and "attentions" in name:
            pairs = (
                ("to_q", "query"),
                ("to_k", "key"),
                ("to_v", "value"),
                ("to_out.0", "proj_attn"),
            )
            for new, old in pairs:
                name = name.replace(f".{new}.", f".{old}.")
        renamed[name] = weight
    save_file(renamed, part / f"{stem}.safetensors")


def hub_cache(folder: Path, root: Path) -> Path:
    """Write the layout of the hub's cache: links from a snapshot into one folder of contents.

    Returns:
        The snapshot's folder.

    """
    home = root / "models--owner--name"
    snapshot = home / "snapshots" / "0123456789abcdef"
    blobs = home / "blobs"
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted(folder.rglob("*"))):
        if path.is_file():
            link = snapshot / path.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, blobs / str(number))
            link.symlink_to(blobs / str(number))
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(snapshot.name)
    return snapshot

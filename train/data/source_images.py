"""The images that editing, inpainting and super-resolution learn from: the teacher's own, or a folder of real ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from hipa_deploy.errors import HipaError
from hipa_deploy.generate.prompt_files import read_cells
from hipa_deploy.hashing import file_sha256
from hipa_deploy.images.read import fit_image, read_image
from hipa_deploy.train.data.teacher_pairs import Pairs, Rows, lookup
from hipa_deploy.train.model.diffusion_model import DiffusionModel, to_float, to_uint8
from hipa_deploy.train.model.unet_adaptor import without_adaptor

CAPTIONS = "metadata.csv"  # as datasets' ImageFolder has it
FORMATS = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


@dataclass(frozen=True)
class Originals:
    """N images: rows -> uint8 [B, H, W, 3], and the scaled latents that decode to them, rows -> [B, C, h, w].

    ``prompt_N`` is each one's prompt, an index int64 [N] below ``prompts``; ``key`` says what they depend on.
    """

    images: Rows
    latents: Rows
    prompt_N: Tensor
    prompts: int
    key: dict[str, Any]

    def __len__(self) -> int:
        return len(self.prompt_N)


def teacher_originals(
    model: DiffusionModel,
    pairs: Pairs,
    prompts: int,
    decode: Callable[[Tensor], Tensor],
    console: Console | None,
) -> Originals:
    """The teacher's images of its pairs: no data set is needed."""

    def latents(rows: Tensor) -> Tensor:
        return pairs.latents_NCHW[rows].float().to(model.device)

    def images(rows: list[int]) -> Tensor:
        return to_uint8(decode(latents(torch.tensor(rows))))

    table = lookup("teacher images", images, len(pairs), console)
    return Originals(table, latents, pairs.prompt_N, prompts, {"images": "teacher's"})


def folder_originals(
    model: DiffusionModel, folder: Path, prompts: list[str], console: Console | None
) -> tuple[Originals, list[str]]:
    """Real images at the model's own size; and ``prompts`` with their captions. An image without one has the empty one.

    Raises:
        HipaError: no such folder, no image in it, a broken one, or captions that cannot be read.

    """
    paths = (
        sorted(path for path in folder.rglob("*") if path.suffix.lower() in FORMATS)
        if folder.is_dir()
        else []
    )
    if not paths:
        raise HipaError(
            f"images {folder}: no image in it. Expected a folder of {', '.join(sorted(FORMATS))} files."
        )
    captions = _captions(folder)
    texts = [captions.get(path.relative_to(folder).as_posix(), "") for path in paths]
    index = {text: i for i, text in enumerate(prompts)}
    for text in texts:
        index.setdefault(text, len(index))

    def images(rows: list[int]) -> Tensor:
        return torch.from_numpy(
            np.stack([fit_image(read_image(paths[i]), *model.resolution) for i in rows])
        )

    def latents(rows: list[int]) -> Tensor:
        with without_adaptor(
            model.vae
        ):  # targets, also where a step asks for them while the encoder learns
            return model.encode(to_float(table(torch.tensor(rows))))

    table = lookup("images", images, len(paths), console)
    originals = Originals(
        table,
        lookup("latents", latents, len(paths), console),
        torch.tensor([index[text] for text in texts]),
        len(index),
        {"images": [file_sha256(path) for path in paths]},
    )
    return originals, list(index)


def _captions(folder: Path) -> dict[str, str]:
    """Caption by file name."""
    path = folder / CAPTIONS
    if not path.exists():
        return {}
    names, texts = read_cells(path, "file_name"), read_cells(path, None)
    return dict(zip(names, texts, strict=True))

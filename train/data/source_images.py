"""Source images of editing, inpainting and super-resolution: the teacher's, or a folder of them.

Shapes: N images, B rows of a batch, C latent channels, H, W image size in pixels, h, w latent size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from hipa_deploy.disk.hashing import file_sha256
from hipa_deploy.images.read import fit_image, read_image
from hipa_deploy.train.data.captions import folder_captions, image_paths, tell_skipped
from hipa_deploy.train.data.teacher_pairs import (
    Pairs,
    RowFunction,
    cached_rows,
    fits_table,
    prompt_conditions,
    rows_at_once,
)
from hipa_deploy.train.distribution.terms import RealLatents
from hipa_deploy.train.loop.progress_bar import ProgressBar
from hipa_deploy.train.model.diffusion_model import DiffusionModel, to_float, to_uint8
from hipa_deploy.train.model.unet_adaptor import without_adaptor
from hipa_deploy.train.recipes.recipe import MixedPrecision

READERS = 4  # threads that read images where all are checked
READ_AT_ONCE = 64


@dataclass(frozen=True)
class SourceImages:
    """N images at the model's own resolution, their latents and their prompts.

    Attributes:
        images: Rows int64 [B] -> uint8 [B, H, W, 3].
        latents: Rows int64 [B] -> scaled latents float32 [B, C, h, w] that decode to the images.
        prompt_N: Index of each image's prompt, int64 [N], below ``prompts``.
        prompts: How many prompts there are.
        key: What the images depend on, as JSON values: part of a cache key.

    """

    images: RowFunction
    latents: RowFunction
    prompt_N: Tensor
    prompts: int
    key: dict[str, Any]

    def __len__(self) -> int:
        return len(self.prompt_N)


def teacher_source_images(
    model: DiffusionModel,
    pairs: Pairs,
    prompts: int,
    decode: Callable[[Tensor], Tensor],
    console: Console | None,
    *,
    kept: bool = True,
    shown: Sequence[str] = (),
    precision: MixedPrecision = "no",
) -> SourceImages:
    """The teacher's images of its pairs, so that no data set is needed.

    Args:
        model: The base model; its device receives the latents.
        pairs: N teacher pairs.
        prompts: How many prompts the pairs' indices count.
        decode: Scaled latents [B, C, h, w] -> images [B, 3, H, W] in [0, 1].
        console: Where the progress bar goes; stderr if None.
        kept: Whether images are kept, where all of them fit in memory; else they are decoded
            whenever they are asked for.
        shown: The prompts that the pairs show, where they are not all of them.
        precision: In which ``decode`` computes.

    """
    # Defaults are left out: edits from before they were part of the key are found.
    key: dict[str, Any] = {"images": "teacher's"}
    if shown:
        key["shown"] = list(shown)
    if precision != "no":
        key["precision"] = precision

    def latents(rows: Tensor) -> Tensor:
        return pairs.latents_NCHW[rows].float().to(model.device)

    @torch.no_grad()
    def images(rows: Tensor) -> Tensor:
        return to_uint8(decode(latents(rows)))

    decoded: RowFunction = images
    if kept:
        at_once = rows_at_once(model.resolution)
        decoded = cached_rows(
            "teacher images",
            lambda rows: images(torch.tensor(rows)),
            len(pairs),
            console,
            at_once,
        )
    return SourceImages(decoded, latents, pairs.prompt_N, prompts, key)


def folder_source_images(
    model: DiffusionModel,
    folder: Path,
    prompts: list[str],
    console: Console | None,
    captions: bool = True,
) -> tuple[SourceImages, list[str]]:
    """Read a folder of images, each cropped and resized to the model's own resolution.

    Captions lie in the folder, as ``train/data/captions.py`` says; an image without a caption has
    the empty prompt.

    Args:
        model: The base model: its resolution, and the VAE that encodes the images.
        folder: Folder of images, searched with its sub-folders.
        prompts: Prompts that already have an index.
        console: Where the progress bar goes, and which images have no caption; stderr if None.
        captions: Whether captions are read. If False, every image has the empty prompt.

    Returns:
        The images, and ``prompts`` followed by the captions that are not among them.

    Raises:
        HipaError: The folder is missing or holds no image, an image is damaged, no image has a
            caption, or the captions cannot be read.

    """
    paths = image_paths(folder)
    tell_skipped(folder, console)

    # Captions that are not yet among the prompts get the next indices, in the order of the images.
    texts = folder_captions(folder, paths, console) if captions else [""] * len(paths)
    index = {text: number for number, text in enumerate(prompts)}
    for text in texts:
        index.setdefault(text, len(index))

    def images(rows: list[int]) -> Tensor:
        fitted = [fit_image(read_image(paths[row]), *model.resolution) for row in rows]
        return torch.from_numpy(np.stack(fitted))

    # Images that do not fit in memory are read when a step asks for them, their latents too. One
    # that is damaged would end every attempt at that step, hours later.
    height, width = model.resolution
    latent_bytes = 4 * math.prod(model.latent_shape_CHW)
    if not fits_table(3 * height * width, len(paths)) and not fits_table(latent_bytes, len(paths)):
        _check_readable(paths, console)
    image_rows = cached_rows("images", images, len(paths), console)

    # These latents are targets. An adaptor on the encoder must not change them, not even where they
    # are computed in a training step, while that adaptor learns.
    def latents(rows: list[int]) -> Tensor:
        with without_adaptor(model.vae):
            return model.encode(to_float(image_rows(torch.tensor(rows))))

    at_once = rows_at_once(model.resolution)
    source_images = SourceImages(
        images=image_rows,
        latents=cached_rows("latents", latents, len(paths), console, at_once),
        prompt_N=torch.tensor([index[text] for text in texts]),
        prompts=len(index),
        # 'colours' says how the files are read: in 0.1.0 their colour profiles were ignored.
        key={"images": [file_sha256(path) for path in paths], "colours": "sRGB"},
    )
    return source_images, list(index)


def _check_readable(paths: Sequence[Path], console: Console | None) -> None:
    """Read every image once.

    Raises:
        HipaError: one is damaged.

    """

    def read(path: Path) -> None:
        read_image(path)

    starts = range(0, len(paths), READ_AT_ONCE)
    parts = [paths[start : start + READ_AT_ONCE] for start in starts]
    with ThreadPoolExecutor(READERS) as pool, ProgressBar(console) as progress:
        for part in progress.track(parts, description="checking images"):
            list(pool.map(read, part))


def real_latents(model: DiffusionModel, folder: Path, console: Console | None) -> RealLatents:
    """Latents and conditions of a folder of captioned images.

    Args:
        model: The base model, which encodes both.
        folder: As for ``folder_source_images``.
        console: As for ``folder_source_images``.

    Raises:
        HipaError: As ``folder_source_images``.

    """
    images, captions = folder_source_images(model, folder, [], console)
    conditions = prompt_conditions(model, captions, console)
    return RealLatents(
        count=len(images),
        latents=images.latents,
        conditions=lambda rows: conditions(images.prompt_N[rows]),
    )

"""Images on the way to a network: crop, scale, and clean-fid's resize. Needs no torch.

Shapes: H, W image size in pixels, S side of the square, N images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from hipa_deploy.disk.reading import check_file
from hipa_deploy.errors import as_line
from hipa_deploy.images.read import MAX_FILE

INCEPTION_SIDE = 299
READERS = 4  # threads that decode images while others are computed on


def read_square(path: Path, side: int) -> np.ndarray:
    """Read an image as the peers' code does: RGB, cropped about its centre, scaled with Lanczos.

    As there, neither EXIF's orientation nor a colour profile is looked at: COCO's files have been
    stripped of both, and generated ones have none.

    Args:
        path: of the file.
        side: S.

    Returns:
        uint8 [S, S, 3].

    Raises:
        HipaError: it cannot be read.

    """
    with as_line(f"image {path} cannot be read", "Expected a complete image file."):
        check_file(path, MAX_FILE, "Expected an image file.")
        with Image.open(path) as image:
            return square(np.asarray(image.convert("RGB")), side)


def square(image_HWC: np.ndarray, side: int) -> np.ndarray:
    """Crop an image to a square about its centre, and scale it with Lanczos' filter.

    The corner of the crop is rounded as torchvision's ``center_crop`` rounds it, which the peers
    call.

    Args:
        image_HWC: uint8 [H, W, 3].
        side: S.

    Returns:
        uint8 [S, S, 3].

    """
    height, width = image_HWC.shape[:2]
    short = min(height, width)
    top = round((height - short) / 2)
    left = round((width - short) / 2)
    image = Image.fromarray(image_HWC[top : top + short, left : left + short])
    return np.asarray(image.resize((side, side), Image.Resampling.LANCZOS))


def clean_resize(image_HWC: np.ndarray, side: int = INCEPTION_SIDE) -> np.ndarray:
    """Scale an image as clean-fid's mode 'clean' does: bicubic, in float, no rounding to 8 bits.

    Parmar et al. 2022, arXiv 2104.11222; cleanfid/resize.py of clean-fid 0.1.35.

    Args:
        image_HWC: uint8 [H, W, 3].
        side: S.

    Returns:
        float32 [3, S, S] in [0, 255].

    """
    channels = []
    for channel_HW in np.moveaxis(image_HWC, -1, 0):
        image = Image.fromarray(channel_HW.astype(np.float32), mode="F")
        scaled = image.resize((side, side), Image.Resampling.BICUBIC)
        channels.append(np.asarray(scaled).clip(0, 255))
    return np.stack(channels)


def read_squares(paths: Sequence[Path], side: int, batch: int) -> Iterator[np.ndarray]:
    """Read images in batches, several files at once.

    Yields:
        uint8 [N, S, S, 3], N at most ``batch``, in the order of ``paths``.

    """
    with ThreadPoolExecutor(READERS) as pool:
        for start in range(0, len(paths), batch):
            some = paths[start : start + batch]
            yield np.stack(list(pool.map(read_square, some, [side] * len(some))))

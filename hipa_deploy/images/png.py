"""Images written with their generation parameters, enlarging, and image grids.

Shapes: N images; H, W height and width in pixels; C = 3 colour channels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hipa_deploy.disk.files import write_file
from hipa_deploy.errors import HipaError
from hipa_deploy.marks.image_file import PARAMETERS_KEY, encode_image, image_format
from hipa_deploy.marks.read_marks import read_parameters

__all__ = [
    "PARAMETERS_KEY",
    "enlarge",
    "grid",
    "png_bytes",
    "read_parameters",
    "save_image",
    "save_png",
]


def png_bytes(image_HWC: np.ndarray, parameters: dict[str, Any]) -> bytes:
    """Encode an image as PNG, with its parameters and its provenance; see ``encode_image``.

    Equal input gives equal bytes.

    Args:
        image_HWC: uint8 [H, W, 3].
        parameters: values that JSON can hold, such as prompt and seed.

    """
    return encode_image(image_HWC, parameters, "png")


def save_image(
    path: str | Path,
    image_HWC: np.ndarray,
    parameters: dict[str, Any],
    *,
    quality: int | None = None,
    force: bool = False,
) -> None:
    """Write an image with its parameters and provenance, completely or not at all.

    Args:
        path: the file; its suffix is the format: .png, .webp, .jpg or .jpeg.
        image_HWC: uint8 [H, W, 3].
        parameters: values that JSON can hold, such as prompt and seed.
        quality: 1 to 100 for WebP and JPEG; None is lossless WebP, or JPEG of quality 95.
        force: whether a file that exists is replaced.

    Raises:
        HipaError: the file exists and ``force`` is False, the suffix is none of these, the quality
            does not fit, or what is given is no such image or no parameters.
        OSError: the file cannot be written.

    Example:
        >>> result = pipe("3d emoji of a red apple", seed=0)
        >>> save_image("apple.webp", result.images_BHWC[0], result.parameters[0])

    """
    path = Path(path)
    content = encode_image(image_HWC, parameters, image_format(path), quality=quality)
    _write(path, content, force)


def save_png(
    path: str | Path, image_HWC: np.ndarray, parameters: dict[str, Any], *, force: bool = False
) -> None:
    """Write an image and its generation parameters as PNG, completely or not at all.

    Args:
        path: the file, whatever its suffix; ``save_image`` goes by the suffix.
        image_HWC: uint8 [H, W, 3].
        parameters: values that JSON can hold, such as prompt and seed.
        force: whether a file that exists is replaced.

    Raises:
        HipaError: the file exists and ``force`` is False, or what is given is no such image or no
            parameters.
        OSError: the file cannot be written.

    Example:
        >>> result = pipe("3d emoji of a red apple", seed=0)
        >>> save_png("apple.png", result.images_BHWC[0], result.parameters[0])

    """
    _write(Path(path), png_bytes(image_HWC, parameters), force)


def _write(path: Path, content: bytes, force: bool) -> None:
    try:
        write_file(path, content, replace=force)
    except FileExistsError:
        raise HipaError(
            f"{path} exists. Give force=True to replace it, or choose another name."
        ) from None


def enlarge(image_HWC: np.ndarray, factor: int) -> np.ndarray:
    """Enlarge an image by bicubic interpolation: the input of super-resolution.

    Args:
        image_HWC: uint8 [H, W, 3].
        factor: of the enlargement along either axis.

    Returns:
        uint8 [factor * H, factor * W, 3].

    """
    height, width = image_HWC.shape[:2]
    size = (factor * width, factor * height)
    return np.asarray(Image.fromarray(image_HWC).resize(size, Image.Resampling.BICUBIC))


def grid(columns: list[np.ndarray], gap: int = 2) -> np.ndarray:
    """Lay out columns of images side by side on white.

    Args:
        columns: uint8 [N, H, W, 3] each, top to bottom.
        gap: white pixels below and to the right of each image.

    Returns:
        uint8 [N * (H + gap), columns * (W + gap), 3].

    """
    strips = []
    for images_NHWC in columns:
        gaps = ((0, 0), (0, gap), (0, gap), (0, 0))
        padded_NHWC = np.pad(images_NHWC, gaps, constant_values=255)
        strips.append(np.concatenate(list(padded_NHWC), axis=0))
    return np.concatenate(strips, axis=1)

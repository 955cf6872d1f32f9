"""PNG files that carry the generation parameters of their image, enlarging, and image grids.

Shapes: N images; H, W height and width in pixels; C = 3 colour channels.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from hipa_deploy.disk.files import write_file
from hipa_deploy.errors import HipaError

# The keyword of the text chunk; it is part of the file format.
PARAMETERS_KEY = "hipa"


def png_bytes(image_HWC: np.ndarray, parameters: dict[str, Any]) -> bytes:
    """Encode an image as PNG, with its generation parameters as JSON in a text chunk.

    Equal input gives equal bytes.

    Args:
        image_HWC: uint8 [H, W, 3].
        parameters: values that JSON can hold, such as prompt and seed.

    """
    info = PngImagePlugin.PngInfo()
    # iTXt holds UTF-8; the older tEXt chunk holds Latin-1 only, which few prompts fit.
    info.add_itxt(PARAMETERS_KEY, json.dumps(parameters, sort_keys=True, ensure_ascii=False))
    buffer = io.BytesIO()
    Image.fromarray(image_HWC).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def save_png(
    path: Path, image_HWC: np.ndarray, parameters: dict[str, Any], *, force: bool = False
) -> None:
    """Write an image and its generation parameters as PNG, completely or not at all.

    Args:
        path: the file.
        image_HWC: uint8 [H, W, 3].
        parameters: values that JSON can hold, such as prompt and seed.
        force: whether a file that exists is replaced.

    Raises:
        HipaError: the file exists and ``force`` is False.
        OSError: the file cannot be written.

    Example:
        >>> result = pipe("3d emoji of a red apple", seed=0)
        >>> save_png(Path("apple.png"), result.images_BHWC[0], result.parameters[0])

    """
    try:
        write_file(path, png_bytes(image_HWC, parameters), replace=force)
    except FileExistsError:
        raise HipaError(
            f"{path} exists. Give force=True to replace it, or choose another name."
        ) from None


def read_parameters(path: Path) -> dict[str, Any]:
    """Read the generation parameters from a PNG that hipa-generate or ``save_png`` wrote.

    Raises:
        HipaError: the file is not an image, or has no generation parameters.

    """
    try:
        with Image.open(path) as image:
            parameters: dict[str, Any] = json.loads(image.info[PARAMETERS_KEY])
            return parameters
    except KeyError:
        raise HipaError(
            f"{path} carries no generation parameters. Expected a PNG that hipa-generate wrote."
        ) from None
    except (OSError, ValueError) as error:
        raise HipaError(
            f"{path} cannot be read ({error}). Expected a PNG that hipa-generate wrote."
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

"""PNG images that carry their generation parameters: all that makes the same image again."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from hipa_deploy.errors import HipaError
from hipa_deploy.files import write_file

PARAMETERS_KEY = "hipa"


def png_bytes(image_HWC: np.ndarray, parameters: dict[str, Any]) -> bytes:
    """uint8 [H, W, 3] as PNG, with the generation parameters as JSON in a text chunk.

    Equal input gives equal bytes.

    Example:
        >>> png_bytes(image_HWC, {"prompt": "a red apple", "seed": 0})[:4]
        b'\\x89PNG'

    """
    info = PngImagePlugin.PngInfo()
    info.add_itxt(PARAMETERS_KEY, json.dumps(parameters, sort_keys=True, ensure_ascii=False))
    buffer = io.BytesIO()
    Image.fromarray(image_HWC).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def save_png(path: Path, image_HWC: np.ndarray, parameters: dict[str, Any]) -> None:
    """Write ``png_bytes`` to ``path``, whole or not at all."""
    write_file(path, png_bytes(image_HWC, parameters))


def read_parameters(path: Path) -> dict[str, Any]:
    """The generation parameters of an image that hipa-generate wrote.

    Raises:
        HipaError: not an image, or one without generation parameters.

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
    """uint8 [H, W, 3] -> [factor H, factor W, 3], bicubic: what super-resolution starts from."""
    height, width = image_HWC.shape[:2]
    return np.asarray(
        Image.fromarray(image_HWC).resize(
            (factor * width, factor * height), Image.Resampling.BICUBIC
        )
    )


def grid(columns: list[np.ndarray], gap: int = 2) -> np.ndarray:
    """Columns of images side by side on white.

    Args:
        columns: each uint8 [N, H, W, 3].
        gap: white pixels right of and below each image.

    Returns:
        uint8 [N * (H + gap), len(columns) * (W + gap), 3].

    """
    padded = [np.pad(c, ((0, 0), (0, gap), (0, gap), (0, 0)), constant_values=255) for c in columns]
    return np.concatenate([np.concatenate(list(c), axis=0) for c in padded], axis=1)

"""Images that carry the recipe that made them."""

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


def png_bytes(image_HWC: np.ndarray, recipe: dict[str, Any]) -> bytes:
    """uint8 [H, W, 3] as PNG with the recipe as JSON in a text chunk. Equal input gives equal bytes."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt(PARAMETERS_KEY, json.dumps(recipe, sort_keys=True, ensure_ascii=False))
    buffer = io.BytesIO()
    Image.fromarray(image_HWC).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def save_png(path: Path, image_HWC: np.ndarray, recipe: dict[str, Any]) -> None:
    """Write ``png_bytes`` to ``path``, whole or not at all."""
    write_file(path, png_bytes(image_HWC, recipe))


def read_parameters(path: Path) -> dict[str, Any]:
    """The recipe of an image that hipa-generate wrote.

    Raises:
        HipaError: not an image, or no recipe in it.

    """
    try:
        with Image.open(path) as image:
            recipe: dict[str, Any] = json.loads(image.info[PARAMETERS_KEY])
            return recipe
    except KeyError:
        raise HipaError(
            f"{path} carries no recipe. Expected a PNG that hipa-generate wrote."
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
    """Lay out columns of uint8 [N, H, W, 3] side by side on white: uint8 [N * (H + gap), columns * (W + gap), 3]."""
    padded = [np.pad(c, ((0, 0), (0, gap), (0, gap), (0, 0)), constant_values=255) for c in columns]
    return np.concatenate([np.concatenate(list(c), axis=0) for c in padded], axis=1)

"""What users upload, and the mask in its alpha channel."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from hipa_deploy.errors import HipaError
from hipa_deploy.images.read import read_image
from hipa_deploy.serve.image_files import mask_of_alpha, open_upload

# How pixels are stored that a viewer turns upright, by the EXIF orientation.
STORED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda upright: upright,
    2: np.fliplr,
    3: lambda upright: np.rot90(upright, 2),
    6: np.rot90,
    8: lambda upright: np.rot90(upright, -1),
}


def upload(pixels_HWC: np.ndarray, format: str, **options: object) -> Image.Image:
    """An image as a request brings it."""
    file = io.BytesIO()
    image = Image.fromarray(np.ascontiguousarray(pixels_HWC))
    image.save(file, format, **({"lossless": True, "exact": True} | options))
    return open_upload(file, "image", 10_000)


def half_hidden() -> np.ndarray:
    """A grey image whose hidden pixels are a corner: uint8 [H, W, 4]."""
    pixels_HWC = np.full((6, 9, 4), 200, np.uint8)
    pixels_HWC[..., 3] = 255
    pixels_HWC[:2, :4, 3] = 0
    return pixels_HWC


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
@pytest.mark.parametrize("orientation", STORED)
def test_a_mask_is_turned_as_its_image(orientation: int, format: str) -> None:
    upright_HWC = half_hidden()
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = upload(STORED[orientation](upright_HWC), format, exif=exif)
    mask_HW = mask_of_alpha(image, "image")
    np.testing.assert_array_equal(mask_HW, upright_HWC[..., 3] == 0)
    # Hidden pixels are shown white.
    np.testing.assert_array_equal(mask_HW, read_image(image)[..., 0] == 255)


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_broken_exif_turns_nothing(format: str) -> None:
    image = upload(half_hidden(), format, exif=b"Exif\x00\x00nonsense")
    np.testing.assert_array_equal(mask_of_alpha(image, "image"), half_hidden()[..., 3] == 0)


def test_an_image_without_alpha_is_no_mask() -> None:
    image = upload(half_hidden()[..., :3], "PNG")
    with pytest.raises(HipaError, match="the image has no alpha channel"):
        mask_of_alpha(image, "image")

"""Read images and masks as people have them: uint8 [H, W, 3], and a mask of 0 and 1."""

from __future__ import annotations

import struct
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from hipa_deploy.errors import HipaError, first_line
from hipa_deploy.images.compositing import check_mask, composite, hide_hole, latent_mask
from hipa_deploy.images.tiling import merge_tiles, tiles

__all__ = [
    "ImageSource",
    "check_mask",
    "check_size",
    "composite",
    "fit_image",
    "fit_mask",
    "hide_hole",
    "latent_mask",
    "merge_tiles",
    "read_image",
    "read_mask",
    "tiles",
]

ImageSource = str | Path | Image.Image | np.ndarray

_ARRAY_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
_SIXTEEN_BITS = 65535
_TO_EIGHT_BITS = 257  # 65535 / 255
# What Pillow raises for files that are no images, or broken ones, depends on the format.
_UNREADABLE = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    TypeError,
    IndexError,
    Image.DecompressionBombError,
)


def read_image(source: ImageSource) -> np.ndarray:
    """Any image as uint8 [H, W, 3].

    A file or a Pillow image is turned as its EXIF orientation says; of an animation it is the
    current (a file's first) frame. Transparency lies over white. Grey, palette, CMYK (without its
    colour profile) and 16-bit images are converted to 8-bit RGB. An array is [H, W] or [H, W, 1 to
    4] (grey, grey + alpha, RGB, RGBA): uint8, uint16, bool, or floats in [0, 1].

    Raises:
        HipaError: no such file, no image, a truncated or an enormous one, an array of another
        shape, dtype or range.

    """
    image = _eight_bits(_as_pillow(source, "image"), "image")
    if image.mode in ("La", "RGBa"):  # premultiplied
        image = image.convert(image.mode.upper())
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))


def read_mask(source: ImageSource) -> np.ndarray:
    """Any image as a mask, float32 [H, W] of 0 and 1: 1, white, is to be repainted.

    Its grey value decides, at one half; an alpha channel is ignored. An array of whole numbers that
    holds nothing above 1 is taken as 0 and 1, not as almost black.

    Raises:
        HipaError: as ``read_image``.

    """
    if (
        isinstance(source, np.ndarray)
        and source.dtype.kind in "iu"
        and source.size
        and source.min() >= 0
    ):
        source = source.astype(bool) if source.max() <= 1 else source
    image = _eight_bits(_as_pillow(source, "mask"), "mask")
    if image.mode in ("La", "RGBa"):
        image = image.convert(image.mode.upper())
    grey_HW = np.asarray(image.convert("RGB").convert("L"))
    return (grey_HW >= 128).astype(np.float32)


def fit_image(image_HWC: np.ndarray, height: int, width: int) -> np.ndarray:
    """The image at a bundle's size, uint8 [height, width, 3].

    Its centre is cropped to the aspect ratio, then scaled with a Lanczos filter.
    """
    return np.asarray(
        ImageOps.fit(Image.fromarray(image_HWC), (width, height), Image.Resampling.LANCZOS)
    )


def fit_mask(mask_HW: np.ndarray, height: int, width: int) -> np.ndarray:
    """The mask at a bundle's size, float32 [height, width].

    It is cropped as ``fit_image`` crops the image, and scaled to the nearest pixel.
    """
    mask = Image.fromarray(mask_HW.astype(np.uint8))
    return np.asarray(ImageOps.fit(mask, (width, height), Image.Resampling.NEAREST), np.float32)


def check_size(image_HWC: np.ndarray, factor: int) -> None:
    """Check that the image has at least one latent cell, ``factor`` x ``factor`` pixels.

    Raises:
        HipaError: it is smaller.

    """
    height, width = image_HWC.shape[:2]
    if min(height, width) < factor:
        raise HipaError(
            f"image is {height}x{width} pixels (height x width), "
            f"smaller than one latent cell of {factor}x{factor}. "
            f"Expected at least {factor} pixels each way."
        )


def _as_pillow(source: ImageSource, what: str) -> Image.Image:
    """Loaded and upright."""
    if isinstance(source, np.ndarray):
        return _from_array(source, what)
    if not isinstance(source, str | Path | Image.Image):
        raise HipaError(
            f"{what} is a {type(source).__name__}. "
            "Expected a path, a Pillow image or a numpy array."
        )
    try:
        if isinstance(source, Image.Image):
            return _upright(source)
        with warnings.catch_warnings():  # Pillow warns of half the size that it refuses
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(source) as image:
                return _upright(image)
    except _UNREADABLE as error:
        name = f"{what} {source}" if isinstance(source, str | Path) else f"the {what}"
        raise HipaError(
            f"{name} cannot be read ({first_line(error)}). Expected an image file, whole."
        ) from None


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    try:
        return ImageOps.exif_transpose(image)
    except (
        SyntaxError,
        ValueError,
        struct.error,
    ):  # EXIF that cannot be read turns nothing, as in any viewer
        return image


def _from_array(array: np.ndarray, what: str) -> Image.Image:
    channels = 1 if array.ndim == 2 else array.shape[2] if array.ndim == 3 else 0
    if channels not in _ARRAY_MODES or 0 in array.shape:
        raise HipaError(
            f"{what} is an array of shape {array.shape}. "
            "Expected [H, W] or [H, W, 1 to 4], channels last."
        )
    levels = _levels(array, what)
    return Image.fromarray(levels[..., 0] if levels.ndim == 3 and channels == 1 else levels)


def _eight_bits(image: Image.Image, what: str) -> Image.Image:
    """Grey of 16 bits, or of floats in [0, 1], as 8 bits; every other mode as it is.

    Old versions of Pillow read 16 bits as the mode 'I'.
    """
    if image.mode == "F":
        return Image.fromarray(_levels(np.asarray(image), what))
    if not image.mode.startswith("I"):
        return image
    values_HW = np.asarray(image).astype(np.int64)
    if values_HW.min() < 0 or values_HW.max() > _SIXTEEN_BITS:
        raise HipaError(
            f"{what} has values {values_HW.min()} to {values_HW.max()}. Expected 8 or 16 bits."
        )
    levels_HW = _levels(values_HW.astype(np.uint16), what)
    if (clear := image.info.get("transparency")) is not None:
        return Image.fromarray(
            np.stack([levels_HW, np.where(values_HW == clear, 0, 255).astype(np.uint8)], axis=-1)
        )
    return Image.fromarray(levels_HW)


def _levels(array: np.ndarray, what: str) -> np.ndarray:
    """The same values as uint8, rounded."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype == np.uint16:
        return np.rint(array / _TO_EIGHT_BITS).astype(np.uint8)
    if array.dtype.kind != "f":
        raise HipaError(
            f"{what} is an array of {array.dtype}. "
            "Expected uint8, uint16, bool, or floats in [0, 1]."
        )
    low, high = array.min(), array.max()
    if not (low >= 0 and high <= 1):  # NaN fails both
        raise HipaError(f"{what} has floats from {low:g} to {high:g}. Expected values in [0, 1].")
    return np.rint(array * 255).astype(np.uint8)

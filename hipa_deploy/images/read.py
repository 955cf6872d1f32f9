"""Read the images and masks of users: files, Pillow images and arrays, as uint8 RGB or a 0/1 mask.

Shapes: H, W height and width in pixels; C = 3 colour channels.
"""

from __future__ import annotations

import os
import struct
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from hipa_deploy.disk.quiet_pillow import MAX_PIXELS, bomb_in_words, quiet_pillow
from hipa_deploy.disk.reading import MIB, check_file
from hipa_deploy.errors import HipaError, HipaWarning, RequestError, as_line
from hipa_deploy.images.colour import ColourSpace, colour_space, srgb_levels, to_srgb
from hipa_deploy.images.key_colour import decode

ImageSource = str | os.PathLike[str] | Image.Image | np.ndarray

_ARRAY_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
_EIGHT_BITS = 255
_SIXTEEN_BITS = 65535
_TO_EIGHT_BITS = 257  # 65535 / 255
MAX_FILE = 512 * MIB
_STRIP_PIXELS = 1 << 22
_ROUNDING = 1e-6  # of a pixel: by so much an edge between two may miss them
MAX_SIDE = 1 << 20  # Pillow's lists of rows, and single rows, would take gigabytes beyond it
# Formats of Pillow that start another program, are no pixels, or read other files.
_NOT_READ = ("EPS", "WMF", "MPEG", "BUFR", "GRIB", "HDF5", "FPX", "MIC", "PCD")
_ORIENTATION = 0x0112  # of EXIF
# Pillow decodes an image when it is used first. Two threads that do it at once spoil its pixels,
# and one of them may miss its orientation. An image has one of these locks, by its address.
_LOCKS = tuple(threading.Lock() for _ in range(64))
# What Pillow raises for EXIF data that it cannot parse.
_BROKEN_EXIF = (SyntaxError, ValueError, struct.error)


def read_image(source: ImageSource) -> np.ndarray:
    """Read any image as 8-bit RGB.

    - A file or a Pillow image is turned upright as its EXIF orientation says.
    - Of an animation the current frame is read; for a file that is the first one.
    - Transparent pixels are shown over white. Of a PNG whose Pillow image was decoded or copied
      before, a transparent level of grey of 2 or 4 bits is lost, and a transparent colour of 16
      bits without a level above 255 is taken as one of 8: Pillow no longer tells the depth.
    - Colours become sRGB, as the file's ICC profile says, or the colour chunks of a PNG, or EXIF's
      Adobe RGB (``hipa_deploy/images/colour.py``). Without any of these the numbers are taken as
      sRGB, those of CMYK as Pillow converts them.
    - Grey, palette, CMYK, Lab and 16-bit images are converted.

    Args:
        source: a path, a Pillow image, or an array [H, W] or [H, W, 1 to 4] (grey, grey + alpha,
            RGB, RGBA) of uint8, uint16, bool, or floats in [0, 1].

    Returns:
        uint8 [H, W, 3].

    Raises:
        HipaError: the file does not exist, is not an image, is truncated or is enormous; the array
            has another shape, dtype or range; or 32-bit integers are not levels of 16 bits.

    Warns:
        HipaWarning: the colour profile is damaged, or is not one for such an image.

    Example:
        >>> read_image(np.zeros((480, 640), np.uint8)).shape
        (480, 640, 3)

    """
    name = f"image {os.fspath(source)}" if isinstance(source, str | os.PathLike) else "the image"
    upright, space = _as_pillow(source, "image", name)
    levels_16 = None
    if space is not None and _is_deep_grey(upright):
        levels_16 = srgb_levels(space, name)
    pixels_HWC = np.empty((upright.height, upright.width, 3), np.uint8)
    for rows, strip in _strips(upright):
        image = _eight_bits(strip, "image", levels_16)
        if space is not None and not _is_deep_grey(strip):
            image = to_srgb(image, space, name)
        pixels_HWC[rows] = np.asarray(_over(_plain_alpha(image), "white"))
    return pixels_HWC


def read_control(source: ImageSource) -> np.ndarray:
    """Read any image as a control image, 8-bit RGB: its numbers are data, as those of a mask.

    What the file says about colours is ignored. Transparent pixels are shown over black, which is
    where nothing is for edges, depth and poses alike.

    Args:
        source: as for ``read_image``.

    Returns:
        uint8 [H, W, 3].

    Raises:
        HipaError: as for ``read_image``.

    Warns:
        HipaWarning: some pixels are transparent.

    Example:
        >>> read_control(np.zeros((480, 640), np.uint8)).shape
        (480, 640, 3)

    """
    upright, _ = _as_pillow(source, "image", None)
    pixels_HWC = np.empty((upright.height, upright.width, 3), np.uint8)
    least_alpha = 255
    for rows, strip in _strips(upright):
        image = _plain_alpha(_eight_bits(strip, "image"))
        least_alpha = min(least_alpha, _least_alpha(image))
        pixels_HWC[rows] = np.asarray(_over(image, "black"))
    if least_alpha < 255:
        name = (
            f"image {os.fspath(source)}" if isinstance(source, str | os.PathLike) else "the image"
        )
        warnings.warn(
            f"{name} has transparent pixels, which count as black for a ControlNet.",
            HipaWarning,
            stacklevel=2,
        )
    return pixels_HWC


def _plain_alpha(image: Image.Image) -> Image.Image:
    """An 8-bit image with transparency of any kind as RGBA; another one as it is."""
    if image.mode in ("La", "RGBa"):  # premultiplied alpha: "RGBA" is the plain one
        image = image.convert(image.mode.upper())
    # A key colour (GIF, PNG) and a palette with alpha are transparency too; convert("RGBA") turns
    # them into alpha.
    return image.convert("RGBA") if image.has_transparency_data else image


def _least_alpha(image: Image.Image) -> int:
    """The least opaque pixel of what ``_plain_alpha`` gives; 255 without transparency."""
    return int(np.asarray(image.getchannel("A")).min()) if image.mode == "RGBA" else 255


def _over(image: Image.Image, ground: str) -> Image.Image:
    """What ``_plain_alpha`` gives as RGB, its transparent pixels over a colour."""
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, ground), image)
    return image.convert("RGB")


def read_mask(source: ImageSource) -> np.ndarray:
    """Read any image as a mask: white is repainted, black is kept.

    The grey value decides: 128 and above is white. An alpha channel is ignored, with a warning
    where it hides pixels, and so is what the file says about colours: a mask is data.

    Args:
        source: as for ``read_image``. An array of any integers or floats that holds nothing but 0
            and 1, or nothing but 0 and 255, is taken as a mask of black and white.

    Returns:
        float32 [H, W] of 0 and 1; 1 is repainted.

    Raises:
        HipaError: as for ``read_image``.

    Warns:
        HipaWarning: some pixels are transparent: to other programs that may be the mask.

    Example:
        >>> read_mask(np.array([[0, 200]], np.uint8)).tolist()
        [[0.0, 1.0]]

    """
    if isinstance(source, np.ndarray) and _is_black_and_white(source):
        source = source.astype(bool)
    upright, _ = _as_pillow(source, "mask", None)
    mask_HW = np.empty((upright.height, upright.width), np.float32)
    least_alpha = 255
    for rows, strip in _strips(upright):
        image = _eight_bits(strip, "mask")
        image = _plain_alpha(image)
        least_alpha = min(least_alpha, _least_alpha(image))
        # Through RGB, because Pillow converts not every mode to "L" directly.
        mask_HW[rows] = np.asarray(image.convert("RGB").convert("L")) >= 128
    if least_alpha < 128:
        name = f"mask {os.fspath(source)}" if isinstance(source, str | os.PathLike) else "the mask"
        warnings.warn(
            f"{name} has transparent pixels, which count for nothing: what is white is repainted, "
            "and what is black is kept.",
            HipaWarning,
            stacklevel=2,
        )
    return mask_HW


def alpha_of(image: Image.Image) -> np.ndarray:
    """How opaque the pixels of a decoded image are, by its alpha channel or transparent colour.

    Args:
        image: as ``key_colour.decode`` leaves it.

    Returns:
        uint8 [H, W]; 255 is opaque.

    """
    return np.asarray(_eight_bits(image, "image").convert("RGBA").getchannel("A"))


def _strips(image: Image.Image) -> Iterator[tuple[slice, Image.Image]]:
    """Cut an image into strips of whole rows: which rows, and these.

    A small file can hold 134 megapixels. Each step of a conversion would copy all of them, colours
    as floats.
    """
    count = max(1, _STRIP_PIXELS // image.width)
    if count >= image.height:
        yield slice(0, image.height), image
        return
    for top in range(0, image.height, count):
        bottom = min(top + count, image.height)
        yield slice(top, bottom), image.crop((0, top, image.width, bottom))


def _is_black_and_white(array: np.ndarray) -> bool:
    """Whether numbers are none but 0 and 1, or none but 0 and 255; of no numbers it is False."""
    if array.dtype.kind not in "iuf" or array.size == 0:
        return False
    black = array == 0
    return bool((black | (array == 1)).all() or (black | (array == _EIGHT_BITS)).all())


def fit_image(image_HWC: np.ndarray, height: int, width: int) -> np.ndarray:
    """Crop an image to an aspect ratio about its centre, then scale it (Lanczos).

    Returns:
        uint8 [height, width, 3].

    """
    image = Image.fromarray(image_HWC)
    return np.asarray(ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS))


def fit_mask(mask_HW: np.ndarray, height: int, width: int) -> np.ndarray:
    """Crop and scale a mask as ``fit_image`` does the image; a pixel is white if any part of it is.

    The nearest pixel would not do: of a thin line in a large mask it takes some points, and none
    of a small spot.

    Returns:
        float32 [height, width] of 0 and 1.

    """
    full_h, full_w = mask_HW.shape
    # What ``ImageOps.fit`` leaves of the image.
    crop_h = min(full_h, full_w * height / width)
    crop_w = min(full_w, full_h * width / height)
    rows_hW = _joined_rows(mask_HW > 0, crop_h, height)
    return _joined_rows(rows_hW.T, crop_w, width).T.astype(np.float32)


def _joined_rows(mask_HW: np.ndarray, crop: float, count: int) -> np.ndarray:
    """Make ``count`` rows of the ``crop`` rows in the middle: each is the union of what it covers.

    Returns:
        bool [count, W].

    """
    edges = (len(mask_HW) - crop) / 2 + np.arange(count + 1) * crop / count
    firsts = np.floor(edges[:-1] + _ROUNDING).astype(int)
    lasts = np.ceil(edges[1:] - _ROUNDING).astype(int)
    rows = []
    for first, last in zip(firsts, lasts, strict=True):
        rows.append(mask_HW[first:last].any(axis=0))
    return np.stack(rows)


def check_size(image_HWC: np.ndarray, factor: int) -> None:
    """Check that an image is at least one latent cell large.

    Args:
        image_HWC: uint8 [H, W, 3].
        factor: side of a latent cell in pixels.

    Raises:
        HipaError: height or width is below ``factor``.

    """
    height, width = image_HWC.shape[:2]
    if min(height, width) < factor:
        raise RequestError(
            f"image is {height}x{width} pixels (height x width), smaller than one latent cell of "
            f"{factor}x{factor}. Expected at least {factor} pixels each way.",
            argument="image",
            code="image_too_small",
            told=f"image is {height}x{width} pixels (height x width). "
            f"Expected at least {factor} pixels each way.",
        )


def turned_upright(image: Image.Image) -> Image.Image:
    """Turn an image as its EXIF orientation says; one whose EXIF data is broken stays as it is.

    Args:
        image: decoded: a PNG can have its EXIF data behind its pixels.

    Returns:
        ``image`` itself where there is nothing to turn.

    """
    try:
        # Pillow copies an image that is upright, too.
        if image.getexif().get(_ORIENTATION, 1) == 1:
            return image
        return ImageOps.exif_transpose(image)
    except _BROKEN_EXIF:
        # As every viewer does, show the image as it is stored.
        return image


def _as_pillow(
    source: ImageSource, what: str, colours_of: str | None
) -> tuple[Image.Image, ColourSpace | None]:
    """Load an image upright.

    Args:
        source: as for ``read_image``.
        what: 'image' or 'mask', for messages.
        colours_of: the image's name, for warnings about its colour space; None reads no space.

    Returns:
        The image, and what its numbers mean; None for sRGB.

    """
    if isinstance(source, np.ndarray):
        return _from_array(source, what), None
    if not isinstance(source, str | os.PathLike | Image.Image):
        raise HipaError(
            f"{what} is a {type(source).__name__}. "
            "Expected a path, a Pillow image or a numpy array."
        )

    name = f"{what} {os.fspath(source)}" if isinstance(source, str | os.PathLike) else f"the {what}"
    # What Pillow raises for files that are not images, or are broken, depends on the format.
    unreadable = partial(RequestError, argument=what, code="image_parse_error")
    with as_line(f"{name} cannot be read", "Expected a complete image file.", unreadable):
        if isinstance(source, Image.Image):
            with _lock_of(source):
                _check_pixels(source, what)
                return _upright(source, what, colours_of)
        check_file(Path(source), MAX_FILE, "Expected an image file.")
        try:
            with quiet_pillow(), Image.open(source, formats=_formats()) as image:
                _check_pixels(image, what)
                return _upright(image, what, colours_of)
        except Image.DecompressionBombError as error:
            raise HipaError(bomb_in_words(error)) from None


def _lock_of(image: Image.Image) -> threading.Lock:
    """The lock of a caller's image, which other threads may be given too."""
    return _LOCKS[id(image) // 64 % len(_LOCKS)]


def _formats() -> list[str]:
    """The formats that are read."""
    Image.init()
    return [name for name in Image.ID if name not in _NOT_READ]


def _check_pixels(image: Image.Image, what: str) -> None:
    """Raise HipaError for an image that would take gigabytes, before it is decoded."""
    if max(image.size) > MAX_SIDE:
        raise RequestError(
            f"the {what} has {image.width}x{image.height} pixels. Expected at most {MAX_SIDE} "
            "pixels a side. Cut it.",
            argument=what,
            code="image_too_large",
        )
    if not 0 < image.width * image.height <= MAX_PIXELS:
        raise RequestError(
            f"the {what} has {image.width}x{image.height} pixels. Expected 1 to {MAX_PIXELS} "
            "pixels in all. Make it smaller.",
            argument=what,
            code="image_too_large",
        )


def _upright(
    image: Image.Image, what: str, colours_of: str | None
) -> tuple[Image.Image, ColourSpace | None]:
    """Decode an image and turn it as its EXIF orientation says; find out its colour space."""
    with _quiet(image), _not_mapped(image):
        decode(image)
    # Before it is turned: Pillow then writes its EXIF data anew.
    space = colour_space(image, colours_of) if colours_of is not None else None
    _check_integers(image, what)
    return turned_upright(image), space


def _check_integers(image: Image.Image, what: str) -> None:
    """Raise HipaError for levels of 8 bits in deeper integers: as 16 bits they are black.

    Whether Pillow reads a 16-bit file as "I;16" or as "I" depends on its release.
    """
    if not _is_deep_grey(image):
        return
    # Pillow's getextrema refuses the mode of a big-endian file, "I;16B".
    lows = []
    highs = []
    for _, strip in _strips(image):
        values_HW = np.asarray(strip)
        lows.append(int(values_HW.min()))
        highs.append(int(values_HW.max()))
    low = min(lows)
    high = max(highs)
    if 0 < high <= _EIGHT_BITS:
        bits = 32 if image.mode == "I" else 16
        raise RequestError(
            f"the {what} has {bits}-bit integers from {low} to {high}. Expected levels of 16 bits, "
            f"up to {_SIXTEEN_BITS}. Convert levels of 8 bits to Pillow's mode L.",
            argument=what,
            code="invalid_image_format",
            told=f"the {what} has {bits}-bit integers from {low} to {high}. Expected levels of 8 "
            "or 16 bits.",
        )


@contextmanager
def _quiet(image: Image.Image) -> Iterator[None]:
    """Keep libtiff's own words about a damaged file off the standard error.

    Pillow raises what is wrong as well. Other threads keep their standard error, so it is only
    done in the main thread, which is that of a command.
    """
    in_command = threading.current_thread() is threading.main_thread()
    if image.format != "TIFF" or not in_command:
        yield
        return
    try:
        stderr = os.dup(2)
    except OSError:  # this process has none
        yield
        return
    try:
        with Path(os.devnull).open("wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


@contextmanager
def _not_mapped(image: Image.Image) -> Iterator[None]:
    """Keep Pillow from mapping the file into memory, which it does where it has the file's name.

    Pillow 13 scrambles a TIFF that is turned by 90 degrees then.
    """
    name = getattr(image, "filename", "")
    if not name:
        yield
        return
    image.filename = ""  # type: ignore[attr-defined]
    try:
        yield
    finally:
        image.filename = name  # type: ignore[attr-defined]


def _from_array(array: np.ndarray, what: str) -> Image.Image:
    """Convert an array of a user to an 8-bit Pillow image, after a check of shape and values."""
    channels = 0
    if array.ndim == 2:
        channels = 1
    elif array.ndim == 3:
        channels = array.shape[2]
    if channels not in _ARRAY_MODES or 0 in array.shape:
        raise HipaError(
            f"{what} is an array of shape {array.shape}. "
            "Expected [H, W] or [H, W, 1 to 4], channels last."
        )

    if array.dtype.newbyteorder("=") == np.uint16 and 0 < array.max() <= _EIGHT_BITS:
        raise HipaError(
            f"{what} is an array of uint16 with values from {array.min()} to {array.max()}. "
            f"Expected levels of 16 bits, up to {_SIXTEEN_BITS}. "
            "Convert levels of 8 bits to uint8."
        )
    levels = _levels(array, what)
    if levels.ndim == 3 and channels == 1:
        levels = levels[..., 0]  # Pillow knows grey as [H, W] only
    return Image.fromarray(levels)


def _is_deep_grey(image: Image.Image) -> bool:
    """Whether an image is 16-bit grey.

    "I;16" and its kin, and "I": some releases of Pillow read 16-bit files as 32-bit integers.
    """
    return image.mode.startswith("I")


def _eight_bits(image: Image.Image, what: str, levels_16: np.ndarray | None = None) -> Image.Image:
    """Convert 16-bit or float grey to 8 bits; return other images as they are.

    Args:
        image: of any mode.
        what: 'image' or 'mask', for messages.
        levels_16: the 8-bit level of each 16-bit level, uint8 [65536]; None scales them.

    """
    if image.mode == "F":
        return Image.fromarray(_levels(np.asarray(image), what))
    if not _is_deep_grey(image):
        return image

    values_HW = np.asarray(image).astype(np.int64)
    low, high = values_HW.min(), values_HW.max()
    if low < 0 or high > _SIXTEEN_BITS:
        raise RequestError(
            f"{what} has values {low} to {high}. Expected 8 or 16 bits.",
            argument=what,
            code="invalid_image_format",
        )
    if levels_16 is None:
        levels_HW = _levels(values_HW.astype(np.uint16), what)
    else:
        levels_HW = levels_16[values_HW]

    # The transparent value is one of the 16-bit levels: after rounding it would match its
    # neighbours too, so it becomes an alpha channel here.
    transparent = image.info.get("transparency")
    if transparent is None:
        return Image.fromarray(levels_HW)
    alpha_HW = np.where(values_HW == transparent, 0, 255).astype(np.uint8)
    return Image.fromarray(np.stack([levels_HW, alpha_HW], axis=-1))


def _levels(array: np.ndarray, what: str) -> np.ndarray:
    """Convert uint8, uint16, bool or floats in [0, 1] to uint8, rounded."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype.newbyteorder("=") == np.uint16:
        return np.rint(array / _TO_EIGHT_BITS).astype(np.uint8)
    if array.dtype.kind != "f":
        raise HipaError(
            f"{what} is an array of {array.dtype}. "
            "Expected uint8, uint16, bool, or floats in [0, 1]."
        )
    low, high = array.min(), array.max()
    # Written so that NaN, for which every comparison is false, is refused as well.
    if not (low >= 0 and high <= 1):
        raise HipaError(f"{what} has floats from {low:g} to {high:g}. Expected values in [0, 1].")
    return np.rint(array * 255).astype(np.uint8)

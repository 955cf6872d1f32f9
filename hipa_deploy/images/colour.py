"""Colours of an image file as sRGB: its ICC profile, the colour chunks of a PNG, EXIF's Adobe RGB.

Everything after reading takes the numbers of an image as sRGB. A file may say that they mean other
colours: photos of phones are in Display P3, those of cameras often in Adobe RGB. What counts, in
this order, as the PNG specification has it (https://www.w3.org/TR/png-3/#13Colour-space-handling):
an ICC profile; a PNG's sRGB chunk; its gAMA and cHRM chunks; EXIF's interoperability index R03.
Pillow does not show a PNG's cICP chunk, so it is not heeded.

Profiles are applied with LittleCMS: relative colorimetric with black point compensation, which is
what browsers and photo editors do by default. It keeps every colour that sRGB has as it is.
For profiles of a matrix, such as Display P3, all intents are the same.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from hipa_deploy.errors import HipaWarning, first_line

# Flags of lcms2.h, for which older releases of ImageCms have no names, and the ICC's number of the
# intent. A profile that is no matrix is sampled on a grid: high resolution makes it a fine one. The
# few levels of grey are computed exactly: a grid would be too coarse for dark ones.
_BLACK_POINT_COMPENSATION = 0x2000
_HIGH_RESOLUTION = 0x0400
_EXACT = 0x0100
_RELATIVE_COLORIMETRIC = 1
# The mode in which LittleCMS takes pixels, by the colour space of the profile.
_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}

# CIE 1931 xy of the white point, red, green and blue, as a PNG's cHRM chunk has them.
Chromaticities = tuple[float, ...]
_SRGB_PRIMARIES: Chromaticities = (0.3127, 0.3290, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06)
# https://www.adobe.com/digitalimag/pdfs/AdobeRGB1998.pdf
_ADOBE_PRIMARIES: Chromaticities = (0.3127, 0.3290, 0.64, 0.33, 0.21, 0.71, 0.15, 0.06)
_ADOBE_EXPONENT = 563 / 256
# A cone response matrix, by which colours are adapted from one white to another (Bradford, of the
# ICC specification's annex E).
_BRADFORD = np.array(
    [[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]]
)

_EXIF_COLOR_SPACE = 0xA001
_EXIF_IFD = 0x8769
_INTEROPERABILITY_IFD = 0xA005
_UNCALIBRATED = 0xFFFF


@dataclass(frozen=True)
class ColourSpace:
    """What the numbers of an image mean.

    Attributes:
        profile: an ICC profile; None if the space is described by the other two.
        exponent: light is a channel's value, in [0, 1], to this power; None for sRGB's curve.
        chromaticities: the primaries.

    """

    profile: bytes | None = None
    exponent: float | None = None
    chromaticities: Chromaticities = _SRGB_PRIMARIES


def colour_space(image: Image.Image, name: str) -> ColourSpace | None:
    """Find out what a loaded image says about its colours.

    Args:
        image: as Pillow read it: not yet turned, whose EXIF data is whole.
        name: of the image, for warnings.

    Returns:
        The colour space; None if the image is in sRGB or says nothing.

    Warns:
        HipaWarning: what it says cannot be read.

    """
    if image.mode == "LAB":  # a profile beside it is that of a printer or a screen
        return ColourSpace(profile=_lab_profile())
    if "icc_profile" in image.info:
        profile = image.info["icc_profile"]
        if profile:
            return ColourSpace(profile=bytes(profile))
        # Pillow gives None for one that it cannot decompress. An empty one is as good as none.
        if profile is None:
            _warn(name, "its colour profile is damaged")
        return None
    if "srgb" in image.info:
        return None
    if "gamma" in image.info or "chromaticity" in image.info:
        return _space_of_png(image.info, name)
    if _is_adobe_rgb(image):
        return ColourSpace(exponent=_ADOBE_EXPONENT, chromaticities=_ADOBE_PRIMARIES)
    return None


def to_srgb(image: Image.Image, space: ColourSpace, name: str) -> Image.Image:
    """Convert an 8-bit image to sRGB; transparency is kept.

    Where the conversion would change no colour by more than a rounding, the image is returned as it
    is: an image in sRGB stays bit for bit, whichever sRGB profile it has.

    Args:
        image: of any mode but those of 16 bits and floats.
        space: what its numbers mean.
        name: of the image, for warnings.

    Returns:
        An image of mode RGB or RGBA, or ``image``.

    Warns:
        HipaWarning: the profile is damaged or is one for other images, such as a CMYK profile in an
            RGB image. Then the numbers are taken as sRGB.

    """
    if image.mode in ("La", "RGBa"):  # premultiplied alpha
        image = image.convert(image.mode.upper())
    alpha = None
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        alpha = image.convert("RGBA").getchannel("A")

    try:
        converted = _convert(_without_alpha(image), space)
    except _UnfitError as error:
        _warn(name, str(error))
        return image
    if converted is None:
        return image
    if alpha is not None:
        converted.putalpha(alpha)
    return converted


def srgb_levels(space: ColourSpace, name: str) -> np.ndarray | None:
    """The 8-bit sRGB level of each 16-bit grey level.

    Grey of 16 bits is converted before it is rounded: a profile may spread dark levels.

    Args:
        space: what the levels mean.
        name: of the image, for warnings.

    Returns:
        uint8 [65536]; None where the levels are rounded as they are, since they are sRGB's or the
        profile is not one for grey.

    Warns:
        HipaWarning: as ``to_srgb``.

    """
    if space.profile is None:
        if _is_srgb_curve(space.exponent):
            return None
        light = _light(np.arange(65536) / 65535, space.exponent)
        return np.rint(255 * _srgb_curve(light)).astype(np.uint8)

    try:
        transform, mode = _transform(space.profile, "I;16")
    except _UnfitError as error:
        _warn(name, str(error))
        return None
    if mode == "I;16":
        levels = _levels_of_grey(space.profile)
    else:
        # LittleCMS takes 8-bit RGB from Pillow: what lies between 256 greys is interpolated.
        ramp = Image.fromarray(np.arange(256, dtype=np.uint8)[None]).convert("RGB")
        greys = np.asarray(transform.apply(ramp))[0, :, 1]
        interpolated = np.interp(np.arange(65536) / 257, np.arange(256), greys)
        levels = np.rint(interpolated).astype(np.uint8)
    return None if _are_unchanged(levels) else levels


def _levels_of_grey(profile: bytes) -> np.ndarray:
    """The 8-bit sRGB level of each 16-bit level, uint8 [65536], by a profile for grey."""
    transform, _ = _transform(profile, "I;16", _EXACT)
    ramp = Image.fromarray(np.arange(65536, dtype=np.uint16)[None])
    return np.asarray(transform.apply(ramp))[0, :, 1]


def _are_unchanged(levels: np.ndarray) -> bool:
    """Whether the levels of 16-bit grey are but for roundings those that it had."""
    return bool(np.abs(levels - np.arange(65536) / 257).max() <= 1.5)


class _UnfitError(Exception):
    """A profile that cannot be applied to an image; the message says why."""


def _warn(name: str, problem: str) -> None:
    warnings.warn(f"{name}: {problem}. Its colours are taken as sRGB.", HipaWarning, stacklevel=4)


def _space_of_png(info: dict[Any, Any], name: str) -> ColourSpace | None:
    """The colour space of the chunks gAMA and cHRM."""
    gamma = info.get("gamma")
    chromaticities = info.get("chromaticity")
    exponent = None
    if gamma is not None:
        if gamma <= 0:
            _warn(name, "its gAMA chunk is 0")
            return None
        exponent = 1 / gamma
    if chromaticities is None:
        chromaticities = _SRGB_PRIMARIES
    try:
        _to_xyz(chromaticities)
    except (ValueError, ZeroDivisionError, np.linalg.LinAlgError):
        _warn(name, "its cHRM chunk holds no colours")
        return None
    return ColourSpace(exponent=exponent, chromaticities=tuple(chromaticities))


def _is_adobe_rgb(image: Image.Image) -> bool:
    """Whether EXIF says Adobe RGB, as the DCF standard of cameras has it: uncalibrated, and R03."""
    try:
        exif = image.getexif()
        color_space = exif.get_ifd(_EXIF_IFD).get(_EXIF_COLOR_SPACE)
        index = exif.get_ifd(_INTEROPERABILITY_IFD).get(1)
    except Exception:  # broken EXIF data meets errors of every kind, and is ignored
        return False
    if isinstance(index, bytes):
        index = index.decode("ascii", "replace")
    return color_space == _UNCALIBRATED and str(index).startswith("R03")


def _lab_profile() -> bytes:
    from PIL import ImageCms

    return ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()


def _without_alpha(image: Image.Image) -> Image.Image:
    """The image in mode L, RGB, CMYK or LAB, without transparency."""
    if image.mode in ("L", "LA", "1"):
        plain = image.convert("L")
    elif image.mode in ("CMYK", "LAB"):
        return image
    else:
        if image.has_transparency_data:  # of a palette with alpha Pillow warns on the direct way
            image = image.convert("RGBA")
        plain = image.convert("RGB")
    plain.info.pop("transparency", None)
    return plain


def _convert(image: Image.Image, space: ColourSpace) -> Image.Image | None:
    """Convert an image of mode L, RGB, CMYK or LAB; None if that would change nothing."""
    if space.profile is None:
        rgb_HWC = np.asarray(image.convert("RGB"))
        if _is_srgb_curve(space.exponent) and _are_srgb_primaries(space.chromaticities):
            return None
        return Image.fromarray(_from_primaries(rgb_HWC, space))

    transform, mode = _transform(space.profile, image.mode)
    if mode == "L":
        levels = _levels_of_grey(space.profile)
        if _are_unchanged(levels):
            return None
        grey_HW = levels[np.asarray(image).astype(np.int64) * 257]
        return Image.fromarray(grey_HW).convert("RGB")
    if mode == "RGB" and _is_identity(transform):
        return None
    return transform.apply(image.convert(mode))


def _transform(
    profile: bytes, image_mode: str, precision: int = _HIGH_RESOLUTION
) -> tuple[Any, str]:
    """LittleCMS's transform from a profile to sRGB, and the mode of the pixels that it takes.

    Raises:
        _UnfitError: the profile is damaged, or is not one for images of this mode.

    """
    from PIL import ImageCms

    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space.strip()
        mode = _MODES.get(space)
        is_grey = image_mode in ("L", "I;16")
        if mode == "L" and is_grey:
            mode = image_mode
        # Grey can be shown in RGB as well; nothing else can be seen as something else.
        if mode is None or not (mode == image_mode or (mode == "RGB" and is_grey)):
            raise _UnfitError(f"its colour profile is for {space} images, not for {image_mode}")
        transform = ImageCms.buildTransform(
            source,
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            renderingIntent=ImageCms.Intent(_RELATIVE_COLORIMETRIC),
            flags=ImageCms.Flags(_BLACK_POINT_COMPENSATION | precision),
        )
    except (OSError, ValueError, TypeError, ImportError, ImageCms.PyCMSError) as error:
        # ImportError: a Pillow that was built without LittleCMS
        raise _UnfitError(f"its colour profile cannot be used ({first_line(error)})") from None
    return transform, mode


def _is_identity(transform: Any) -> bool:
    """Whether a transform changes no colour by more than a rounding, 1 of 255."""
    steps = np.linspace(0, 255, 9).astype(np.uint8)
    colours = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(1, -1, 3)
    greys = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=-1)
    samples = np.concatenate([colours, greys], axis=1)
    shown = np.asarray(transform.apply(Image.fromarray(samples)))
    return int(np.abs(shown.astype(int) - samples).max()) <= 1


def _is_srgb_curve(exponent: float | None) -> bool:
    """Whether the curve is sRGB's.

    With sRGB's primaries or none, a gamma of 1 / 2.2 stands for it: PNG's specification recommends
    this value beside an sRGB chunk, for readers that do not know that chunk. libpng takes values
    within 5% as equal.
    """
    return exponent is None or abs(exponent / 2.2 - 1) < 0.05


def _are_srgb_primaries(chromaticities: Chromaticities) -> bool:
    """Whether primaries are sRGB's, to the rounding with which programs write them."""
    return bool(np.allclose(chromaticities, _SRGB_PRIMARIES, atol=0.002))


def _to_xyz(chromaticities: Chromaticities) -> np.ndarray:
    """The matrix from linear RGB to XYZ, [3, 3], for white at Y = 1.

    Raises:
        ValueError, numpy.linalg.LinAlgError: the chromaticities are no colour space.

    """
    xy = np.asarray(chromaticities, np.float64).reshape(4, 2)
    if not np.isfinite(xy).all() or (xy[:, 1] <= 0).any():
        raise ValueError("y must be positive")
    xyz = np.stack([xy[:, 0] / xy[:, 1], np.ones(4), (1 - xy.sum(1)) / xy[:, 1]], axis=1)
    white = xyz[0]
    primaries = xyz[1:].T
    matrix = primaries * np.linalg.solve(primaries, white)
    if abs(np.linalg.det(matrix)) < 1e-6:
        raise ValueError("the primaries lie on a line")
    return matrix


def _from_primaries(rgb_HWC: np.ndarray, space: ColourSpace) -> np.ndarray:
    """Convert uint8 [H, W, 3] from a space of three primaries to sRGB."""
    source = _to_xyz(space.chromaticities)
    target = _to_xyz(_SRGB_PRIMARIES)

    # White stays white: the cone responses are scaled from one white to the other.
    cones = (_BRADFORD @ target.sum(1)) / (_BRADFORD @ source.sum(1))
    adapted = np.linalg.inv(_BRADFORD) @ (cones[:, None] * (_BRADFORD @ source))
    matrix = (np.linalg.inv(target) @ adapted).astype(np.float32)

    light = _light(np.arange(256) / 255, space.exponent).astype(np.float32)
    linear_HWC = light[rgb_HWC] @ matrix.T
    return np.rint(255 * _srgb_curve(linear_HWC)).astype(np.uint8)


def _light(value: np.ndarray, exponent: float | None) -> np.ndarray:
    """Light of channel values in [0, 1]; ``exponent`` None is sRGB's curve (IEC 61966-2-1)."""
    if exponent is not None:
        return value**exponent
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def _srgb_curve(light: np.ndarray) -> np.ndarray:
    """Channel values of light, both in [0, 1]; light outside is cut off."""
    light = np.clip(light, 0, 1)
    return np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)

"""Images as bytes of PNG, WebP or JPEG, with parameters and provenance inside.

What is written where:

=================== ============================= =========================================
                    PNG                           WebP, JPEG
=================== ============================= =========================================
all parameters      iTXt chunk 'hipa', JSON       ``hipa:parameters`` in the XMP packet
A1111's text        text chunk 'parameters'       EXIF UserComment (UTF-16, as piexif writes it)
IPTC's source type  iTXt 'XML:com.adobe.xmp'      the XMP packet
hash of the pixels  the same                      the same
=================== ============================= =========================================

Shapes: H, W height and width in pixels; C = 3 colour channels.
"""

from __future__ import annotations

import hashlib
import io
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, PngImagePlugin, features

from hipa_deploy.errors import HipaError, RequestError, brief, first_line, whole_number
from hipa_deploy.marks.a1111 import KEYWORD, infotext
from hipa_deploy.marks.xmp import JPEG_HEADER, PNG_KEYWORD, write_packet

ImageFormat = Literal["png", "webp", "jpeg"]
FORMATS: dict[str, ImageFormat] = {
    ".png": "png",
    ".webp": "webp",
    ".jpg": "jpeg",
    ".jpeg": "jpeg",
}
"""The format of each suffix, in lower case."""
SUFFIX: dict[ImageFormat, str] = {"png": ".png", "webp": ".webp", "jpeg": ".jpg"}
# The keyword of the text chunk of a PNG; it is part of the file format.
PARAMETERS_KEY = "hipa"
JPEG_QUALITY = 95  # by default
# One step is fast, and a file must not take longer than its image. Against zlib's level 6 this
# takes half to three quarters of the time, and up to 5 % more bytes. ComfyUI writes with it too.
PNG_LEVEL = 4
# Lossless WebP likewise: a fifth of the default's time, and 6 % more bytes of a photograph (a third
# more of a flat drawing). Its 'quality' is an effort. benchmarks/image_files.py measures both.
WEBP_LOSSLESS = {"lossless": True, "exact": True, "method": 1, "quality": 20}
EXIF_IFD = 0x8769
USER_COMMENT = 0x9286
UNICODE = b"UNICODE\0"
_EXIF_VERSION = 0x9000
_LONG = 4  # types of a TIFF directory's entries
_UNDEFINED = 7
_MAX_SEGMENT = 65533  # bytes of a JPEG segment, without its marker and length
_MAX_SIDE = {"png": 2**31 - 1, "webp": 16383, "jpeg": 65500}  # pixels


def image_format(path: Path) -> ImageFormat:
    """The format that a file's suffix stands for.

    Raises:
        HipaError: the suffix is none of ``FORMATS``.

    Example:
        >>> image_format(Path("apple.JPG"))
        'jpeg'

    """
    try:
        return FORMATS[path.suffix.lower()]
    except KeyError:
        raise HipaError(
            f"{path}: images are written as PNG, WebP or JPEG. "
            "Give a name that ends in .png, .webp, .jpg or .jpeg."
        ) from None


def check_quality(format: ImageFormat, quality: int | None) -> None:
    """Check a quality.

    Raises:
        HipaError: it is out of range, or is for a PNG; or this Pillow writes no WebP.

    """
    if quality is not None and not 1 <= quality <= 100:
        raise HipaError(f"quality is {quality}. Expected 1 (worst) to 100 (best).")
    if quality is not None and format == "png":
        raise HipaError(
            "a PNG is lossless and has no quality. Leave the quality out, or write WebP or JPEG."
        )
    if format == "webp" and not features.check("webp"):
        raise RequestError(
            "this Pillow was built without WebP. Write PNG or JPEG.",
            argument="format",
            told="no WebP is written here. Ask for a PNG or a JPEG.",
        )


def check_side_of_format(format: ImageFormat, height: int, width: int) -> None:
    """Raise HipaError for an image that is too large for the format."""
    if max(height, width) > _MAX_SIDE[format]:
        problem = f"the image has {width}x{height} pixels, a {format.upper()} at most"
        raise RequestError(
            f"{problem} {_MAX_SIDE[format]} each way. Write PNG.",
            argument="format",
            told=f"{problem} {_MAX_SIDE[format]} each way. Ask for a PNG.",
        )


def encode_image(
    image_HWC: np.ndarray,
    parameters: Mapping[str, Any],
    format: ImageFormat = "png",
    *,
    quality: int | None = None,
    provenance: bool = True,
) -> bytes:
    """Encode an image with its parameters and with IPTC's word for where it comes from.

    Equal arguments give equal bytes, with one version of Pillow and its libraries.

    Args:
        image_HWC: uint8 [H, W, 3].
        parameters: values that JSON can hold, such as prompt and seed.
        format: 'png', 'webp' or 'jpeg'.
        quality: 1 to 100. None is lossless for WebP, ``JPEG_QUALITY`` for JPEG. A PNG has none.
        provenance: whether the file says that a model made or changed the image.

    Raises:
        HipaError: no such image, format or parameters; a quality that does not fit, an image that
            is too large for the format, or parameters that are too long for a JPEG.

    Example:
        >>> content = encode_image(result.images_BHWC[0], result.parameters[0], "webp")

    """
    _check_given(image_HWC, parameters, format)
    if quality is not None:
        quality = whole_number(quality, "quality")
    check_quality(format, quality)
    check_side_of_format(format, *image_HWC.shape[:2])
    image = Image.fromarray(image_HWC)
    pixels = pixels_sha256(image_HWC)
    buffer = io.BytesIO()
    if format == "png":
        info = _png_info(parameters, provenance, pixels)
        image.save(buffer, "PNG", pnginfo=info, compress_level=PNG_LEVEL)
        return buffer.getvalue()

    exif = _exif(infotext(parameters))
    packet = write_packet(parameters, provenance=provenance, with_parameters=True, pixels=pixels)
    if format == "webp":
        options: dict[str, Any] = WEBP_LOSSLESS
        if quality is not None:
            options = {"quality": quality, "method": 4}
        image.save(buffer, "WEBP", exif=exif, xmp=packet, **options)
        return buffer.getvalue()

    segment = JPEG_HEADER + packet
    longest = max(len(exif), len(segment))
    if longest > _MAX_SEGMENT:
        problem = f"the parameters take {longest} bytes, a JPEG holds {_MAX_SEGMENT}."
        raise RequestError(
            f"{problem} Shorten the prompt, or write PNG or WebP.",
            argument="format",
            told=f"{problem} Shorten the prompt, or ask for a PNG or a WebP.",
        )
    quality = JPEG_QUALITY if quality is None else quality
    # Colour at full resolution where quality matters: generated images have hard coloured edges.
    subsampling = 0 if quality >= 90 else 2
    image.save(buffer, "JPEG", quality=quality, subsampling=subsampling, exif=exif)
    return _with_segment(buffer.getvalue(), segment)


def _check_given(image_HWC: object, parameters: object, format: object) -> None:
    """Raise HipaError for what is no image, no parameters or no format."""
    if not isinstance(format, str) or format not in SUFFIX:
        raise HipaError(
            f"the format is {brief(format)}. Expected one of: {', '.join(map(repr, SUFFIX))}."
        )
    got = f"a {type(image_HWC).__name__}"
    if isinstance(image_HWC, np.ndarray):
        shape = image_HWC.shape
        if image_HWC.dtype == np.uint8 and len(shape) == 3 and shape[2] == 3 and 0 not in shape:
            got = ""
        else:
            got = f"an array of {image_HWC.dtype} {list(shape)}"
    if got:
        raise HipaError(
            f"the image is {got}. Expected uint8 [H, W, 3], such as result.images_BHWC[0]."
        )
    if not isinstance(parameters, Mapping):
        raise HipaError(
            f"the parameters are {brief(parameters)}. Expected a dictionary, such as "
            "result.parameters[0]."
        )
    try:
        json.dumps(parameters)
    except (TypeError, ValueError, RecursionError) as error:
        raise HipaError(
            f"the parameters hold what JSON cannot ({first_line(error)}). Expected texts, Python's "
            "numbers, lists and dictionaries."
        ) from None


def pixels_sha256(image_HWC: np.ndarray) -> str:
    """A hash of an image's size and pixels, whatever file they come from.

    Args:
        image_HWC: uint8 [H, W, 3].

    """
    shape = repr(image_HWC.shape).encode()
    return hashlib.sha256(shape + np.ascontiguousarray(image_HWC).tobytes()).hexdigest()


def _png_info(
    parameters: Mapping[str, Any], provenance: bool, pixels: str
) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    # iTXt holds UTF-8; the older tEXt chunk holds Latin-1 only, which few prompts fit.
    info.add_itxt(PARAMETERS_KEY, json.dumps(parameters, sort_keys=True, ensure_ascii=False))
    text = infotext(parameters)
    if text:
        # As A1111 does: tEXt where Latin-1 holds the text, else iTXt. Some readers know tEXt only.
        info.add_text(KEYWORD, text.replace("\0", ""))
    packet = write_packet(parameters, provenance=provenance, pixels=pixels)
    info.add_itxt(PNG_KEYWORD, packet.decode())
    return info


def _exif(text: str) -> bytes:
    """EXIF data whose UserComment is ``text``, as piexif's helper writes it for A1111.

    Written by hand: Pillow gives the tag the type BYTE, which piexif reads as a list of numbers.
    The standard's type is UNDEFINED (JEITA CP-3451, section 4.6.5).
    """
    if not text:
        return b""
    comment = UNICODE + text.encode("utf-16-be", "surrogatepass")
    header = b"MM\0*" + struct.pack(">L", 8)
    # A directory: a count, twelve bytes an entry (tag, type, count, value or offset), the next one.
    exif_at = len(header) + 2 + 12 + 4
    comment_at = exif_at + 2 + 2 * 12 + 4
    first = struct.pack(">HHHLLL", 1, EXIF_IFD, _LONG, 1, exif_at, 0)
    version = struct.pack(">HHL4s", _EXIF_VERSION, _UNDEFINED, 4, b"0232")
    entry = struct.pack(">HHLL", USER_COMMENT, _UNDEFINED, len(comment), comment_at)
    second = struct.pack(">H", 2) + version + entry + struct.pack(">L", 0)
    return b"Exif\0\0" + header + first + second + comment


def _with_segment(jpeg: bytes, payload: bytes) -> bytes:
    """A JPEG with one more APP1 segment, after those that are there.

    Pillow takes ``xmp`` for JPEG only since 11.0.
    """
    at = 2  # after the marker of the start
    while jpeg[at] == 0xFF and 0xE0 <= jpeg[at + 1] <= 0xEF:
        at += 2 + struct.unpack(">H", jpeg[at + 2 : at + 4])[0]
    segment = b"\xff\xe1" + struct.pack(">H", len(payload) + 2) + payload
    return jpeg[:at] + segment + jpeg[at:]

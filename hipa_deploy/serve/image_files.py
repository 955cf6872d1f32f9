"""Images as files: the formats that a service sends, and what users upload.

Shapes: H, W height and width in pixels; C channels.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from typing import IO, Literal

import numpy as np
from PIL import Image

from hipa_deploy.disk.quiet_pillow import quiet_pillow
from hipa_deploy.errors import HipaError, RequestError
from hipa_deploy.images.key_colour import decode
from hipa_deploy.images.read import alpha_of, turned_upright

Format = Literal["png", "jpeg", "webp"]
MEDIA_TYPES: dict[Format, str] = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
# What OpenAI's API takes. Every other decoder of Pillow is code that a stranger could reach.
_UPLOADS = ("PNG", "JPEG", "WEBP")
# Of a JPEG: a progressive one has about ten. Each goes over all pixels again, and a file of a
# megabyte can hold tens of thousands: minutes of a core. libjpeg's djpeg has -maxscans for them.
_MOST_SCANS = 100
_SCAN = 0xDA
_END = 0xD9
# Of a JPEG, scans among them: a photo has up to some hundreds, of 64 KiB each at most.
_MOST_SEGMENTS = 10_000
# A mark that a segment follows, and the end. Zero follows a byte 0xFF of what is compressed; 0xD0
# to 0xD7 stand between its parts. Those and marks below 0xC0 libjpeg passes over, without a length.
_MARK = re.compile(rb"\xff([\xc0-\xcf\xd9-\xfe])")
BEST = 100  # quality of a JPEG or WebP; of a WebP it means lossless


def open_upload(file: IO[bytes], what: str, most_pixels: int) -> Image.Image:
    """Open an image that a user sent, and look at its head: no pixel is decoded yet.

    Args:
        file: its bytes.
        what: 'image' or 'mask', for messages.
        most_pixels: of width times height.

    Raises:
        HipaError: not a PNG, JPEG or WebP, too many pixels, or a JPEG of too many scans or
            segments.

    """
    file.seek(0)
    try:
        with quiet_pillow():
            image = Image.open(file, formats=_UPLOADS)
    except Image.DecompressionBombError:  # Pillow's own limit: it does not say how many there are
        raise RequestError(
            f"the {what} has too many pixels. Expected at most {most_pixels} in all. Make it "
            "smaller.",
            argument=what,
            code="image_too_large",
        ) from None
    except Exception:  # what Pillow raises depends on the format and the damage
        raise RequestError(
            f"the {what} is no PNG, JPEG or WebP file that can be read.",
            argument=what,
            code="invalid_image_format",
        ) from None
    if image.width * image.height > most_pixels:
        raise RequestError(
            f"the {what} has {image.width}x{image.height} pixels. "
            f"Expected at most {most_pixels} in all. Make it smaller.",
            argument=what,
            code="image_too_large",
        )
    # With MPO, which phones write: Pillow tells it from JPEG by what follows the first image.
    if image.format in ("JPEG", "MPO"):
        _check_scans(file, what)
    return image


def _check_scans(file: IO[bytes], what: str) -> None:
    """Check that a JPEG has no more scans than a decoder may be asked to go through.

    Raises:
        HipaError: more scans, or more segments, than any camera or program writes.

    """
    place = file.tell()
    file.seek(0)
    content = file.read()
    file.seek(place)
    marks = list(islice(_marks(content), _MOST_SEGMENTS + 1))
    if len(marks) > _MOST_SEGMENTS:
        raise RequestError(
            f"the {what} is a JPEG of more than {_MOST_SEGMENTS} segments. Expected at most "
            f"{_MOST_SEGMENTS}. Save it again.",
            argument=what,
            code="invalid_image_format",
        )
    scans = marks.count(_SCAN)
    if scans > _MOST_SCANS:
        raise RequestError(
            f"the {what} is a JPEG of {scans} scans. Expected at most {_MOST_SCANS}. "
            "Save it again.",
            argument=what,
            code="invalid_image_format",
        )


def _marks(content: bytes) -> Iterator[int]:
    """The marks of a JPEG's segments, as libjpeg comes to them, up to the end of the first image.

    What lies within a segment does not count, such as a thumbnail; nor what follows the image, such
    as the film of a phone's moving photo, where the bytes of a mark occur by chance.
    """
    place = 0
    while found := _MARK.search(content, place):
        mark = found[1][0]
        if mark == _END:
            return
        yield mark
        # Of what is skipped, the length counts itself; libjpeg takes less than that for nothing.
        length = int.from_bytes(content[found.end() : found.end() + 2], "big")
        place = found.end() + max(length, 2)


def mask_of_alpha(image: Image.Image, what: str) -> np.ndarray:
    """The mask of OpenAI's API, bool [H, W]: fully transparent pixels are repainted.

    It is turned upright as ``read_image`` turns the image that it belongs to.

    Args:
        image: with an alpha channel.
        what: 'image' or 'mask', for messages.

    Raises:
        HipaError: the image has no transparency, or nothing else, or cannot be decoded.

    Source: OpenAI's API reference of ``images.edit``: "fully transparent areas (e.g. where alpha is
    zero) indicate where image should be edited".

    """
    try:
        if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
            raise RequestError(
                f"the {what} has no alpha channel. Expected one that is transparent where the "
                "image is to be repainted.",
                argument=what,
                code="invalid_mask",
            )
        decode(image)
        alpha_HW = alpha_of(turned_upright(image))
    except HipaError:
        raise
    except Exception:
        raise RequestError(
            f"the {what} is damaged. Expected a complete file.",
            argument=what,
            code="image_parse_error",
        ) from None
    hole_HW = alpha_HW == 0
    if not hole_HW.any():
        raise RequestError(
            f"the {what} is nowhere fully transparent. Expected it transparent where the image is "
            "to be repainted.",
            argument=what,
            code="invalid_mask",
        )
    if hole_HW.all():
        raise RequestError(
            f"the {what} is transparent everywhere: nothing would be kept. Expected it opaque "
            "where the image is to be kept.",
            argument=what,
            code="invalid_mask",
        )
    return hole_HW

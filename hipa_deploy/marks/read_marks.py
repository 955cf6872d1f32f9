"""Read what an image file says about itself: this package's parameters, A1111's text, XMP."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from hipa_deploy.disk.quiet_pillow import bomb_in_words, quiet_pillow
from hipa_deploy.disk.reading import MIB, check_file
from hipa_deploy.errors import HipaError, as_line
from hipa_deploy.marks.a1111 import KEYWORD, parse_infotext
from hipa_deploy.marks.image_file import EXIF_IFD, PARAMETERS_KEY, UNICODE, USER_COMMENT
from hipa_deploy.marks.xmp import JPEG_HEADER, PNG_KEYWORD, Xmp, read_packet

MAX_FILE = 512 * MIB
MAX_TEXT = 4 * MIB
_FORMATS = ("PNG", "WEBP", "JPEG")
_REMEDY = "Expected a PNG, WebP or JPEG file."
_STARTS = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")


@dataclass(frozen=True)
class FileMarks:
    """What an image file says about itself. Nothing of it is proven: anyone can write it.

    Attributes:
        format: 'PNG', 'WEBP' or 'JPEG'.
        width: pixels.
        height: pixels.
        parameters: this package's generation parameters; None where there are none.
        infotext: the text that A1111's users see; None where there is none.
        xmp: what the XMP packet says; empty where there is none.
        problems: a line for each part that is damaged.

    """

    format: str
    width: int
    height: int
    parameters: dict[str, Any] | None
    infotext: str | None
    xmp: Xmp
    problems: tuple[str, ...] = ()

    @property
    def fields(self) -> dict[str, str]:
        """The fields of ``infotext``."""
        return parse_infotext(self.infotext) if self.infotext else {}


def is_image_file(path: Path) -> bool:
    """Whether a file starts as PNG, WebP and JPEG files do.

    Raises:
        HipaError: the file may not be read.

    """
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            start = file.read(12)
    except PermissionError:
        raise HipaError(f"{path} is not readable. Give yourself the right to read it.") from None
    except OSError:
        return False
    return start.startswith(_STARTS) or (start[:4] == b"RIFF" and start[8:] == b"WEBP")


def read_marks(path: str | Path) -> FileMarks:
    """Read what an image file says about itself; its pixels are not decoded but for a PNG's.

    Raises:
        HipaError: the file is missing, enormous, or no PNG, WebP or JPEG.

    Example:
        >>> read_marks("apple.webp").parameters["prompt"]
        '3d emoji of a red apple'

    """
    path = Path(path)
    check_file(path, MAX_FILE, _REMEDY)
    with (
        as_line(f"{path} cannot be read", _REMEDY),
        quiet_pillow(),
        _opened(path) as image,
    ):
        return _marks_of(image)


def _opened(path: Path) -> Image.Image:
    try:
        return Image.open(path, formats=_FORMATS)
    except Image.DecompressionBombError as error:
        raise HipaError(f"{path} cannot be read: {bomb_in_words(error)}") from None


def read_parameters(path: str | Path) -> dict[str, Any]:
    """Read the generation parameters from a file that hipa-generate or ``save_image`` wrote.

    Args:
        path: of a PNG, WebP or JPEG.

    Raises:
        HipaError: the file is not an image, or has no generation parameters.

    """
    found = read_marks(path)
    if found.parameters is None:
        raise HipaError(
            f"{path} carries no generation parameters{_why(found)}. "
            "Expected an image that hipa-generate wrote."
        )
    return found.parameters


def _why(found: FileMarks) -> str:
    if found.problems:
        return f" that can be read ({found.problems[0].rstrip('.')})"
    return " of this package, only A1111's text" if found.infotext else ""


def _marks_of(image: Image.Image) -> FileMarks:
    problems: list[str] = []
    # A phone's JPEG may have more images behind the first, such as a gain map: Pillow's MPO.
    format = "JPEG" if image.format == "MPO" else str(image.format)
    if format == "PNG":
        # Pillow reads the chunks before the pixels when it opens a file, those after them here.
        texts = getattr(image, "text", {}) if _has_all_chunks(image) else image.info
        packet = _bytes(texts.get(PNG_KEYWORD))
        text = texts.get(KEYWORD)
        record = texts.get(PARAMETERS_KEY)
    else:
        packet = _jpeg_packet(image) if format == "JPEG" else image.info.get("xmp")
        text = _user_comment(image)
        record = None

    xmp = Xmp()
    if packet:
        try:
            xmp = read_packet(packet)
        except HipaError as error:
            problems.append(str(error))
    parameters = xmp.parameters
    if record is not None:
        try:
            parameters = _parameters(record)
        except ValueError as error:
            problems.append(f"the parameters are no JSON object: {error}.")
    return FileMarks(
        format=format,
        width=image.width,
        height=image.height,
        parameters=parameters,
        infotext=str(text)[:MAX_TEXT] if text else None,
        xmp=xmp,
        problems=tuple(problems),
    )


def _has_all_chunks(image: Image.Image) -> bool:
    """Decode a PNG; False where its pixels are damaged or too many, and its chunks are not."""
    try:
        image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False
    return True


def _bytes(text: Any) -> bytes | None:
    return str(text).encode() if text else None


def _parameters(text: Any) -> dict[str, Any]:
    parameters = json.loads(str(text))
    if not isinstance(parameters, dict):
        raise ValueError("another type")
    return parameters


def _jpeg_packet(image: Image.Image) -> bytes | None:
    for name, content in getattr(image, "applist", []):
        if name == "APP1" and content.startswith(JPEG_HEADER):
            return bytes(content[len(JPEG_HEADER) :])
    return None


def _user_comment(image: Image.Image) -> str | None:
    """The UserComment of the EXIF data, as A1111's readers take it."""
    try:
        exif = image.getexif()
        comment = exif.get_ifd(EXIF_IFD).get(USER_COMMENT)
        big_endian = exif.endian == ">"
    except Exception:  # whatever Pillow raises for broken EXIF data
        return None
    if isinstance(comment, str):
        return comment or None
    if not isinstance(comment, bytes) or len(comment) <= len(UNICODE):
        return None
    body = comment[len(UNICODE) :]
    if not comment.startswith(UNICODE):
        return body.decode("utf-8", "replace").strip("\0 ") or None
    # piexif writes big endian whatever the file is; other programs use the file's own order. The
    # text is mostly ASCII, so the side of the zero bytes tells.
    if body[0::2].count(0) == body[1::2].count(0):
        is_big = big_endian
    else:
        is_big = body[0::2].count(0) > body[1::2].count(0)
    return body.decode("utf-16-be" if is_big else "utf-16-le", "replace")

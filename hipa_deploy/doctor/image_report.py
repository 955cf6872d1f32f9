"""What an image says about itself: ``hipa-doctor IMAGE``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from hipa_deploy.errors import HipaError
from hipa_deploy.images.read import read_image
from hipa_deploy.marks.content_credentials import ContentCredentials, has_reader, read_credentials
from hipa_deploy.marks.image_file import pixels_sha256
from hipa_deploy.marks.read_marks import MAX_FILE, FileMarks, read_marks
from hipa_deploy.marks.watermark_reader import LEAST_READ_SIDE, read_watermark


def examine_image(path: str | Path) -> dict[str, Any]:
    """Read an image's parameters, provenance, content credentials and watermark.

    Nothing but a C2PA signature is proof: the rest anyone can write or remove.

    Args:
        path: of a PNG, WebP or JPEG.

    Returns:
        JSON types: 'path', 'format', 'size' [width, height], 'parameters', 'infotext' (A1111's
        fields), 'provenance', 'pixels', 'watermark', 'content_credentials', and 'problems', a line
        each.

    Raises:
        HipaError: the file is missing, or its pixels cannot be read.

    Example:
        >>> examine_image("apple.png")["provenance"]
        'http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia'

    """
    path = Path(path)
    marks = read_marks(path)
    image_HWC = read_image(path)
    problems = list(marks.problems)
    return {
        "path": str(path),
        "format": marks.format,
        "size": [marks.width, marks.height],
        "parameters": marks.parameters,
        "infotext": marks.fields or None,
        "provenance": marks.xmp.source_type,
        "software": marks.xmp.software,
        "pixels": _pixels(marks, pixels_sha256(image_HWC)),
        "watermark": _watermark(image_HWC),
        "content_credentials": _credentials(path, marks, problems),
        "problems": problems,
    }


def _pixels(marks: FileMarks, sha256: str) -> str:
    """Whether the pixels are those that were written."""
    if marks.xmp.pixels is None:
        return "no hash was recorded"
    if marks.xmp.pixels == sha256:
        return "as they were made"
    if marks.format == "PNG":
        return "changed since the image was made"
    return "not as they were made: compressed with loss, or changed"


def _watermark(image_HWC: Any) -> str:
    if min(image_HWC.shape[:2]) < LEAST_READ_SIDE:
        return f"the image is too small for one (under {LEAST_READ_SIDE} pixels)"
    found = read_watermark(image_HWC)
    if found.payload is None:
        return f"none found (score {found.score:.1f})"
    down, across = found.scale
    scale = (down + across) / 2
    size = "" if abs(scale - 1) < 0.005 else f", image scaled to {100 * scale:.0f} %"
    return f"{found.payload:08x} (score {found.score:.1f}{size})"


def _credentials(path: Path, marks: FileMarks, problems: list[str]) -> str:
    """The state of the C2PA manifest; a broken one goes to ``problems``."""
    if not has_reader():
        return "not read. Run: pip install 'hipa-deploy[c2pa]'"
    if path.stat().st_size > MAX_FILE:
        return "not read: the file is too large"
    try:
        found = read_credentials(path.read_bytes(), marks.format.lower())
    except HipaError as error:
        problems.append(str(error))
        return "cannot be read"
    if found is None:
        return "none"
    if found.state == "Invalid":
        problems.append(
            "the content credentials do not hold: the image or its manifest was changed "
            f"({', '.join(found.problems)})."
        )
    return _in_words(found)


def _in_words(found: ContentCredentials) -> str:
    state = {
        "Trusted": "valid, the signer is trusted",
        "Valid": "valid; whether the signer can be trusted is yours to judge",
    }.get(found.state, "INVALID")
    parts = [
        state,
        f"signed by {found.signer or 'nobody that is named'}",
        f"written by {found.generator or 'an unnamed program'}",
    ]
    if found.source_type:
        parts.append(found.source_type)
    return "; ".join(parts)


def render_image(report: dict[str, Any]) -> Table:
    """The report of ``examine_image`` as a table for a terminal."""
    table = Table("", "", show_header=False, title=escape(str(report["path"])))
    for key, value in report.items():
        if key in ("path", "problems"):
            continue
        if isinstance(value, dict):
            value = "\n".join(f"{name}: {part}" for name, part in value.items())
        elif isinstance(value, list):
            value = " x ".join(str(part) for part in value)
        table.add_row(key.replace("_", " "), escape(_printable(value)))
    for problem in report["problems"]:
        table.add_row("[red]problem[/red]", escape(_printable(problem)))
    return table


def _printable(value: Any) -> str:
    """A value of a stranger's file, without characters that steer a terminal."""
    if value is None:
        return "-"
    return "".join(
        letter if letter.isprintable() or letter == "\n" else "?" for letter in str(value)
    )

"""What the header Accept asks for: an image as bytes, and in which format, or JSON."""

from __future__ import annotations

import re
from collections.abc import Sequence

from hipa_deploy.serve.image_files import MEDIA_TYPES, Format

_FORMATS = {media_type: name for name, media_type in MEDIA_TYPES.items()}
_ANY_IMAGE = "image/*"
_JSON = ("application/json", "application/*", "*/*")
_WEIGHT = re.compile(r";\s*q\s*=\s*([01](?:\.\d{0,3})?)\s*(?:;|$)", re.IGNORECASE)


class NotAcceptedError(Exception):
    """A client accepts images alone, and none in the format that it asks for.

    Args:
        named: media types that it accepts.

    """

    def __init__(self, named: Sequence[str]) -> None:
        super().__init__(f"accepted are {', '.join(named)}")
        self.named = tuple(named)


def accepted_format(headers: Sequence[str], asked: Format | None) -> Format | None:
    """The format of the bytes that a client wants.

    Args:
        headers: every header Accept of the request.
        asked: the request's own ``output_format``; None: it names none.

    Returns:
        None where the client wants JSON.

    Raises:
        NotAcceptedError: it accepts images alone, and none in the format that it asks for.

    """
    kinds = _by_preference(",".join(headers))
    for kind in kinds:
        if kind == _ANY_IMAGE:
            return asked or "png"
        if kind in _JSON:
            return None
        if kind in _FORMATS and asked in (None, _FORMATS[kind]):
            return _FORMATS[kind]
    named = dict.fromkeys(kind for kind in kinds if kind in _FORMATS)
    if named:
        raise NotAcceptedError(list(named))
    return None


def _by_preference(header: str) -> list[str]:
    """The media types that a client accepts, the best first: by weight, then images, then names."""
    weighted = []
    for part in header.lower().split(","):
        kind = part.partition(";")[0].strip()
        weight = _WEIGHT.search(part)
        quality = float(weight[1]) if weight else 1.0
        if quality > 0:
            weighted.append((-quality, not kind.startswith("image/"), kind.endswith("*"), kind))
    # Stable: of two that are equal in all of these the first one stays the first.
    return [kind for *_, kind in sorted(weighted, key=lambda entry: entry[:3])]

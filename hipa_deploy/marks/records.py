"""What the owner of a bundle wants done to its images: records of the bundle's manifest."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field, model_validator

from hipa_deploy.errors import HipaError
from hipa_deploy.record import Record

_ID = re.compile(r"[0-9a-f]{1,8}")
_WISHES = "no-provenance, watermark, watermark=HEX, c2pa, no-safety"
Number = Annotated[float, Field(allow_inf_nan=False)]


class Marks(Record):
    """How the images of a bundle are marked, whoever makes them.

    Attributes:
        provenance: files say in IPTC's words that a model made the image.
        watermark: images carry the invisible watermark.
        watermark_id: the watermark's number, 1 to 8 hexadecimal digits; None is the beginning of
            the UNet's hash.
        c2pa: files are written only with a C2PA manifest that the user's key has signed.

    """

    provenance: bool = True
    watermark: bool = False
    watermark_id: str | None = Field(default=None, pattern="^[0-9a-f]{1,8}$")
    c2pa: bool = False


class SafetySettings(Record):
    """How a safety checker's images are prepared, and what it flags.

    Attributes:
        shortest_edge: pixels that an image's shorter side is scaled to (bicubic).
        crop: (height, width) that is then cut from the middle.
        mean: of the channels, which is taken away.
        std: of the channels, which is divided by.
        special_thresholds: cosines above which a special-care concept is near; one such lowers the
            other thresholds by 0.01.
        thresholds: cosines above which a concept is flagged.
        sha256: of the checker's weights.

    """

    shortest_edge: int = Field(ge=8, le=4096)
    crop: tuple[Annotated[int, Field(ge=8, le=4096)], Annotated[int, Field(ge=8, le=4096)]]
    mean: tuple[Number, Number, Number]
    std: tuple[Number, Number, Number]
    special_thresholds: tuple[Number, ...] = Field(min_length=1, max_length=1000)
    thresholds: tuple[Number, ...] = Field(min_length=1, max_length=1000)
    sha256: str = Field(max_length=500)

    @model_validator(mode="after")
    def _divides(self) -> SafetySettings:
        if min(self.std) <= 0:
            raise ValueError(f"std is {self.std}, expected numbers above 0")
        return self


def parse_marks(wishes: Sequence[str]) -> tuple[Marks, bool]:
    """Read the values of ``hipa-export --mark``.

    Args:
        wishes: 'watermark', 'watermark=C0FFEE', 'c2pa', 'no-provenance' or 'no-safety'.

    Returns:
        The marks, and whether a safety checker of the model is exported.

    Raises:
        HipaError: another word, or a number that is none.

    Example:
        >>> parse_marks(["watermark=C0FFEE"])[0].watermark_id
        'c0ffee'

    """
    marks = Marks()
    safety = True
    for wish in wishes:
        word, equals, value = wish.partition("=")
        number = value.lower().removeprefix("0x")
        if word == "watermark" and (not equals or _ID.fullmatch(number)):
            marks = marks.model_copy(
                update={"watermark": True, "watermark_id": number if equals else None}
            )
        elif wish == "c2pa":
            marks = marks.model_copy(update={"c2pa": True})
        elif wish == "no-provenance":
            marks = marks.model_copy(update={"provenance": False})
        elif wish == "no-safety":
            safety = False
        else:
            raise HipaError(
                f"--mark {wish} is unknown. Expected one of: {_WISHES}, with 1 to 8 hexadecimal "
                "digits."
            )
    return marks, safety

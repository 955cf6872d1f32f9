"""Images that a checker flagged: they are withheld, and said to be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hipa_deploy.errors import HipaError


@dataclass(frozen=True)
class Flagged:
    """An image that was made and is not shown.

    Attributes:
        index: its place among the images that were asked for, from 0.
        prompt: of the image.
        seed: of the image.
        reason: what flagged it, and why.

    """

    index: int
    prompt: str
    seed: int
    reason: str


def withheld_error(flagged: Sequence[Flagged], asked: int) -> HipaError:
    """The error of a command that withheld some of the images that were asked for."""
    first = flagged[0]
    return HipaError(
        f"{len(flagged)} of {asked} images were withheld, and no file was written for them: the "
        f"image of {first.prompt[:60]!r}, seed {first.seed}, was flagged by {first.reason}"
        f"{' (the first of them)' if len(flagged) > 1 else ''}. Try another seed or prompt."
    )

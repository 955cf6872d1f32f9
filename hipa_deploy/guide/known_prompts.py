"""Prompts outside what the embedded model knows, and the nearest that it does."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable
from pathlib import Path

from hipa_deploy.embedded import BUNDLE, EXAMPLE_PROMPT, MODEL
from hipa_deploy.errors import HipaWarning, brief

# What the model was trained on: things, kinds and styles. Pairs are the same things in a style that
# was kept aside.
_FILES = ("prompts.txt", "prompts_pair.txt", "prompts_kind.txt", "prompts_style.txt")
_STYLE = EXAMPLE_PROMPT.partition(" of ")[0]
_COMPARED = 100  # characters of a prompt: each is compared with thousands


def warn_of_unknown(bundle: Path, prompts: Iterable[str]) -> None:
    """Warn of each prompt that the embedded bundle cannot draw; say nothing of other bundles.

    Args:
        bundle: the bundle's folder.
        prompts: what images are asked of.

    Example:
        >>> warn_of_unknown(BUNDLE, ["3d emoji of a zebra crossing"])
        HipaWarning: the included model knows no '3d emoji of a zebra crossing', and draws …

    """
    if bundle != BUNDLE:
        return
    known = known_prompts()
    for prompt in dict.fromkeys(prompts):
        nearest = nearest_known(prompt, known)
        if nearest is not None:
            warnings.warn(
                f"the included model knows no {brief(prompt)}, and draws something else. The "
                f"nearest prompt that it knows is {nearest!r}. {MODEL} lists them, in "
                f"{', '.join(_FILES)}.",
                HipaWarning,
                stacklevel=2,
            )


def known_prompts() -> dict[str, str]:
    """Every prompt that the embedded model knows, by itself in lower case."""
    known = {}
    for name in _FILES:
        for line in (MODEL / name).read_text(encoding="utf-8").splitlines():
            known[_plain(line)] = line
    return known


def nearest_known(prompt: str, known: dict[str, str]) -> str | None:
    """The known prompt that is spelled most like this one; None for one that is known itself.

    Any known prompt may also name one of the known backgrounds' colours.
    """
    plain = _plain(prompt)
    bare, background = _split(plain)
    # Every background of the model stands after each of its styles, and '' stands for white.
    background_known = f"{_STYLE}{background}" in known
    if plain in known or (bare in known and background_known):
        return None
    candidates = [each for each in known if not _split(each)[1]]
    found = difflib.get_close_matches(bare[:_COMPARED], candidates, n=1, cutoff=0.0)
    return known[found[0]] + (background if background_known else "")


def _split(plain: str) -> tuple[str, str]:
    """A prompt without its background, and what it says of that: ' on a blue background'."""
    bare, on, rest = plain.rpartition(" on a ")
    if rest.endswith(" background"):
        return bare, on + rest
    return plain, ""


def _plain(prompt: str) -> str:
    """In lower case and with single spaces, as CLIP's tokenizer reads it."""
    return " ".join(prompt.lower().split())

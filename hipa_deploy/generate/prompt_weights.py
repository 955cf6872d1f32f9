"""Weights in a prompt, ``(word:1.3)``: syntax and arithmetic of AUTOMATIC1111's web UI.

Both are what most published prompts were written for
(https://github.com/AUTOMATIC1111/stable-diffusion-webui, modules/prompt_parser.py and
modules/sd_emphasis.py, there called 'Original'):

    (word)         1.1 times as strong
    [word]         1 / 1.1 times
    (word:1.3)     1.3 times
    ((word))       brackets multiply
    \\( \\) \\[ \\]    the character itself

The final hidden state of each token is multiplied by the token's weight. Then the hidden states of
the chunk are scaled so that their mean is what it was before. The web UI takes that mean over all
prompts of a batch; here it is each prompt's own, so that an image does not depend on what else is
in its batch; and a mean that is no more than rounding is left alone. The web UI's words AND and
BREAK and its schedules ``[a:b:0.5]`` are read as text.

Training gives the function torch tensors, the runtime numpy arrays.

Shape suffixes: B prompts, N = B * chunks, C tokens of a chunk, L tokens of a context, D its width.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from hipa_deploy.errors import RequestError

ROUND = 1.1  # what a pair of round brackets multiplies by
SQUARE = 1 / 1.1  # and a pair of square ones
# Of all brackets around a piece together. Far below, an image is noise already; far above, float32
# ends, and the image would be black.
LARGEST = 1000
# Of the mean magnitude: a mean this small is rounding, and a ratio of two such means is noise. The
# text encoders of Stable Diffusion have a mean that is far from it; a layer norm without a bias,
# as in a model that was never trained, has none.
NEGLIGIBLE = 1e-4
# An escaped character, a bracket, a weight with its bracket, or text.
PARTS = re.compile(r"\\[()\[\]\\]|\\|[(\[]|:\s*([+-]?[.\d]+)\s*\)|[)\]]|[^\\()\[\]:]+|:")
WRITTEN = re.compile(r"\([^()]*:\s*[+-]?[.\d]+\s*\)")
# The web UI's tags, such as <lora:name:0.8>, and its schedules, [from:to:when]. AND is not among
# them: a text in capitals has it too.
WEB_UI = re.compile(r"\bBREAK\b|<(?:lora|lyco|hypernet):[^<>]*>|\[[^\[\]]*:\s*[.\d]+\s*\]")


def parse_weights(prompt: str) -> list[tuple[str, float]]:
    """The pieces of a prompt, and the weight of each.

    A bracket that is not closed reaches to the end; one that was not opened is text.

    Raises:
        HipaError: what stands after a colon, as in ``(word:1.2.3)``, is no number; or a weight is
            larger than ``LARGEST``.

    Example:
        >>> parse_weights("a (red:1.3) apple")
        [('a ', 1.0), ('red', 1.3), (' apple', 1.0)]

    """
    pieces: list[tuple[str, float]] = []
    round_starts: list[int] = []  # where an open bracket began, as an index of ``pieces``
    square_starts: list[int] = []

    for match in PARTS.finditer(prompt):
        part = match.group(0)
        number = match.group(1)
        if part.startswith("\\"):
            pieces.append((part[1:] or part, 1.0))
        elif part == "(":
            round_starts.append(len(pieces))
        elif part == "[":
            square_starts.append(len(pieces))
        elif number is not None and round_starts:
            _multiply(pieces, round_starts.pop(), _weight(part, number))
        elif part == ")" and round_starts:
            _multiply(pieces, round_starts.pop(), ROUND)
        elif part == "]" and square_starts:
            _multiply(pieces, square_starts.pop(), SQUARE)
        else:
            pieces.append((part, 1.0))

    for start in round_starts:
        _multiply(pieces, start, ROUND)
    for start in square_starts:
        _multiply(pieces, start, SQUARE)
    for _, weight in pieces:
        if not abs(weight) <= LARGEST:
            raise RequestError(
                f"a part of the prompt has the weight {weight:.3g}. Expected at most {LARGEST}, "
                r"all brackets around it together. Brackets that are text are \( and \).",
                argument="prompt",
                code="invalid_prompt",
            )
    return _joined(pieces)


def _weight(part: str, number: str) -> float:
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise RequestError(
            f"{part!r} in the prompt is no weight. Expected a number, as in (word:1.3), "
            r"or \( and \) for brackets that are text.",
            argument="prompt",
            code="invalid_prompt",
        )
    return weight


def _multiply(pieces: list[tuple[str, float]], start: int, factor: float) -> None:
    for index in range(start, len(pieces)):
        text, weight = pieces[index]
        pieces[index] = (text, weight * factor)


def _joined(pieces: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """Neighbours of equal weight as one piece: an escaped bracket does not cut a word."""
    joined: list[tuple[str, float]] = []
    for text, weight in pieces:
        if joined and joined[-1][1] == weight:
            joined[-1] = (joined[-1][0] + text, weight)
        else:
            joined.append((text, weight))
    return joined


def written_weight(prompt: str) -> str | None:
    """The first part of a prompt that is written like a weight with a number; None without one.

    Example:
        >>> written_weight("a (red:1.3) apple (really)")
        '(red:1.3)'

    """
    found = WRITTEN.search(prompt)
    return found.group(0) if found else None


def web_ui_word(prompt: str) -> str | None:
    """The first part of a prompt that the web UI would obey, and that is text here; None without.

    Example:
        >>> web_ui_word("a cat BREAK a dog <lora:fur:0.8>")
        'BREAK'

    """
    found = WEB_UI.search(prompt)
    return found.group(0) if found else None


def in_other_case(word: str, prompt: str) -> str | None:
    """The first place of a prompt where ``word`` stands with other capitals; None without.

    Example:
        >>> in_other_case("EasyNegative", "blurry, easynegative")
        'easynegative'

    """
    for found in re.finditer(rf"(?<!\w){re.escape(word)}(?!\w)", prompt, re.IGNORECASE):
        if found.group(0) != word:
            return found.group(0)
    return None


def weigh_context(context_BLD: Any, weights_BL: Any, chunk_tokens: int) -> Any:
    """The context [B, L, D] with each token as strong as its weight says, in float32.

    Args:
        context_BLD: from the text encoder.
        weights_BL: float32; 1 leaves a token as it is.
        chunk_tokens: C; the mean is kept for each chunk by itself.

    Raises:
        HipaError: the weights cancel out, so that no scale restores the mean.

    Example:
        >>> context = np.ones((1, 77, 768), np.float32)
        >>> weigh_context(context, np.full((1, 77), 2.0, np.float32), 77).max()
        1.0

    """
    batch, length, width = context_BLD.shape
    context_NCD = _float32(context_BLD).reshape(-1, chunk_tokens, width)
    weights_NC = weights_BL.reshape(-1, chunk_tokens)
    weighed_NCD = context_NCD * weights_NC[..., None]
    for row, weights_C in enumerate(weights_NC):
        # A chunk without weights stays as it is, to the bit.
        if not bool((weights_C == 1).all()):
            weighed_NCD[row] *= _scale(context_NCD[row], weighed_NCD[row])
    return weighed_NCD.reshape(batch, length, width)


def weigh_side_by_side(
    context_BLD: Any, weights: Sequence[Any], widths: Sequence[int], chunk_tokens: int
) -> Any:
    """``weigh_context`` for the contexts of several text encoders, side by side.

    Each encoder has tokens and so weights of its own, and keeps its own mean, as in the web UI.

    Args:
        context_BLD: numpy, the contexts side by side.
        weights: of each encoder's tokens, float32 [B, L].
        widths: of each encoder's part; their sum is D.
        chunk_tokens: as for ``weigh_context``.

    Raises:
        HipaError: as ``weigh_context``.

    """
    import numpy as np  # the module is imported for the help of a command too

    parts = []
    first = 0
    for weights_BL, width in zip(weights, widths, strict=True):
        part_BLD = context_BLD[..., first : first + width]
        parts.append(weigh_context(part_BLD, weights_BL, chunk_tokens))
        first += width
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)


def _scale(context_CD: Any, weighed_CD: Any) -> float:
    """What brings the mean of a chunk back to what it was."""
    before = float(context_CD.mean())
    after = float(weighed_CD.mean())
    negligible = NEGLIGIBLE * float(abs(context_CD).mean())
    if abs(before) <= negligible:
        return 1.0
    if abs(after) <= negligible:
        raise RequestError(
            "the weights of a prompt cancel out. Choose weights nearer to 1.",
            argument="prompt",
            code="invalid_prompt",
        )
    return before / after


def _float32(tensor: Any) -> Any:
    return tensor.float() if hasattr(tensor, "float") else tensor.astype("float32")

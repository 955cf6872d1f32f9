"""From prompts to what the stages start from: token ids, or text contexts that are known.

A bundle has a text encoder, or a closed set of prompts whose contexts the export baked.

Shape suffixes: B prompts of a batch, N prompts of a closed set, L tokens, D width of a context.
"""

from __future__ import annotations

import difflib
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.errors import HipaError
from hipa_deploy.generate.prompt_files import one_line
from hipa_deploy.generate.tokenizer import PromptTokenizer, PromptTooLongError
from hipa_deploy.reading import MIB, Header, read_npy, read_text

BAKED_PROMPTS = "prompts/prompts.txt"
BAKED_CONTEXTS = "prompts/contexts.npy"
CACHED_BATCHES = 64
_MAX_PROMPTS = 256 * MIB

Prepared = Any
"""A prompt that was checked: its token ids int64 [L], or its place in a closed set."""


class PromptSource(Protocol):
    """Where text contexts come from."""

    def prepare(self, prompts: Sequence[str], *, truncate: bool) -> list[Prepared]:
        """Check prompts, before the first image is made.

        Raises:
            HipaError: a prompt that cannot be encoded.

        """

    def feed(self, prompts: list[Prepared]) -> dict[str, np.ndarray]:
        """What the stages start from: 'context' [B, L, D] if it is known, else 'tokens' [B, L]."""

    def keep(self, prompts: list[Prepared], context_BLD: np.ndarray) -> None:
        """Remember the context of a batch."""


def open_prompts(bundle: Bundle) -> PromptSource:
    """The bundle's prompt source: its tokenizer, or the contexts that its export baked."""
    if "text_encoder" not in bundle.stages:
        return BakedPrompts(bundle.path(BAKED_PROMPTS), bundle.path(BAKED_CONTEXTS))
    return EncodedPrompts(PromptTokenizer(bundle.path("tokenizer/tokenizer.json")))


class EncodedPrompts:
    """Any prompt, through the tokenizer.

    The contexts of the last ``CACHED_BATCHES`` batches are remembered, so that a prompt that is
    used again does not run the text encoder again.
    """

    def __init__(self, tokenizer: PromptTokenizer) -> None:
        self._tokenizer = tokenizer
        self._cache: dict[bytes, np.ndarray] = {}  # contexts by their token ids, oldest first
        self._changes_cache = threading.Lock()

    def prepare(self, prompts: Sequence[str], *, truncate: bool) -> list[np.ndarray]:
        """Token ids int64 [L] of each prompt."""
        try:
            return list(self._tokenizer(prompts, truncate=truncate))
        except PromptTooLongError as error:
            remedy = "Shorten it, or pass --truncate (truncate=True)."
            raise PromptTooLongError(error.problem, remedy) from None

    def feed(self, prompts: list[np.ndarray]) -> dict[str, np.ndarray]:
        """The context if this batch was seen lately, else the token ids."""
        tokens_BL = np.stack(prompts)
        known_BLD = self._cache.get(tokens_BL.tobytes())
        return {"tokens": tokens_BL} if known_BLD is None else {"context": known_BLD}

    def keep(self, prompts: list[np.ndarray], context_BLD: np.ndarray) -> None:
        """Remember a batch, and forget the oldest."""
        # Two threads at once would both choose the same oldest entry.
        with self._changes_cache:
            self._cache[np.stack(prompts).tobytes()] = context_BLD
            if len(self._cache) > CACHED_BATCHES:
                oldest = next(iter(self._cache))
                del self._cache[oldest]


def _contexts_problem(found: Header) -> str | None:
    """What is wrong with an array as the contexts [N, L, D] of a closed set."""
    dtype, shape = found
    if len(shape) == 3 and dtype in (np.float16, np.float32):
        return None
    return f"it has {dtype} {list(shape)}, expected float16 or float32 [prompts, tokens, width]"


class BakedPrompts:
    """A closed set of prompts: no tokenizer and no text encoder on the device.

    Args:
        prompts: a text file, one prompt a line.
        contexts: their contexts [N, L, D] in numpy's format, mapped and not read.

    Raises:
        HipaError: the two files do not hold as many.

    """

    def __init__(self, prompts: Path, contexts: Path) -> None:
        baked = read_baked_prompts(prompts)
        self._contexts_NLD = read_npy(contexts, _contexts_problem, mapped=True)
        if len(baked) != len(self._contexts_NLD):
            got = f"{len(baked)} prompts, {len(self._contexts_NLD)} contexts"
            raise HipaError(f"{contexts}: {got}. Export the bundle again.")

        # White space makes no difference to the tokens, so it makes none to the choice.
        self._index: dict[str, int] = {}
        for place, prompt in enumerate(baked):
            self._index.setdefault(one_line(prompt), place)

    def prepare(self, prompts: Sequence[str], *, truncate: bool) -> list[int]:
        """The place of each prompt in the set."""
        wanted = [one_line(prompt) for prompt in prompts]
        for prompt in wanted:
            if prompt not in self._index:
                near = difflib.get_close_matches(prompt, self._index, n=1, cutoff=0.0)[0]
                raise HipaError(
                    f"{prompt!r} is not one of this bundle's {len(self._index)} baked prompts; "
                    f"the nearest is {near!r}. Choose one of them, or export without --prompts."
                )
        return [self._index[prompt] for prompt in wanted]

    def feed(self, prompts: list[int]) -> dict[str, np.ndarray]:
        """Always the context."""
        return {"context": np.ascontiguousarray(self._contexts_NLD[prompts])}

    def keep(self, prompts: list[int], context_BLD: np.ndarray) -> None:
        """Nothing to remember: all contexts are known."""


def read_baked_prompts(path: Path) -> list[str]:
    """The N prompts of a bundle's ``prompts/prompts.txt``, one a line, in the order of contexts.

    This is a file of a bundle. What a user writes is read by ``read_prompt_file``.

    Raises:
        HipaError: the file cannot be read as UTF-8, or has no line.

    """
    lines = read_text(path, max_bytes=_MAX_PROMPTS).splitlines()
    if not lines:
        raise HipaError(f"{path} is empty. Export the bundle again.")
    return lines

"""From prompts to text contexts: the bundle's text encoder, or contexts that the export computed once for all."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from hipa_deploy.bundle.manifest import Bundle
from hipa_deploy.errors import HipaError
from hipa_deploy.generate.tokenizer import PromptTokenizer

BAKED_PROMPTS, BAKED_CONTEXTS = "prompts/prompts.txt", "prompts/contexts.npy"
CACHED_BATCHES = 64

Timer = Callable[[str], AbstractContextManager[object]]


class PromptSource(Protocol):
    """Where text contexts come from. ``prepare`` refuses bad prompts before the first image is made."""

    def prepare(self, prompts: Sequence[str], *, truncate: bool) -> list[Any]:
        """One handle a prompt. Raises HipaError for a prompt that cannot be encoded."""

    def feed(self, handles: list[Any]) -> dict[str, np.ndarray]:
        """What a chain of stages starts from: 'context' [B, L, D] where it is known, else 'tokens' [B, L]."""

    def keep(self, handles: list[Any], context_BLD: np.ndarray) -> None:
        """Remember the context of prepared prompts."""

    def contexts(self, handles: list[Any], timer: Timer) -> np.ndarray:
        """Text context [B, L, D] of prepared prompts."""


def open_prompts(
    bundle: Bundle, run_text_encoder: Callable[[np.ndarray], np.ndarray]
) -> PromptSource:
    """The bundle's prompt source; ``run_text_encoder`` maps token ids int64 [B, L] to contexts [B, L, D]."""
    if "text_encoder" not in bundle.stages:
        return BakedPrompts(bundle.path(BAKED_PROMPTS), bundle.path(BAKED_CONTEXTS))
    return EncodedPrompts(
        PromptTokenizer(bundle.path("tokenizer/tokenizer.json")), run_text_encoder
    )


class EncodedPrompts:
    """Any prompt, through tokenizer and text encoder. The last ``CACHED_BATCHES`` batches are remembered."""

    def __init__(
        self, tokenizer: PromptTokenizer, run_text_encoder: Callable[[np.ndarray], np.ndarray]
    ) -> None:
        self._tokenizer = tokenizer
        self._run = run_text_encoder
        self._cache: dict[bytes, np.ndarray] = {}  # by token ids, oldest first

    def prepare(self, prompts: Sequence[str], *, truncate: bool) -> list[np.ndarray]:
        """Token ids int64 [L] of each prompt."""
        return list(self._tokenizer(prompts, truncate=truncate))

    def feed(self, handles: list[np.ndarray]) -> dict[str, np.ndarray]:
        """The context if this batch was seen lately, else the token ids."""
        tokens_BL = np.stack(handles)
        known_BLD = self._cache.get(tokens_BL.tobytes())
        return {"tokens": tokens_BL} if known_BLD is None else {"context": known_BLD}

    def keep(self, handles: list[np.ndarray], context_BLD: np.ndarray) -> None:
        """Remember a batch, and forget the oldest."""
        self._cache[np.stack(handles).tobytes()] = context_BLD
        if len(self._cache) > CACHED_BATCHES:
            del self._cache[next(iter(self._cache))]

    def contexts(self, handles: list[np.ndarray], timer: Timer) -> np.ndarray:
        """Run the text encoder, unless this batch was seen lately."""
        feed = self.feed(handles)
        if "tokens" in feed:
            with timer("text_encoder"):
                feed["context"] = self._run(feed["tokens"])
            self.keep(handles, feed["context"])
        return feed["context"]


class BakedPrompts:
    """A closed set of prompts, their contexts [N, L, D] mapped from a file: no tokenizer, no text encoder."""

    def __init__(self, prompts: Path, contexts: Path) -> None:
        self._index = {prompt: i for i, prompt in enumerate(read_closed_set(prompts))}
        self._contexts_NLD = np.load(contexts, mmap_mode="r")
        if len(self._index) != len(self._contexts_NLD):
            got = f"{len(self._index)} prompts, {len(self._contexts_NLD)} contexts"
            raise HipaError(f"{contexts}: {got}. Export the bundle again.")

    def prepare(self, prompts: Sequence[str], *, truncate: bool) -> list[int]:
        """The place of each prompt in the set."""
        for prompt in prompts:
            if prompt not in self._index:
                near = difflib.get_close_matches(prompt, self._index, n=1, cutoff=0.0)[0]
                raise HipaError(
                    f"{prompt!r} is not one of this bundle's {len(self._index)} baked prompts; "
                    f"the nearest is {near!r}. Choose one of them, or export without --prompts."
                )
        return [self._index[prompt] for prompt in prompts]

    def feed(self, handles: list[int]) -> dict[str, np.ndarray]:
        """Always the context."""
        return {"context": np.ascontiguousarray(self._contexts_NLD[handles])}

    def keep(self, handles: list[int], context_BLD: np.ndarray) -> None:
        """Nothing: all are known."""

    def contexts(self, handles: list[int], timer: Timer) -> np.ndarray:
        """Look the contexts up."""
        return self.feed(handles)["context"]


def read_closed_set(path: Path) -> list[str]:
    """The prompts of a text file, one a line.

    Raises:
        HipaError: the file cannot be read as UTF-8, has no line, an empty line or a line that repeats another.

    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise HipaError(
            f"prompts {path} cannot be read ({error}). Expected UTF-8 text, one prompt a line."
        ) from None
    if not lines:
        raise HipaError(f"prompts {path} is empty. Expected one prompt a line.")
    first: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise HipaError(f"prompts {path}: line {number} is empty. Expected one prompt a line.")
        if line in first:
            raise HipaError(
                f"prompts {path}: line {number} repeats line {first[line]} ({line!r}). Remove one of them."
            )
        first[line] = number
    return lines

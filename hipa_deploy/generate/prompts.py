"""From prompts to what the stages start from: token ids, or text contexts that are known.

A bundle has a text encoder, or a closed set of prompts whose contexts the export baked.

Shape suffixes: B prompts of a batch, N prompts of a closed set, L tokens, D width of a context.
"""

from __future__ import annotations

import difflib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from hipa_deploy.bundle.arrays import Header, read_npy
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.disk.reading import MIB, read_text
from hipa_deploy.errors import HipaError
from hipa_deploy.generate.prompt_files import one_line
from hipa_deploy.generate.prompt_weights import weigh_context
from hipa_deploy.generate.tokenizer import PromptTokenizer, PromptTooLongError

BAKED_PROMPTS = "prompts/prompts.txt"
BAKED_CONTEXTS = "prompts/contexts.npy"
CACHED_BATCHES = 64
_MAX_PROMPTS = 256 * MIB

Prepared = Any
"""A prompt that was checked: an ``EncodedPrompt``, or its place in a closed set."""
Encode = Callable[[np.ndarray], np.ndarray]
"""The text encoder: tokens [B, L] -> context [B, L, D]."""


class PromptSource(Protocol):
    """Where text contexts come from."""

    def reads_weights(self, asked: bool | None) -> bool:
        """Whether ``(word:1.3)`` is a weight, if a caller asks for that; None: the bundle decides.

        Raises:
            HipaError: a closed set was baked the other way.

        """

    def prepare(
        self, prompts: Sequence[str], *, truncate: bool, weights: bool = False
    ) -> list[Prepared]:
        """Check prompts, before the first image is made.

        Args:
            prompts: the prompts.
            truncate: cut those that are too long.
            weights: what ``reads_weights`` gave.

        Raises:
            HipaError: a prompt that cannot be encoded.

        """

    def feed(self, prompts: list[Prepared], encode: Encode) -> dict[str, np.ndarray]:
        """What the stages start from: 'context' [B, L, D] if it is known, else 'tokens' [B, L].

        Args:
            prompts: the prompts of a batch.
            encode: the text encoder, for prompts with weights, whose context is changed before the
                other stages see it.

        """

    def keep(self, prompts: list[Prepared], context_BLD: np.ndarray) -> None:
        """Remember the context of a batch."""

    def forget(self) -> None:
        """Forget all contexts that were kept: the text encoder is another now."""


def open_prompts(bundle: Bundle) -> PromptSource:
    """The bundle's prompt source: its tokenizer, or the contexts that its export baked."""
    if "text_encoder" not in bundle.stages:
        return BakedPrompts(
            bundle.path(BAKED_PROMPTS),
            bundle.path(BAKED_CONTEXTS),
            weights=bundle.manifest.text.prompt_weights,
        )
    # The graph has the length in its shapes, also in bundles whose manifest says nothing of it.
    context_tokens = bundle.stages["text_encoder"].spec.inputs[0].shape[-1]
    assert isinstance(context_tokens, int)  # no export makes it an axis
    path = bundle.path("tokenizer/tokenizer.json")
    tokenizer = PromptTokenizer(path, context_tokens)
    return EncodedPrompts(tokenizer, weights=bundle.manifest.text.prompt_weights)


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as tokens.

    Attributes:
        tokens_L: int64.
        weights_L: float32; None where every token weighs 1.

    """

    tokens_L: np.ndarray
    weights_L: np.ndarray | None = None


class EncodedPrompts:
    """Any prompt, through the tokenizer.

    The contexts of the last ``CACHED_BATCHES`` batches are remembered, so that a prompt that is
    used again does not run the text encoder again. Weights are applied to what is remembered.

    Args:
        tokenizer: the bundle's.
        weights: whether the bundle reads ``(word:1.3)`` as a weight, unless a caller decides.

    """

    def __init__(self, tokenizer: PromptTokenizer, *, weights: bool = False) -> None:
        self._tokenizer = tokenizer
        self._weights = weights
        self._cache: dict[bytes, np.ndarray] = {}  # contexts by their token ids, oldest first
        self._changes_cache = threading.Lock()

    def reads_weights(self, asked: bool | None) -> bool:
        """As the caller asks, or as the bundle says."""
        return self._weights if asked is None else asked

    def prepare(
        self, prompts: Sequence[str], *, truncate: bool, weights: bool = False
    ) -> list[EncodedPrompt]:
        """Tokens and weights of each prompt."""
        try:
            if not weights:
                tokens_BL = self._tokenizer(prompts, truncate=truncate)
                return [EncodedPrompt(tokens_L) for tokens_L in tokens_BL]
            prepared = []
            for row in zip(*self._tokenizer.weighted(prompts, truncate=truncate), strict=True):
                tokens_L, weights_L = row
                all_one = bool((weights_L == 1).all())
                prepared.append(EncodedPrompt(tokens_L, None if all_one else weights_L))
            return prepared
        except PromptTooLongError as error:
            remedy = "Shorten it, or pass --truncate (truncate=True)"
            if error.context_tokens:
                remedy += f", or export the bundle with --context-tokens {error.context_tokens}"
            raise PromptTooLongError(error.problem, f"{remedy}.") from None

    def feed(self, prompts: list[EncodedPrompt], encode: Encode) -> dict[str, np.ndarray]:
        """The context if this batch was seen lately or has weights, else the token ids."""
        tokens_BL = _tokens(prompts)
        context_BLD = self._cache.get(tokens_BL.tobytes())
        if all(prompt.weights_L is None for prompt in prompts):
            return {"tokens": tokens_BL} if context_BLD is None else {"context": context_BLD}

        if context_BLD is None:
            context_BLD = encode(tokens_BL)
            self.keep(prompts, context_BLD)
        weights = []
        for prompt in prompts:
            ones_L = np.ones(len(prompt.tokens_L), np.float32)
            weights.append(ones_L if prompt.weights_L is None else prompt.weights_L)
        weighed_BLD = weigh_context(context_BLD, np.stack(weights), self._tokenizer.chunk)
        return {"context": weighed_BLD.astype(context_BLD.dtype)}

    def keep(self, prompts: list[EncodedPrompt], context_BLD: np.ndarray) -> None:
        """Remember the context of a batch as it is without weights, and forget the oldest."""
        # Two threads at once would both choose the same oldest entry.
        with self._changes_cache:
            self._cache[_tokens(prompts).tobytes()] = context_BLD
            if len(self._cache) > CACHED_BATCHES:
                oldest = next(iter(self._cache))
                del self._cache[oldest]

    def forget(self) -> None:
        """Forget all batches."""
        with self._changes_cache:
            self._cache.clear()


def _tokens(prompts: Sequence[EncodedPrompt]) -> np.ndarray:
    """Token ids int64 [B, L] of a batch."""
    return np.stack([prompt.tokens_L for prompt in prompts])


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
        weights: whether ``(word:1.3)`` was a weight when they were baked.

    Raises:
        HipaError: the two files do not hold as many.

    """

    def __init__(self, prompts: Path, contexts: Path, *, weights: bool = False) -> None:
        self._weights = weights
        baked = read_baked_prompts(prompts)
        self._contexts_NLD = read_npy(contexts, _contexts_problem, mapped=True)
        if len(baked) != len(self._contexts_NLD):
            got = f"{len(baked)} prompts, {len(self._contexts_NLD)} contexts"
            raise HipaError(f"{contexts}: {got}. Export the bundle again.")

        # White space makes no difference to the tokens, so it makes none to the choice.
        self._index: dict[str, int] = {}
        for place, prompt in enumerate(baked):
            self._index.setdefault(one_line(prompt), place)

    def reads_weights(self, asked: bool | None) -> bool:
        """As they were baked."""
        if asked is not None and asked != self._weights:
            how = "with" if self._weights else "without"
            raise HipaError(
                f"this bundle's prompts were baked {how} prompt weights. "
                "Leave out that option, or export the bundle again."
            )
        return self._weights

    def prepare(
        self, prompts: Sequence[str], *, truncate: bool, weights: bool = False
    ) -> list[int]:
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

    def feed(self, prompts: list[int], encode: Encode) -> dict[str, np.ndarray]:
        """Always the context."""
        return {"context": np.ascontiguousarray(self._contexts_NLD[prompts])}

    def keep(self, prompts: list[int], context_BLD: np.ndarray) -> None:
        """Nothing to remember: all contexts are known."""

    def forget(self) -> None:
        """Nothing to forget: these contexts are the bundle's own."""


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

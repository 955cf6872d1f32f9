"""From prompts to what the stages start from: token ids, or text contexts that are known.

A bundle has a text encoder, or a closed set of prompts whose contexts the export baked.

Shape suffixes: B prompts of a batch, N prompts of a closed set, L tokens, D width of a context.
"""

from __future__ import annotations

import difflib
import threading
from collections import OrderedDict
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
CACHED_PROMPTS = 256  # 30 MB of Stable Diffusion 1.5's contexts
_SAMPLES = ("a photo of a red apple", "a drawing of a house by the sea")
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
        """Remember the contexts that a run of the stages made from the tokens of ``feed``."""

    def forget(self) -> None:
        """Forget all contexts that were kept: the text encoder is another now."""

    def samples(self) -> tuple[str, ...]:
        """One prompt or two that this source takes, to try the stages with."""


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

    The contexts of the ``CACHED_PROMPTS`` prompts that were used last are remembered, so that a
    prompt that is used again does not run the text encoder again. Weights are applied to what is
    remembered.

    The text encoder sees one prompt at a time. On ONNX Runtime's CPU kernels a prompt of 77 tokens
    gets another last digit at an odd place of a batch than at an even one (seen with 1.32), and an
    image must not depend on the others of its batch.

    Args:
        tokenizer: the bundle's.
        weights: whether the bundle reads ``(word:1.3)`` as a weight, unless a caller decides.

    """

    def __init__(self, tokenizer: PromptTokenizer, *, weights: bool = False) -> None:
        self._tokenizer = tokenizer
        self._weights = weights
        # Contexts [L, D] by their token ids; the one that was used last stands last.
        self._cache: OrderedDict[bytes, np.ndarray] = OrderedDict()
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
        """The contexts; the token ids of one prompt that is neither known nor weighed."""
        if len(prompts) == 1 and prompts[0].weights_L is None:
            # All stages in one run, where the text encoder is the first of them.
            known_LD = self._known(prompts[0])
            if known_LD is None:
                return {"tokens": prompts[0].tokens_L[None]}
            return {"context": known_LD[None]}
        return {"context": np.stack([self._context(prompt, encode) for prompt in prompts])}

    def _context(self, prompt: EncodedPrompt, encode: Encode) -> np.ndarray:
        """The context [L, D] of a prompt, with its weights."""
        context_LD = self._known(prompt)
        if context_LD is None:
            context_BLD = encode(prompt.tokens_L[None])
            self.keep([prompt], context_BLD)
            context_LD = context_BLD[0]
        if prompt.weights_L is None:
            return context_LD
        weighed_BLD = weigh_context(context_LD[None], prompt.weights_L[None], self._tokenizer.chunk)
        return weighed_BLD[0].astype(context_LD.dtype)

    def _known(self, prompt: EncodedPrompt) -> np.ndarray | None:
        """The context [L, D] without weights, if the prompt was used lately."""
        key = prompt.tokens_L.tobytes()
        with self._changes_cache:
            context_LD = self._cache.get(key)
            if context_LD is not None:
                self._cache.move_to_end(key)
            return context_LD

    def keep(self, prompts: list[EncodedPrompt], context_BLD: np.ndarray) -> None:
        """Remember the context of one prompt as it is without weights, and forget the oldest."""
        # Two threads at once would both choose the same oldest entry.
        with self._changes_cache:
            # A copy: the row of a batch would keep the whole batch in memory.
            self._cache[prompts[0].tokens_L.tobytes()] = context_BLD[0].copy()
            if len(self._cache) > CACHED_PROMPTS:
                self._cache.popitem(last=False)

    def forget(self) -> None:
        """Forget all prompts."""
        with self._changes_cache:
            self._cache.clear()

    def samples(self) -> tuple[str, ...]:
        """Two prompts, each of a few tokens."""
        return _SAMPLES


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

    def samples(self) -> tuple[str, ...]:
        """The first prompts of the set."""
        return tuple(self._index)[:2]


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

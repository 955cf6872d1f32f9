"""From prompts to what the stages start from: token ids, or text contexts that are known.

A bundle has a text encoder, or a closed set of prompts whose contexts the export baked.

Shape suffixes: B prompts of a batch, N prompts of a closed set, L tokens, D width of a context.
"""

from __future__ import annotations

import difflib
import heapq
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from hipa_deploy.bundle.arrays import Header, read_npy
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.disk.reading import MIB, read_text
from hipa_deploy.errors import HipaError, RequestError, brief
from hipa_deploy.generate.prompt_files import one_line
from hipa_deploy.generate.prompt_weights import weigh_side_by_side
from hipa_deploy.generate.tokenizer import PromptTokenizer, PromptTooLongError
from hipa_deploy.tasks import size_numbers

BAKED_PROMPTS = "prompts/prompts.txt"
BAKED_CONTEXTS = "prompts/contexts.npy"
BAKED_CONDITIONING = "prompts/conditioning.npy"  # of a bundle of SDXL
BAKED_POOLED = "prompts/pooled.npy"  # of one that refines
TOKENIZER = "tokenizer/tokenizer.json"
TOKENIZER_2 = "tokenizer_2/tokenizer.json"  # of a bundle of SDXL
CACHED_PROMPTS = 256  # 30 MB of Stable Diffusion 1.5's contexts, 88 MB of SDXL's
_SAMPLES = ("a photo of a red apple", "a drawing of a house by the sea")
_MAX_PROMPTS = 256 * MIB
_COMPARED = 500  # prompts of a closed set, to find the nearest

Prepared = Any
"""A prompt that was checked: an ``EncodedPrompt``, or its place in a closed set."""
TextTensors = dict[str, np.ndarray]
"""'tokens' [B, L] and what the text stage makes of them, 'context' [B, L, D].

In a bundle of SDXL also 'tokens_2' [B, L] and 'conditioning' [B, S, K], and with images of several
sizes 'sizes' [B, 6]. In one that refines also the pooled vector, 'pooled' [B, P].
"""
Encode = Callable[[TextTensors], TextTensors]
"""The text stage: tokens -> contexts."""


class PromptSource(Protocol):
    """Where text contexts come from."""

    def reads_weights(self, asked: bool | None) -> bool:
        """Whether ``(word:1.3)`` is a weight, if a caller asks for that; None: the bundle decides.

        Raises:
            HipaError: a closed set was baked the other way.

        """

    def prepare(
        self,
        prompts: Sequence[str],
        *,
        truncate: bool,
        weights: bool = False,
        size: tuple[int, int] | None = None,
    ) -> list[Prepared]:
        """Check prompts, before the first image is made.

        Args:
            prompts: the prompts.
            truncate: cut those that are too long.
            weights: what ``reads_weights`` gave.
            size: height and width of the images in pixels, of which some bundles of SDXL are told.

        Raises:
            HipaError: a prompt that cannot be encoded.

        """

    def feed(self, prompts: list[Prepared], encode: Encode) -> TextTensors:
        """What the stages start from: 'context' [B, L, D] if it is known, else 'tokens' [B, L].

        In a bundle of SDXL 'conditioning' is beside 'context', and 'tokens_2' beside 'tokens'.

        Args:
            prompts: the prompts of a batch.
            encode: the text encoder, for prompts with weights, whose context is changed before the
                other stages see it.

        """

    def keep(self, prompts: list[Prepared], made: TextTensors) -> None:
        """Remember what a run of the stages made from the tokens of ``feed``."""

    def forget(self) -> None:
        """Forget all contexts that were kept: the text encoder is another now."""

    def samples(self) -> tuple[str, ...]:
        """One prompt or two that this source takes, to try the stages with."""


def open_prompts(bundle: Bundle) -> PromptSource:
    """The bundle's prompt source: its tokenizer, or the contexts that its export baked."""
    if "text_encoder" not in bundle.stages:
        more = {}
        if bundle.manifest.text_widths:
            more["conditioning"] = bundle.path(BAKED_CONDITIONING)
            if bundle.manifest.refine is not None:
                more["pooled"] = bundle.path(BAKED_POOLED)
        return BakedPrompts(
            bundle.path(BAKED_PROMPTS),
            bundle.path(BAKED_CONTEXTS),
            more,
            weights=bundle.manifest.text.prompt_weights,
        )
    # The graph has the length in its shapes, also in bundles whose manifest says nothing of it.
    context_tokens = bundle.stages["text_encoder"].spec.inputs[0].shape[-1]
    assert isinstance(context_tokens, int)  # no export makes it an axis
    tokenizer = PromptTokenizer(bundle.path(TOKENIZER), context_tokens)
    second = None
    widths = bundle.manifest.text_widths
    if widths:
        second = PromptTokenizer(bundle.path(TOKENIZER_2), context_tokens)
    weights = bundle.manifest.text.prompt_weights
    names = [tensor.name for tensor in bundle.stages["text_encoder"].spec.inputs]
    return EncodedPrompts(tokenizer, second, widths, weights=weights, sized="sizes" in names)


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as tokens.

    Attributes:
        tokens_L: int64.
        weights_L: float32; None where every token weighs 1.
        second: the same prompt as the second tokenizer of a bundle of SDXL reads it.
        sizes_6: int64; the numbers of the size, where the text stage is told it.

    """

    tokens_L: np.ndarray
    weights_L: np.ndarray | None = None
    second: EncodedPrompt | None = None
    sizes_6: np.ndarray | None = None

    @property
    def parts(self) -> tuple[EncodedPrompt, ...]:
        """The prompt for each text encoder."""
        return (self,) if self.second is None else (self, self.second)

    @property
    def is_weighed(self) -> bool:
        """Whether a token has a weight other than 1."""
        return any(part.weights_L is not None for part in self.parts)

    def tensors(self) -> TextTensors:
        """The tokens as the text stage takes them, of one prompt."""
        tensors = {"tokens": self.tokens_L[None]}
        if self.second is not None:
            tensors["tokens_2"] = self.second.tokens_L[None]
        if self.sizes_6 is not None:
            tensors["sizes"] = self.sizes_6[None]
        return tensors


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
        second: the second tokenizer of a bundle of SDXL.
        widths: of each text encoder's part of the context; empty for one.
        weights: whether the bundle reads ``(word:1.3)`` as a weight, unless a caller decides.
        sized: whether the text stage is told the size of the images.

    """

    def __init__(
        self,
        tokenizer: PromptTokenizer,
        second: PromptTokenizer | None = None,
        widths: Sequence[int] = (),
        *,
        weights: bool = False,
        sized: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._second = second
        self._widths = widths
        self._weights = weights
        self._sized = sized
        # Tensors of one prompt, [1, …], by its token ids; the one that was used last stands last.
        self._cache: OrderedDict[bytes, TextTensors] = OrderedDict()
        self._changes_cache = threading.Lock()

    def reads_weights(self, asked: bool | None) -> bool:
        """As the caller asks, or as the bundle says."""
        return self._weights if asked is None else asked

    def prepare(
        self,
        prompts: Sequence[str],
        *,
        truncate: bool,
        weights: bool = False,
        size: tuple[int, int] | None = None,
    ) -> list[EncodedPrompt]:
        """Tokens and weights of each prompt, and the size where the text stage is told it."""
        sizes_6 = None
        if self._sized:
            assert size is not None
            sizes_6 = np.asarray(size_numbers(*size), np.int64)
        try:
            first = _encoded(self._tokenizer, prompts, truncate=truncate, weights=weights)
            if self._second is None:
                return first
            second = _encoded(self._second, prompts, truncate=truncate, weights=weights)
            pairs = zip(first, second, strict=True)
            return [replace(one, second=two, sizes_6=sizes_6) for one, two in pairs]
        except PromptTooLongError as error:
            remedy = "Shorten it, or pass --truncate (truncate=True)"
            if error.context_tokens:
                remedy += f", or export the bundle with --context-tokens {error.context_tokens}"
            raise PromptTooLongError(error.problem, f"{remedy}.", error.context_tokens) from None

    def feed(self, prompts: list[EncodedPrompt], encode: Encode) -> TextTensors:
        """The contexts; the token ids of one prompt that is neither known nor weighed."""
        if len(prompts) == 1 and not prompts[0].is_weighed:
            # All stages in one run, where the text encoder is the first of them.
            known = self._known(prompts[0])
            return dict(known) if known is not None else prompts[0].tensors()
        rows = [self._text(prompt, encode) for prompt in prompts]
        return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}

    def _text(self, prompt: EncodedPrompt, encode: Encode) -> TextTensors:
        """What the text stage gives for one prompt, with its weights."""
        known = self._known(prompt)
        if known is None:
            known = encode(prompt.tensors())
            self.keep([prompt], known)
        if not prompt.is_weighed:
            return known
        context_1LD = known["context"]
        weights = []
        for part in prompt.parts:
            ones_L = np.ones(len(part.tokens_L), np.float32)
            weights.append((ones_L if part.weights_L is None else part.weights_L)[None])
        widths = self._widths or (context_1LD.shape[-1],)
        weighed_1LD = weigh_side_by_side(context_1LD, weights, widths, self._tokenizer.chunk)
        return {**known, "context": weighed_1LD.astype(context_1LD.dtype)}

    def _known(self, prompt: EncodedPrompt) -> TextTensors | None:
        """What the text stage gave for a prompt without weights, if it was used lately."""
        key = _key(prompt)
        with self._changes_cache:
            known = self._cache.get(key)
            if known is not None:
                self._cache.move_to_end(key)
            return known

    def keep(self, prompts: list[EncodedPrompt], made: TextTensors) -> None:
        """Remember one prompt's tensors as they are without weights, and forget the oldest."""
        # Copies: the row of a batch would keep the whole batch in memory.
        rows = {name: value[:1].copy() for name, value in made.items()}
        # Two threads at once would both choose the same oldest entry.
        with self._changes_cache:
            self._cache[_key(prompts[0])] = rows
            if len(self._cache) > CACHED_PROMPTS:
                self._cache.popitem(last=False)

    def forget(self) -> None:
        """Forget all prompts."""
        with self._changes_cache:
            self._cache.clear()

    def samples(self) -> tuple[str, ...]:
        """Two prompts, each of a few tokens."""
        return _SAMPLES


def _key(prompt: EncodedPrompt) -> bytes:
    """What tells a prompt from others: its tokens, for every text encoder, and the size."""
    tokens = b"".join(part.tokens_L.tobytes() for part in prompt.parts)
    return tokens if prompt.sizes_6 is None else tokens + prompt.sizes_6.tobytes()


def _encoded(
    tokenizer: PromptTokenizer, prompts: Sequence[str], *, truncate: bool, weights: bool
) -> list[EncodedPrompt]:
    """Tokens and weights of each prompt, as one tokenizer reads them."""
    if not weights:
        return [EncodedPrompt(tokens_L) for tokens_L in tokenizer(prompts, truncate=truncate)]
    prepared = []
    for tokens_L, weights_L in zip(*tokenizer.weighted(prompts, truncate=truncate), strict=True):
        all_one = bool((weights_L == 1).all())
        prepared.append(EncodedPrompt(tokens_L, None if all_one else weights_L))
    return prepared


def _contexts_problem(found: Header) -> str | None:
    """What is wrong with an array as the contexts [N, L, D] of a closed set."""
    dtype, shape = found
    if len(shape) == 3 and dtype in (np.float16, np.float32):
        return None
    return f"it has {dtype} {list(shape)}, expected float16 or float32 [prompts, tokens, width]"


def _pooled_problem(found: Header) -> str | None:
    """What is wrong with an array as the pooled vectors [N, P] of a closed set."""
    dtype, shape = found
    if len(shape) == 2 and dtype in (np.float16, np.float32):
        return None
    return f"it has {dtype} {list(shape)}, expected float16 or float32 [prompts, width]"


class BakedPrompts:
    """A closed set of prompts: no tokenizer and no text encoder on the device.

    Args:
        prompts: a text file, one prompt a line.
        contexts: their contexts [N, L, D] in numpy's format, mapped and not read.
        more: of a bundle of SDXL, files of the same format: by name, what else its stages take of
            each prompt.
        weights: whether ``(word:1.3)`` was a weight when they were baked.

    Raises:
        HipaError: the files do not hold as many.

    """

    def __init__(
        self,
        prompts: Path,
        contexts: Path,
        more: Mapping[str, Path] = {},
        *,
        weights: bool = False,
    ) -> None:
        self._weights = weights
        baked = read_baked_prompts(prompts)
        files = {"context": contexts, **more}
        self._baked: TextTensors = {}
        for name, path in files.items():
            fits = _pooled_problem if name == "pooled" else _contexts_problem
            self._baked[name] = read_npy(path, fits, mapped=True)
            if len(baked) != len(self._baked[name]):
                got = f"{len(baked)} prompts, {len(self._baked[name])} contexts"
                raise HipaError(f"{path}: {got}. Export the bundle again.")

        # White space makes no difference to the tokens, so it makes none to the choice.
        self._index: dict[str, int] = {}
        for place, prompt in enumerate(baked):
            self._index.setdefault(one_line(prompt), place)

    def reads_weights(self, asked: bool | None) -> bool:
        """As they were baked."""
        if asked is not None and asked != self._weights:
            how = "with" if self._weights else "without"
            raise RequestError(
                f"this bundle's prompts were baked {how} prompt weights. "
                "Leave out that option, or export the bundle again.",
                argument="prompt_weights",
                told=f"prompt_weights: this model knows its prompts {how} weights. "
                f"Expected {'true' if self._weights else 'false'}, or nothing.",
                owner=f"export it {'without' if self._weights else 'with'} prompt weights",
            )
        return self._weights

    def prepare(
        self,
        prompts: Sequence[str],
        *,
        truncate: bool,
        weights: bool = False,
        size: tuple[int, int] | None = None,
    ) -> list[int]:
        """The place of each prompt in the set."""
        wanted = [one_line(prompt) for prompt in prompts]
        for prompt in wanted:
            if prompt not in self._index:
                nearest = self._nearest(prompt)
                raise RequestError(
                    f"{prompt!r} is not one of this bundle's {len(self._index)} baked prompts; the "
                    f"nearest is {nearest!r}. Choose one of them, or export without --prompts.",
                    argument="prompt",
                    code="prompt_not_in_set",
                    told=f"{brief(prompt)} is not one of the {len(self._index)} prompts that this "
                    f"model knows; the nearest is {brief(nearest)}. Choose one of them.",
                    owner="export it for every prompt",
                )
        return [self._index[prompt] for prompt in wanted]

    def _nearest(self, prompt: str) -> str:
        """The prompt of the set that is spelled most like another one."""
        # A comparison takes 0.3 ms. Of a large set only those are compared that share most words.
        words = set(prompt.split())
        likely = heapq.nlargest(
            _COMPARED, self._index, lambda known: len(words.intersection(known.split()))
        )
        return difflib.get_close_matches(prompt, likely, n=1, cutoff=0.0)[0]

    def feed(self, prompts: list[int], encode: Encode) -> TextTensors:
        """Always the context."""
        return {name: np.ascontiguousarray(rows[prompts]) for name, rows in self._baked.items()}

    def keep(self, prompts: list[int], made: TextTensors) -> None:
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

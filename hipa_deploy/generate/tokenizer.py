"""Prompts to token ids, with the Rust tokenizers library alone.

CLIP reads 77 tokens at once: a start token, 75 of the prompt, an end token. A longer context has
several such chunks. The prompt's tokens are cut after every 75th, wherever that falls, as compel
and diffusers' pipelines for long prompts do; each chunk is padded like a prompt of its own, and
chunks that are left over are empty prompts.

Shape suffixes: B prompts, C tokens of a chunk (77 for CLIP), L = C * chunks tokens of a context.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from hipa_deploy.bundle.text_settings import MAX_CHUNKS, TextSettings
from hipa_deploy.bundle.tokenizer_file import MAX_TOKENIZER, tokenizer_problem
from hipa_deploy.disk.reading import read_text
from hipa_deploy.errors import HipaError, RequestError, as_line, brief
from hipa_deploy.generate.prompt_weights import parse_weights

AT_ONCE = 1000  # prompts that are counted at once; a million would take much memory
REMEMBERED_PROMPTS = 256  # whose tokens are kept, as many as contexts


class PromptTooLongError(RequestError):
    """A prompt has more tokens than the model reads.

    Args:
        problem: what was found and what would be lost.
        remedy: what to do about it, for the command line and the Python API.
        context_tokens: a length of context that the prompt would fit in; None if there is none.

    Attributes:
        problem: without a remedy: a caller that has more options than to shorten the prompt, or
            that knows where the prompt comes from, words an error of its own.

    """

    def __init__(
        self, problem: str, remedy: str = "Shorten it.", context_tokens: int | None = None
    ) -> None:
        owner = f"export it to read {context_tokens} tokens" if context_tokens else None
        super().__init__(
            f"{problem} {remedy}",
            argument="prompt",
            code="context_length_exceeded",
            told=f"{problem} Shorten it.",
            owner=owner,
        )
        self.problem = problem
        self.context_tokens = context_tokens


_QUOTED = 300  # characters of what would be cut, in a message
_FEWEST_TOKENS = 3  # the start, the end and one of the prompt


# A command opens a bundle's tokenizers twice: to check its prompts, and then with the stages. Each
# takes a fifth of a second. SDXL has two.
@lru_cache(maxsize=2)
def _read(text: str, path: str) -> tuple[Tokenizer, dict[str, Any] | None, dict[str, Any] | None]:
    """The library's tokenizer without truncation and padding, and what the file says of the two.

    Whoever gets the tokenizer must not change it: others have the same.

    Raises:
        HipaError: ``text`` is no tokenizer.

    """
    problem = tokenizer_problem(text)
    if problem:
        raise HipaError(f"{path} is not a tokenizer ({problem}). Export the bundle again.")
    with as_line(f"{path} is not a tokenizer", "Export the bundle again."):
        tokenizer = Tokenizer.from_str(text)
    truncation = tokenizer.truncation
    padding = tokenizer.padding
    # The library would cut in silence. Here a prompt that is too long is an error by default.
    # Padding is added chunk by chunk.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer, truncation, padding


class PromptTokenizer:
    """CLIP's tokenizer, from a bundle's ``tokenizer.json``.

    The file holds the vocabulary, the special tokens, the padding and the length of a chunk, so
    nothing of them is known here.

    Args:
        path: the file.
        context_tokens: L; None is the length in the file: one chunk.

    Attributes:
        chunk: C, the tokens that the text encoder reads at once.
        length: L, the tokens of a context.

    Raises:
        HipaError: the file cannot be read, is no tokenizer, or says nothing of length and padding;
            or ``context_tokens`` is not one, two or three chunks.

    Example:
        >>> tokenizer = PromptTokenizer(Path("bundle/tokenizer/tokenizer.json"))
        >>> tokenizer(["a photo of a cat"]).shape
        (1, 77)

    """

    def __init__(self, path: Path, context_tokens: int | None = None) -> None:
        text = read_text(path, max_bytes=MAX_TOKENIZER)
        self._open(text, str(path), context_tokens)

    @classmethod
    def of(cls, text: str, name: str, context_tokens: int | None = None) -> PromptTokenizer:
        """The tokenizer whose ``tokenizer.json`` has the content ``text``.

        Args:
            text: JSON, with length and padding.
            name: what an error calls it.
            context_tokens: as for the constructor.

        Raises:
            HipaError: as the constructor does.

        """
        tokenizer = cls.__new__(cls)
        tokenizer._open(text, name, context_tokens)
        return tokenizer

    def _open(self, text: str, path: str, context_tokens: int | None) -> None:
        self._tokenizer, truncation, padding = _read(text, path)
        if not padding or not truncation:
            raise HipaError(f"{path} says nothing of length and padding. Export the bundle again.")
        self.chunk: int = truncation["max_length"]
        if self.chunk < _FEWEST_TOKENS or padding["length"] != self.chunk:
            raise HipaError(
                f"{path} reads {self.chunk} tokens and pads to {padding['length']}. "
                "Expected one length. Export the bundle again."
            )
        self._chunks = TextSettings(context_tokens=context_tokens).chunks(self.chunk)
        self.length = self.chunk * self._chunks
        self._pad: int = padding["pad_id"]
        # Between two images the processor's caches hold the networks' weights. The library's own
        # tables come back from memory then, for a prompt that has been asked for before.
        self._remembered = lru_cache(REMEMBERED_PROMPTS)(self._encode)
        self._remembered_weighted = lru_cache(REMEMBERED_PROMPTS)(self._encode_weighted)

        around = self._tokenized("", special=True).ids
        if len(around) != 2:
            raise HipaError(
                f"{path} puts {len(around)} special tokens around a prompt. Expected 2, a start "
                "and an end, as CLIP has them. Export the bundle again."
            )
        self._start, self._end = around

    def __call__(self, prompts: Sequence[str], *, truncate: bool = False) -> np.ndarray:
        """Token ids int64 [B, L], every chunk padded to the model's length.

        Args:
            prompts: B prompts.
            truncate: cut a prompt that is too long, and keep the end token.

        Raises:
            HipaError: text that is not valid Unicode.
            PromptTooLongError: a prompt that is too long while ``truncate`` is false; the message
                quotes what would be cut.

        """
        return np.stack([self._remembered(prompt, truncate) for prompt in prompts])

    def count_too_long(self, prompts: Sequence[str]) -> int:
        """How many prompts have more tokens than fit; brackets count as text."""
        too_long = 0
        for start in range(0, len(prompts), AT_ONCE):
            batch = list(prompts[start : start + AT_ONCE])
            for encoding in self._tokenizer.encode_batch(batch, add_special_tokens=False):
                too_long += len(encoding.ids) > self._room
        return too_long

    def weighted(
        self, prompts: Sequence[str], *, truncate: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Token ids int64 [B, L] and the weight of each, float32 [B, L], of ``(word:1.3)``.

        The pieces between brackets become tokens one by one, as in the web UI. Start, end and
        padding weigh 1.

        Args:
            prompts: B prompts, in the syntax of ``hipa_deploy.generate.prompt_weights``.
            truncate: as in a call.

        Raises:
            HipaError: as a call does; or a weight that is no number.

        Example:
            >>> tokens, weights = tokenizer.weighted(["a (red:1.3) apple"])
            >>> weights[0, :5]
            array([1. , 1. , 1.3, 1. , 1. ], dtype=float32)

        """
        tokens = []
        weights = []
        for prompt in prompts:
            tokens_L, weights_L = self._remembered_weighted(prompt, truncate)
            tokens.append(tokens_L)
            weights.append(weights_L)
        return np.stack(tokens), np.stack(weights)

    def _encode_weighted(self, prompt: str, truncate: bool) -> tuple[np.ndarray, np.ndarray]:
        _check_text(prompt)
        ids: list[int] = []
        weights: list[float] = []
        places: list[int] = []  # of each token's text in ``read``
        read = ""
        for text, weight in parse_weights(prompt):
            encoding = self._tokenized(text)
            ids += encoding.ids
            weights += [weight] * len(encoding.ids)
            places += [len(read) + offset[0] for offset in encoding.offsets]
            read += text
        self._check_length(read, places, truncate)
        tokens_L = self._in_chunks(ids[: self._room], self._pad, (self._start, self._end))
        weights_L = self._in_chunks(weights[: self._room], 1.0, (1.0, 1.0))
        return tokens_L.astype(np.int64), weights_L.astype(np.float32)

    def _encode(self, prompt: str, truncate: bool) -> np.ndarray:
        _check_text(prompt)
        encoding = self._tokenized(prompt)
        self._check_length(prompt, [offset[0] for offset in encoding.offsets], truncate)
        tokens_L = self._in_chunks(encoding.ids[: self._room], self._pad, (self._start, self._end))
        return tokens_L.astype(np.int64)

    def _tokenized(self, text: str, *, special: bool = False) -> Any:
        """The library's encoding of ``text``, with start and end where ``special``.

        Raises:
            HipaError: the library fails on it.

        """
        unreadable = partial(RequestError, argument="prompt", code="invalid_prompt")
        problem = "the tokenizer of the bundle cannot read the prompt"
        with as_line(problem, "Choose another.", unreadable):
            return self._tokenizer.encode(text, add_special_tokens=special)

    @property
    def _room(self) -> int:
        """Tokens of a prompt that fit."""
        return (self.chunk - 2) * self._chunks

    def _check_length(self, text: str, places: Sequence[int], truncate: bool) -> None:
        """Raise PromptTooLongError unless the tokens fit, which begin at ``places`` of ``text``."""
        if truncate or len(places) <= self._room:
            return
        found = len(places) + 2 * self._chunks
        problem = (
            f"the prompt has {found} tokens, the model reads {self.length}: "
            f"{brief(text[places[self._room] :].strip(), _QUOTED)} would be cut."
        )
        chunks = -(-len(places) // (self.chunk - 2))  # rounded up
        enough = chunks * self.chunk if chunks <= MAX_CHUNKS else None
        raise PromptTooLongError(problem, context_tokens=enough)

    def _in_chunks(
        self, values: Sequence[float], padding: float, around: tuple[float, float]
    ) -> np.ndarray:
        """The values of a prompt's tokens in chunks [L], each between two values and padded."""
        inside = self.chunk - 2
        chunks: list[float] = []
        for number in range(self._chunks):
            part = values[number * inside : (number + 1) * inside]
            missing = inside - len(part)
            chunks += [around[0], *part, around[1], *[padding] * missing]
        return np.asarray(chunks)


def _check_text(prompt: str) -> None:
    # Python turns bytes of the command line that are not UTF-8 into lone surrogates.
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise RequestError(
            f"the prompt {prompt!r} is not valid text. Expected UTF-8.",
            argument="prompt",
            code="invalid_prompt",
        )

"""Prompts to token ids, with the Rust tokenizers library alone.

Shape suffixes: B prompts, L tokens a prompt (77 for CLIP).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from hipa_deploy.bundle.tokenizer_file import MAX_TOKENIZER, tokenizer_problem
from hipa_deploy.errors import HipaError
from hipa_deploy.reading import as_line, read_text


class PromptTooLongError(HipaError):
    """A prompt has more tokens than the model reads.

    Args:
        problem: what was found and what would be lost.
        remedy: what to do about it.

    Attributes:
        problem: without a remedy: a caller that has more options than to shorten the prompt, or
            that knows where the prompt comes from, words an error of its own.

    """

    def __init__(self, problem: str, remedy: str = "Shorten it.") -> None:
        super().__init__(f"{problem} {remedy}")
        self.problem = problem


_FEWEST_TOKENS = 3  # the start, the end and one of the prompt


class PromptTokenizer:
    """CLIP's tokenizer, from a bundle's ``tokenizer.json``.

    The file holds the vocabulary, the special tokens, the padding and the length, so nothing of
    them is known here.

    Raises:
        HipaError: the file cannot be read, is no tokenizer, or says nothing of length and padding.

    Example:
        >>> tokenizer = PromptTokenizer(Path("bundle/tokenizer/tokenizer.json"))
        >>> tokenizer(["a photo of a cat"]).shape
        (1, 77)

    """

    def __init__(self, path: Path) -> None:
        self._open(read_text(path, max_bytes=MAX_TOKENIZER), str(path))

    @classmethod
    def of(cls, text: str, name: str) -> PromptTokenizer:
        """The tokenizer whose ``tokenizer.json`` has the content ``text``.

        Args:
            text: JSON, with length and padding.
            name: what an error calls it.

        Raises:
            HipaError: as the constructor does.

        """
        tokenizer = cls.__new__(cls)
        tokenizer._open(text, name)
        return tokenizer

    def _open(self, text: str, path: str) -> None:
        problem = tokenizer_problem(text)
        if problem:
            raise HipaError(f"{path} is not a tokenizer ({problem}). Export the bundle again.")
        with as_line(f"{path} is not a tokenizer", "Export the bundle again."):
            self._tokenizer = Tokenizer.from_str(text)
        truncation = self._tokenizer.truncation
        if not self._tokenizer.padding or not truncation:
            raise HipaError(f"{path} says nothing of length and padding. Export the bundle again.")
        self.length: int = truncation["max_length"]
        padded = self._tokenizer.padding["length"]
        if self.length < _FEWEST_TOKENS or padded != self.length:
            raise HipaError(
                f"{path} reads {self.length} tokens and pads to {padded}. "
                "Expected one length. Export the bundle again."
            )
        # The library would cut in silence. Here a prompt that is too long is an error by default.
        self._tokenizer.no_truncation()

    def __call__(self, prompts: Sequence[str], *, truncate: bool = False) -> np.ndarray:
        """Token ids int64 [B, L], padded to the model's length.

        Args:
            prompts: B prompts.
            truncate: cut a prompt that is too long, and keep its end token.

        Raises:
            HipaError: text that is not valid Unicode.
            PromptTooLongError: a prompt that is too long while ``truncate`` is false; the message
                quotes what would be cut.

        """
        return np.stack([self._encode(prompt, truncate) for prompt in prompts])

    def _encode(self, prompt: str, truncate: bool) -> np.ndarray:
        # Python turns bytes of the command line that are not UTF-8 into lone surrogates.
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            raise HipaError(f"the prompt {prompt!r} is not valid text. Expected UTF-8.")

        with as_line("the tokenizer of the bundle cannot read the prompt", "Choose another."):
            encoding = self._tokenizer.encode(prompt)
        ids = encoding.ids
        if len(ids) <= self.length:
            return np.asarray(ids, dtype=np.int64)

        # The last place is kept for the end token.
        first_cut = encoding.offsets[self.length - 1][0]
        if not truncate:
            raise PromptTooLongError(
                f"the prompt has {len(ids)} tokens, the model reads {self.length}: "
                f"{prompt[first_cut:].strip()!r} would be cut."
            )
        return np.asarray([*ids[: self.length - 1], ids[-1]], dtype=np.int64)

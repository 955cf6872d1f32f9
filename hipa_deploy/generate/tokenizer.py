"""Prompts to token ids, with the Rust tokenizers library alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from hipa_deploy.errors import HipaError


class PromptTokenizer:
    """CLIP tokenisation from the bundle's ``tokenizer.json``, which holds special tokens, padding and length."""

    def __init__(self, path: Path) -> None:
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust library raises bare Exception
            raise HipaError(
                f"{path} is not a tokenizer ({error}). Export the bundle again."
            ) from None
        padding, truncation = self._tokenizer.padding, self._tokenizer.truncation
        if not padding or not truncation:
            raise HipaError(f"{path} says nothing of length and padding. Export the bundle again.")
        self.length: int = truncation["max_length"]
        self._tokenizer.no_truncation()

    def __call__(self, prompts: Sequence[str], *, truncate: bool = False) -> np.ndarray:
        """Token ids int64 [B, L], padded to the model's length L (77).

        Raises:
            HipaError: a prompt is too long and ``truncate`` is false; the message quotes what would be cut.

        """
        return np.stack([self._encode(prompt, truncate) for prompt in prompts])

    def _encode(self, prompt: str, truncate: bool) -> np.ndarray:
        if any(
            "\ud800" <= c <= "\udfff" for c in prompt
        ):  # what Python makes of bytes that are not UTF-8
            raise HipaError(f"the prompt {prompt!r} is not valid text. Expected UTF-8.")
        encoding = self._tokenizer.encode(prompt)
        ids = encoding.ids
        if len(ids) <= self.length:
            return np.asarray(ids, dtype=np.int64)
        first_cut = encoding.offsets[self.length - 1][0]  # the last place is kept for the end token
        if not truncate:
            raise HipaError(
                f"the prompt has {len(ids)} tokens, the model reads {self.length}: "
                f"{prompt[first_cut:].strip()!r} would be cut. Shorten it, or pass --truncate (truncate=True)."
            )
        return np.asarray([*ids[: self.length - 1], ids[-1]], dtype=np.int64)

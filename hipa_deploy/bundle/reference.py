"""The reference of a bundle: a prompt, seeds, and the tensors that PyTorch made of them in FP32.

The export writes it. The self-check compares a backend with its tensors, and a profile takes its
prompt, which is one that the model was trained for.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.errors import HipaError

REFERENCE_TENSORS = "reference/tensors.npz"
REFERENCE_PROMPTS = "reference/prompts.json"

# What json and numpy raise for a file that is missing, cut short, or of another structure.
_UNREADABLE = (OSError, ValueError, KeyError, IndexError, TypeError)


@dataclass(frozen=True)
class Reference:
    """A bundle's reference prompt, the seeds of its batch, and PyTorch's FP32 tensors by name.

    Attributes:
        prompt: the text of every image of the batch.
        seeds: a seed for each image.
        tensors: arrays by name, such as 'noise' [B, C, h, w] and 'images' uint8 [B, H, W, 3].

    """

    prompt: str
    seeds: list[int]
    tensors: dict[str, np.ndarray]

    @classmethod
    def read(cls, bundle: Bundle) -> Reference:
        """Read the reference of ``bundle``.

        Raises:
            HipaError: the bundle has none, or its files are not what an export writes.

        Example:
            >>> Reference.read(Bundle.open(embedded.BUNDLE)).tensors["images"].shape
            (1, 64, 64, 3)

        """
        prompt, seeds = _read_prompt(bundle)
        try:
            with np.load(bundle.path(REFERENCE_TENSORS)) as tensors:
                return cls(prompt, seeds, dict(tensors))
        except _UNREADABLE as error:
            raise _unreadable(bundle, error) from None


def reference_prompt(bundle: Bundle) -> str:
    """The prompt of ``bundle``'s reference; its tensors are not read.

    Raises:
        HipaError: the bundle has no reference, or its prompts are not what an export writes.

    """
    return _read_prompt(bundle).prompt


class _Prompt(NamedTuple):
    """The reference prompt and the seeds of its images."""

    prompt: str
    seeds: list[int]


def _read_prompt(bundle: Bundle) -> _Prompt:
    try:
        content = json.loads(bundle.path(REFERENCE_PROMPTS).read_text(encoding="utf-8"))
        return _Prompt(content["prompts"][0], list(content["seeds"]))
    except _UNREADABLE as error:
        raise _unreadable(bundle, error) from None


def _unreadable(bundle: Bundle, error: Exception) -> HipaError:
    return HipaError(
        f"{bundle.root}/reference cannot be read ({error!r}). Export the bundle again."
    )

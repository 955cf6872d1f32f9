"""The reference of a bundle: a prompt, seeds, and the tensors that PyTorch made of them in FP32.

The export writes it. The self-check compares a backend with its tensors, and a profile takes its
prompt, which is one that the model was trained for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, NamedTuple

import numpy as np
from pydantic import Field

from hipa_deploy.bundle.arrays import bounded, read_npz
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.bundle.manifest import MAX_BATCH
from hipa_deploy.disk.reading import read_record, shown
from hipa_deploy.errors import HipaError, reason_of
from hipa_deploy.record import Record

REFERENCE_TENSORS = "reference/tensors.npz"
REFERENCE_PROMPTS = "reference/prompts.json"
TEACHER_TENSORS = "reference/teacher.npz"  # of a bundle that refines

_MAX_TENSORS = 1 << 30  # bytes of all tensors; those of 64 images of 1024 x 1024 fill half of it
_MAX_SEED = 2**63 - 1


class _Prompts(Record):
    """``prompts.json``."""

    prompts: tuple[str, ...] = Field(min_length=1)
    seeds: tuple[Annotated[int, Field(ge=0, le=_MAX_SEED)], ...] = Field(
        min_length=1, max_length=MAX_BATCH
    )


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
        return cls(prompt, seeds, _read_tensors(bundle, REFERENCE_TENSORS))


def teacher_tensors(bundle: Bundle) -> dict[str, np.ndarray]:
    """Inputs and outputs of the base UNet in the middle of a trajectory, as its stage calls them.

    Raises:
        HipaError: the bundle has none, or the file is not what an export writes.

    """
    return _read_tensors(bundle, TEACHER_TENSORS)


def _read_tensors(bundle: Bundle, name: str) -> dict[str, np.ndarray]:
    try:
        path = bundle.path(name)
        tensors = read_npz(path, lambda name, found: bounded(found), max_bytes=_MAX_TENSORS)
    except HipaError as error:
        raise _unreadable(bundle, error) from None
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise _unreadable(bundle, HipaError(f"{shown(name)} has NaN or infinity"))
    return tensors


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
    path = bundle.path(REFERENCE_PROMPTS)
    try:
        content = read_record(path, _Prompts, "")
    except HipaError as error:
        raise _unreadable(bundle, error) from None
    return _Prompt(content.prompts[0], list(content.seeds))


def _unreadable(bundle: Bundle, error: HipaError) -> HipaError:
    return HipaError(
        f"{bundle.root}/reference cannot be read ({reason_of(error)}). Export the bundle again."
    )

"""Weights that a training stored, and how two of them differ."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file, in the order of the weights' names.

    The tensors are copies: those of ``load_file`` would change with the file.
    """
    return dict(sorted(load(path.read_bytes()).items()))


def differences(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return the largest difference of every weight that is not bit for bit the same.

    It is infinite for a weight that only one of the two has, or that has another shape.
    """
    found = {}
    for name in {**a, **b}:
        if not _equal(a.get(name), b.get(name)):
            found[name] = _largest(a.get(name), b.get(name))
    return found


def _equal(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is not None and b is not None and torch.equal(a, b)


def _largest(a: torch.Tensor | None, b: torch.Tensor | None) -> float:
    if a is None or b is None or a.shape != b.shape:
        return float("inf")
    return float((a.double() - b.double()).abs().max())

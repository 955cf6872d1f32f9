"""Weights that a training stored, and how two of them differ."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """In the order of their names. A copy, where ``load_file`` would map the file."""
    return dict(sorted(load(path.read_bytes()).items()))


def differences(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> dict[str, float]:
    """Names whose values differ, with the largest difference; infinite where one is missing."""
    return {
        name: _largest(a.get(name), b.get(name))
        for name in {**a, **b}
        if not _equal(a.get(name), b.get(name))
    }


def _equal(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is not None and b is not None and torch.equal(a, b)


def _largest(a: torch.Tensor | None, b: torch.Tensor | None) -> float:
    if a is None or b is None or a.shape != b.shape:
        return float("inf")
    return float((a.double() - b.double()).abs().max())

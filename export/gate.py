"""The gate of every export: a stage that is not the model it came from stops it."""

from __future__ import annotations

import numpy as np

from hipa_deploy.bundle.manifest import Parity, Precision
from hipa_deploy.bundle.parity import compare, problem
from hipa_deploy.errors import HipaError


def check(stage: str, got: np.ndarray, expected: np.ndarray, precision: Precision) -> Parity:
    """Compare, and raise HipaError where the export must not go on."""
    if wrong := problem(got, expected, precision):
        raise HipaError(f"{stage} in {precision} {wrong}. Export with --dtype fp32.")
    return compare(got, expected)

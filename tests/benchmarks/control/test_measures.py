from __future__ import annotations

import numpy as np
import pytest

from benchmarks.control.measures import agreement
from hipa_deploy.errors import HipaError


def line(row: int, width: int = 16) -> np.ndarray:
    """A horizontal line in a picture of 16 pixels, bool [1, 16, 16]."""
    edges = np.zeros((1, 16, 16), bool)
    edges[0, row, :width] = True
    return edges


def test_edges_within_the_tolerance_agree() -> None:
    assert agreement(line(5), line(5), 0).f1 == 1
    assert agreement(line(5), line(6), 1).f1 == 1
    assert agreement(line(5), line(7), 1).f1 == 0
    assert agreement(line(5), line(7), 2).f1 == 1


def test_a_line_too_much_costs_precision_and_one_too_little_recall() -> None:
    both = line(2) | line(12)
    more = agreement(both, line(2), 1)
    assert (more.precision[0], more.recall[0]) == (0.5, 1)
    fewer = agreement(line(2), both, 1)
    assert (fewer.precision[0], fewer.recall[0]) == (1, 0.5)
    assert more.f1 == fewer.f1 == pytest.approx(2 / 3)


def test_an_image_without_edges_agrees_with_nothing() -> None:
    nothing = np.zeros((1, 16, 16), bool)
    found = agreement(nothing, line(3), 1)
    assert (found.precision[0], found.recall[0], found.f1[0]) == (0, 0, 0)


def test_sets_of_different_shapes_are_refused() -> None:
    with pytest.raises(HipaError, match=r"Expected equal shapes"):
        agreement(line(1), np.zeros((2, 16, 16), bool), 1)

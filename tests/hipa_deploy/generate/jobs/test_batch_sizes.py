"""Which batch sizes are used: cutting, and the proof."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hipa_deploy.bundle.manifest import Axis
from hipa_deploy.generate.jobs.batch_sizes import cut, prove, sizes_to_try


@given(
    jobs=st.integers(0, 60),
    sizes=st.sets(st.integers(2, 20), max_size=5).map(lambda more: (1, *sorted(more))),
)
def test_every_job_is_in_one_batch_of_a_size(jobs: int, sizes: tuple[int, ...]) -> None:
    batches = list(cut(range(jobs), sizes))
    assert [number for batch in batches for number in batch] == list(range(jobs))
    assert {len(batch) for batch in batches} <= set(sizes)


@pytest.mark.parametrize(
    ("largest", "asked", "sizes"),
    [
        (1, None, [1]), (2, None, [1, 2]), (6, None, [1, 2, 4, 6]), (8, None, [1, 2, 4, 8]),
        (8, 3, [1, 2, 3]), (8, 1, [1]), (4, 100, [1, 2, 4]),
    ],
)  # fmt: skip
def test_sizes_that_are_tried(largest: int, asked: int | None, sizes: list[int]) -> None:
    assert sizes_to_try(Axis(min=1, opt=1, max=largest), asked) == sizes


def run(jobs: Sequence[int], *, seconds=lambda size: 0.002, error=lambda size, place: 0.0):
    """Images that say who they are, with an error where a backend would round otherwise."""
    time.sleep(seconds(len(jobs)))
    rows = [[job + error(len(jobs), place)] for place, job in enumerate(jobs)]
    return {"images": np.asarray(rows)}


def test_sizes_that_change_nothing_and_save_time_are_used() -> None:
    found = prove(run, range(8), [1, 2, 4, 8])
    assert found.sizes == (1, 2, 4, 8)
    assert found.changing == ()
    assert found.milliseconds.keys() == {1, 2, 4, 8}


@pytest.mark.parametrize("place", [0, 1, 3])
def test_a_size_that_changes_one_place_by_the_last_bit_is_not_used(place: int) -> None:
    tiny = np.finfo(np.float64).eps * 4

    def changing(jobs: Sequence[int]):
        return run(jobs, error=lambda size, at: tiny if (size, at) == (4, place) else 0.0)

    found = prove(changing, range(1, 9), [1, 2, 4, 8])
    assert found.changing == (4,)
    assert found.sizes == (1, 2, 8)


def test_a_batch_whose_images_depend_on_each_other_is_not_used() -> None:
    def mixing(jobs: Sequence[int]):
        return {"images": np.asarray([[float(job)] for job in jobs]) / max(jobs)}

    assert prove(mixing, range(1, 5), [1, 2, 4]).sizes == (1,)


def test_sizes_that_save_no_time_are_not_used() -> None:
    found = prove(lambda jobs: run(jobs, seconds=lambda size: 0.01 * size), range(4), [1, 2, 4])
    assert found.slow
    assert found.sizes[0] == 1
    assert set(found.sizes) | set(found.slow) == {1, 2, 4}

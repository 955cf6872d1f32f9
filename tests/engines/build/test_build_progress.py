"""Nested build phases as one fraction."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hipa_deploy.engines.build.build_progress import PhaseTree


def test_a_child_fills_its_parents_step():
    tree = PhaseTree()
    tree.start("build", None, 2)
    tree.start("optimise", "build", 4)
    tree.step("optimise", 1)
    assert tree.fraction == pytest.approx(0.25)
    tree.step("optimise", 3)
    tree.finish("optimise")
    tree.step("build", 0)
    assert tree.fraction == pytest.approx(0.5)
    tree.step("build", 1)
    tree.finish("build")
    assert tree.fraction == 1.0


NAMES = st.sampled_from("abcd")


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("start"), NAMES, st.one_of(st.none(), NAMES), st.integers(0, 5)),
            st.tuples(st.just("step"), NAMES, st.integers(0, 9)),
            st.tuples(st.just("finish"), NAMES),
        ),
        max_size=40,
    )
)
def test_the_fraction_never_falls_and_stays_between_0_and_1(calls):
    tree = PhaseTree()
    last = 0.0
    for method, *arguments in calls:
        getattr(tree, method)(*arguments)
        assert last <= tree.fraction <= 1.0
        last = tree.fraction

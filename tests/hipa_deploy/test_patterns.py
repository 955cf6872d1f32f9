"""Regular expressions of strangers end in time."""

import re
import time

import pytest

from hipa_deploy.errors import HipaError
from hipa_deploy.patterns import Patterns


def test_usual_patterns_match_as_in_re() -> None:
    patterns = Patterns("alpha_pattern")
    for pattern in ("to_q$", r"^down_blocks\.\d+\.", "x", "(?i)TO_Q", ".*mid.*"):
        for text in ("down_blocks.0.to_q", "mid_block.to_k"):
            assert bool(patterns.search(pattern, text)) == bool(re.search(pattern, text))


def test_all_patterns_together_have_a_limit() -> None:
    patterns = Patterns("alpha_pattern", seconds=0.5)
    started = time.perf_counter()
    for _ in range(5):
        with pytest.raises(HipaError, match=r"which takes longer than 0.5 s"):
            patterns.search("^(a|aa)+$", "a" * 60 + "!")
    assert time.perf_counter() - started < 20  # seconds of CPU are counted


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("(", "is no regular expression"), ("x" * 2000, "Expected at most 1000 characters")],
)
def test_what_is_no_pattern(pattern: str, message: str) -> None:
    with pytest.raises(HipaError, match=message):
        Patterns("source.same").search(pattern, "a")

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from hipa_deploy.embedded import BUNDLE, EXAMPLE_PROMPT
from hipa_deploy.errors import HipaWarning
from hipa_deploy.guide.known_prompts import known_prompts, nearest_known, warn_of_unknown


@pytest.mark.parametrize(
    "prompt",
    [
        EXAMPLE_PROMPT,
        f"  {EXAMPLE_PROMPT.upper()} ",
        "twemoji emoji of a grinning face",
        f"{EXAMPLE_PROMPT} on a blue background",
        "3d emoji of a fruit",
        "noto emoji of a fruit on a pink background",
        "flat emoji",
        "flat emoji on a gray background",
    ],
)
def test_a_known_prompt_passes(prompt: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_unknown(BUNDLE, [prompt])


def test_the_nearest_prompt_is_named() -> None:
    assert nearest_known("3d emoji of a red aple", known_prompts()) == EXAMPLE_PROMPT
    coloured = nearest_known("3d emoji of a red aple on a blue background", known_prompts())
    assert coloured == f"{EXAMPLE_PROMPT} on a blue background"
    other_colour = nearest_known(f"{EXAMPLE_PROMPT} on a red background", known_prompts())
    assert other_colour == EXAMPLE_PROMPT
    with pytest.warns(HipaWarning, match="knows no 'a castle on a hill'") as caught:
        warn_of_unknown(BUNDLE, ["a castle on a hill", "a castle on a hill", EXAMPLE_PROMPT])
    assert len(caught) == 1


def test_other_bundles_know_what_they_know(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_unknown(tmp_path, ["a castle on a hill"])


def test_a_prompt_without_end_is_compared_in_time() -> None:
    assert nearest_known("a" * 10_000, known_prompts())

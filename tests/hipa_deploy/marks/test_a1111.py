"""A1111's text of a stranger: read as A1111 reads it, and in a time that its length bounds."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hipa_deploy.marks.a1111 import _FIELD, parse_infotext

# ``re_param`` in modules/infotext_utils.py of AUTOMATIC1111/stable-diffusion-webui.
RE_PARAM = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
MB = 1_000_000


@settings(max_examples=500, deadline=None)
@given(st.text('ab1é :,"\\-/\t(\n', max_size=30))
def test_fields_are_those_that_a1111_finds(text: str) -> None:
    assert _FIELD.findall(text) == RE_PARAM.findall(text)


@pytest.mark.parametrize(
    ("line", "fields"),
    [
        ("Steps: 20, Sampler: Euler a, Seed: 1", {"Steps": "20", "Sampler": "Euler a"}),
        ('Steps: 20, Model: "a, b: c", Seed: 1', {"Model": "a, b: c", "Seed": "1"}),
        ("Steps: 20, VAE - hash/x: 5, Seed: 1,", {"VAE - hash/x": "5", "Seed": "1"}),
        ("(Steps: 20),\tSeed: 1, - Size: 8x8", {"Steps": "20)", "Seed": "1", "Size": "8x8"}),
    ],
)
def test_fields(line: str, fields: dict[str, str]) -> None:
    assert fields.items() <= parse_infotext(f"a cat\n{line}").items()


@pytest.mark.parametrize(
    "unit",
    ["a", "ab ", "x-/", " (a", "\t", " ", "-", "a, ", "ab: ", "ab:,", 'ab:"', 'ab:"x,', '\\"'],
)
def test_a_megabyte_of_a_stranger_is_read_at_once(unit: str) -> None:
    text = "x" + unit * (MB // len(unit)) + "y"
    started = time.process_time()
    parse_infotext(text)
    # A tenth of a second, or a second where every field is broken JSON. The bound is for busy
    # machines: what grows with the square of the length takes hours.
    assert time.process_time() - started < 10

"""A tokenizer.json that asks too much is refused before the library sees it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hipa_deploy.bundle.tokenizer_file import tokenizer_problem
from hipa_deploy.embedded import BUNDLE

TEXT = (BUNDLE / "tokenizer/tokenizer.json").read_text(encoding="utf-8")
CLIP = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


def changed(*place: str | int, value: Any) -> str:
    content = json.loads(TEXT)
    holder = content
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = value
    return json.dumps(content)


def test_the_embedded_tokenizer_is_within_the_limits() -> None:
    assert tokenizer_problem(TEXT) is None


@pytest.mark.parametrize(
    "pattern",
    [
        CLIP,
        # GPT-2's, Llama 3's
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ],
)
def test_patterns_of_known_tokenizers_pass(pattern: str) -> None:
    place = ("pre_tokenizer", "pretokenizers", 0, "pattern", "Regex")
    assert tokenizer_problem(changed(*place, value=pattern)) is None


@pytest.mark.parametrize(
    "pattern",
    [r"(a+)+$", r"(a|a)*b", r"(a*){2,}", r"(.*)\1", r"a*a*a*a*b", r"(?R)", "x" * 1000, r"(a)?+"],
)
def test_patterns_that_may_take_for_ever_do_not(pattern: str) -> None:
    place = ("normalizer", "normalizers", 1, "pattern", "Regex")
    assert "may take for ever" in str(tokenizer_problem(changed(*place, value=pattern)))


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (("padding", "strategy", "Fixed"), 10**12, "padding is 1000000000000"),
        (("padding", "pad_to_multiple_of"), 10**12, "padding"),
        (("padding", "strategy", "Fixed"), -1, "padding is -1"),
        (("truncation", "max_length"), 10**9, "truncation"),
        (("truncation", "stride"), 10**9, "truncation"),
        (("normalizer", "normalizers", 1, "content"), "x" * 5, "puts in 5 characters"),
        (("normalizer", "normalizers"), [{"type": "Prepend", "prepend": "ab"}] * 9, "9 times"),
        (("post_processor",), {"single": [{"Sequence": {"id": "A"}}] * 1000}, "parts"),
        (("added_tokens",), [{"content": "x"}] * 100_001, "100001 added tokens"),
        (("added_tokens", 0, "content"), "x" * 1000, "added token of 1000"),
    ],
)
def test_numbers_and_lists_have_limits(place: tuple, value: object, words: str) -> None:
    assert words in str(tokenizer_problem(changed(*place, value=value)))


@pytest.mark.parametrize("text", ["", "[]", "null", "[" * 100_000, "9" * 5000, "\ud800"])
def test_what_is_no_table_is_a_problem_and_no_exception(text: str) -> None:
    assert tokenizer_problem(text)

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


def word(pattern: str, content: str) -> dict[str, Any]:
    """A rule for a word of an embedding, as the library writes it."""
    return {"type": "Replace", "pattern": {"String": pattern}, "content": content}


def with_rules(rules: list[dict[str, Any]]) -> str:
    usual = json.loads(TEXT)["normalizer"]
    # Every embedding puts its rules around what was there.
    nested = {"type": "Sequence", "normalizers": [*rules[1:], usual]}
    return changed("normalizer", value={"type": "Sequence", "normalizers": [*rules[:1], nested]})


def test_words_of_embeddings_pass() -> None:
    vectors = "".join(chr(0xF0000 + number) for number in range(75))
    rules = [word(f"<cat>_{number}", vectors[number]) for number in range(74, 0, -1)]
    rules.append(word("<cat>", vectors))
    assert tokenizer_problem(with_rules(rules * 5)) is None


@pytest.mark.parametrize(
    "rule",
    [
        word("a", "x" * 5),  # no private characters
        word("a", chr(0xF0000) * 76),
        word("", chr(0xF0000) * 5),
        word(chr(0xF0001), chr(0xF0000) * 5),  # it would grow what another rule has put in
        {**word("a", chr(0xF0000) * 5), "pattern": {"Regex": "."}},
        {**word("a", chr(0xF0000) * 5), "prepend": "y"},
    ],
)
def test_rules_that_only_look_like_words(rule: dict[str, Any]) -> None:
    assert "puts in" in str(tokenizer_problem(with_rules([rule])))


def test_words_of_embeddings_have_a_limit() -> None:
    rules = [word(f"<{number}>", chr(0xF0000)) for number in range(10_001)]
    assert "10001 words" in str(tokenizer_problem(with_rules(rules)))

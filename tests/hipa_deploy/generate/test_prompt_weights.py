"""Weights in prompts, against what AUTOMATIC1111's web UI publishes of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hipa_deploy.errors import HipaError
from hipa_deploy.generate.prompt_weights import (
    in_other_case,
    parse_weights,
    web_ui_word,
    weigh_context,
    written_weight,
)

# The examples of the docstring of parse_prompt_attention in the web UI's modules/prompt_parser.py.
PUBLISHED = {
    "normal text": [("normal text", 1.0)],
    "an (important) word": [("an ", 1.0), ("important", 1.1), (" word", 1.0)],
    "(unbalanced": [("unbalanced", 1.1)],
    r"\(literal\]": [("(literal]", 1.0)],
    "(unnecessary)(parens)": [("unnecessaryparens", 1.1)],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        ("a ", 1.0),
        ("house", 1.5730000000000004),
        (" ", 1.1),
        ("on", 1.0),
        (" a ", 1.1),
        ("hill", 0.55),
        (", sun, ", 1.1),
        ("sky", 1.4641000000000006),
        (".", 1.1),
    ],
}


@pytest.mark.parametrize("prompt", PUBLISHED)
def test_the_published_examples(prompt: str) -> None:
    pieces = parse_weights(prompt)
    assert [text for text, _ in pieces] == [text for text, _ in PUBLISHED[prompt]]
    expected = [weight for _, weight in PUBLISHED[prompt]]
    assert [weight for _, weight in pieces] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("", []),
        ("()", []),
        ("a: b", [("a: b", 1.0)]),
        ("closed) here]", [("closed) here]", 1.0)]),
        ("no bracket:1.3)", [("no bracket:1.3)", 1.0)]),
        ("(a : 1.5 )", [("a ", 1.5)]),
        ("(東京:-0.5)夜", [("東京", -0.5), ("夜", 1.0)]),
        ("(.5 of:2)", [(".5 of", 2.0)]),
        ("back\\slash\\\\", [("back\\slash\\", 1.0)]),
    ],
)
def test_more_of_the_syntax(prompt: str, expected: list[tuple[str, float]]) -> None:
    assert parse_weights(prompt) == expected


@given(text=st.text())
def test_text_without_brackets_stays_as_it_is(text: str) -> None:
    plain = text.translate({ord(character): None for character in "()[]\\"})
    assert parse_weights(plain) == ([(plain, 1.0)] if plain else [])


@pytest.mark.parametrize("prompt", ["(a:1.2.3)", "(a:.)", "(a:" + "9" * 400 + ")"])
def test_no_number(prompt: str) -> None:
    with pytest.raises(HipaError, match=r"is no weight\. Expected a number"):
        parse_weights(prompt)


@pytest.mark.parametrize(
    "prompt", ["(a:" + "9" * 40 + ")", "(a:-1001)", "((a:100):100)", "(" * 100 + "a"]
)
def test_a_weight_that_float32_cannot_use(prompt: str) -> None:
    with pytest.raises(HipaError, match="Expected at most 1000, all brackets around it together"):
        parse_weights(prompt)


def published_arithmetic(z: torch.Tensor, multipliers: torch.Tensor) -> torch.Tensor:
    """EmphasisOriginal of the web UI's modules/sd_emphasis.py, for one prompt and one chunk."""
    original_mean = z.mean()
    z = z * multipliers.reshape((*multipliers.shape, 1)).expand(z.shape)
    new_mean = z.mean()
    return z * (original_mean / new_mean)


def test_the_published_arithmetic_a_chunk_at_a_time() -> None:
    generator = torch.Generator().manual_seed(0)
    context_BLD = torch.randn(2, 6, 5, generator=generator) - 0.5
    weights_BL = torch.rand(2, 6, generator=generator) + 0.5
    weights_BL[1, 3:] = 1
    ours = weigh_context(context_BLD, weights_BL, 3)
    for row in range(2):
        for start in (0, 3):
            chunk = slice(start, start + 3)
            expected = published_arithmetic(
                context_BLD[row : row + 1, chunk], weights_BL[row : row + 1, chunk]
            )
            torch.testing.assert_close(ours[row : row + 1, chunk], expected)

    # Chunks without weights are the same to the bit, and the runtime's arrays give the same.
    assert torch.equal(ours[1, 3:], context_BLD[1, 3:])
    in_numpy = weigh_context(context_BLD.numpy(), weights_BL.numpy(), 3)
    np.testing.assert_allclose(in_numpy, ours.numpy(), rtol=1e-5, atol=1e-6)


def test_half_precision_is_weighed_in_float32() -> None:
    context_BLD = np.full((1, 2, 3), 0.1, np.float16)
    weighed = weigh_context(context_BLD, np.asarray([[2.0, 1.0]], np.float32), 2)
    assert weighed.dtype == np.float32
    assert weighed.mean() == pytest.approx(float(context_BLD.astype(np.float32).mean()), rel=1e-6)


def test_a_mean_of_zero_is_not_restored() -> None:
    """The ratio of two roundings would be noise: text encoders with random weights have this."""
    context_BLD = torch.nn.functional.layer_norm(torch.randn(1, 4, 16), (16,))
    weights_BL = torch.tensor([[1.0, 1.5, 0.5, 1.0]])
    expected = context_BLD * weights_BL[..., None]
    torch.testing.assert_close(weigh_context(context_BLD, weights_BL, 4), expected)


def test_weights_that_cancel_out() -> None:
    with pytest.raises(HipaError, match="cancel out"):
        weigh_context(np.ones((1, 2, 3), np.float32), np.asarray([[1.0, -1.0]], np.float32), 2)


def test_what_looks_like_a_weight() -> None:
    assert written_weight("a (red hat:1.3) here") == "(red hat:1.3)"
    assert written_weight("a (really) good [one] at 1:30") is None


def test_what_the_web_ui_obeys() -> None:
    assert web_ui_word("a cat <lora:fur_v2:0.8>, BREAK") == "<lora:fur_v2:0.8>"
    assert web_ui_word("a cat\nBREAK a dog") == "BREAK"
    assert web_ui_word("a [cat:dog:0.5] here") == "[cat:dog:0.5]"
    assert (
        web_ui_word("FISH AND CHIPS for a <cat-toy> at 1:30 [really], BREAKING (news:1.2)") is None
    )


@pytest.mark.parametrize(
    ("prompt", "found"),
    [("a Cat, cat", "cat"), ("Cat", None), ("concatenate", None), ("(CAT:1.2) Cat", "CAT")],
)
def test_a_word_in_other_capitals(prompt: str, found: str | None) -> None:
    assert in_other_case("Cat", prompt) == found

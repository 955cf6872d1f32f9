from __future__ import annotations

import pytest
from pydantic import ValidationError

from hipa_deploy.bundle.text_settings import TextSettings, TextWishes, choose_text
from hipa_deploy.errors import HipaError

TRAINED = TextSettings(context_tokens=154, clip_skip=1, prompt_weights=True)


def test_without_wishes_it_is_as_the_adaptor_was_trained() -> None:
    assert choose_text(TextWishes(), TRAINED, 77, 12) == (TRAINED, None)


def test_without_an_adaptor_it_is_one_chunk_and_every_layer() -> None:
    expected = TextSettings(context_tokens=77, clip_skip=0, prompt_weights=False)
    assert choose_text(TextWishes(), None, 77, 12) == (expected, None)


def test_an_old_adaptor_has_one_chunk() -> None:
    """Its metadata says nothing of it."""
    chosen, warning = choose_text(TextWishes(context_tokens=77), TextSettings(), 77, 12)
    assert chosen.context_tokens == 77
    assert warning is None


def test_wishes_win_and_another_length_is_warned_of() -> None:
    chosen, warning = choose_text(TextWishes(231, None, False), TRAINED, 77, 12)
    assert chosen == TextSettings(context_tokens=231, clip_skip=1, prompt_weights=False)
    assert warning is not None
    assert "trained with contexts of 154 tokens, not 231" in warning
    assert choose_text(TextWishes(231, 2), None, 77, 12)[1] is None


def test_another_clip_skip_than_the_adaptors() -> None:
    with pytest.raises(HipaError, match=r"trained with clip skip 1, not 0\. Leave out --clip-skip"):
        choose_text(TextWishes(clip_skip=0), TRAINED, 77, 12)
    with pytest.raises(HipaError, match=r"not 2\. Export a bundle of its own"):
        choose_text(TextWishes(clip_skip=2), TRAINED, 77, 12, "Export a bundle of its own.")


@pytest.mark.parametrize("tokens", [76, 100, 308])
def test_lengths_of_no_whole_chunks(tokens: int) -> None:
    with pytest.raises(HipaError, match="Expected one of: 77, 154, 231"):
        choose_text(TextWishes(context_tokens=tokens), None, 77, 12)


def test_a_clip_skip_that_leaves_no_layer() -> None:
    with pytest.raises(HipaError, match="leaves no layer: this model's text encoder has 12"):
        choose_text(TextWishes(clip_skip=12), None, 77, 12)
    with pytest.raises(HipaError, match="clip skip -1"):
        choose_text(TextWishes(clip_skip=-1), None, 77, 12)


@pytest.mark.parametrize("values", [{"clip_skip": -1}, {"context_tokens": 0}, {"other": 1}])
def test_values_that_a_recipe_cannot_have(values: dict[str, int]) -> None:
    with pytest.raises(ValidationError):
        TextSettings(**values)

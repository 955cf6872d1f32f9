from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from hipa_deploy.errors import HipaError
from hipa_deploy.generate.tokenizer import PromptTokenizer

WORDS = {"<s>": 0, "</s>": 1, "red": 2, "apple": 3, "pear": 4}


@pytest.fixture
def tokenizer(tmp_path: Path) -> PromptTokenizer:
    rust = Tokenizer(models.WordLevel(WORDS, unk_token="</s>"))
    rust.pre_tokenizer = pre_tokenizers.Whitespace()
    rust.post_processor = processors.TemplateProcessing(
        "<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    rust.enable_truncation(5)
    rust.enable_padding(length=5, pad_id=1, pad_token="</s>")
    rust.save(str(tmp_path / "tokenizer.json"))
    return PromptTokenizer(tmp_path / "tokenizer.json")


def test_pads_to_the_model_length(tokenizer: PromptTokenizer) -> None:
    tokens = tokenizer(["red apple", ""])
    assert tokens.dtype == np.int64
    assert tokens.tolist() == [[0, 2, 3, 1, 1], [0, 1, 1, 1, 1]]


def test_a_prompt_that_just_fits(tokenizer: PromptTokenizer) -> None:
    assert tokenizer(["red apple pear"]).tolist() == [[0, 2, 3, 4, 1]]


def test_a_long_prompt_says_what_would_be_cut(tokenizer: PromptTokenizer) -> None:
    with pytest.raises(HipaError, match=r"7 tokens, the model reads 5: 'red apple' would be cut"):
        tokenizer(["red apple pear red apple"])


def test_of_a_very_long_prompt_only_the_start_of_it(tokenizer: PromptTokenizer) -> None:
    """What to do stands behind it, and some of whom the message is for cut it."""
    with pytest.raises(HipaError) as caught:
        tokenizer(["red apple pear " * 1000])
    assert len(str(caught.value)) < 600
    assert str(caught.value).count("red") > 10
    assert "Shorten it" in str(caught.value)


def test_truncation_keeps_the_end_token(tokenizer: PromptTokenizer) -> None:
    assert tokenizer(["red apple pear red apple"], truncate=True).tolist() == [[0, 2, 3, 4, 1]]


def test_a_file_is_read_once_for_contexts_of_any_length(
    tokenizer: PromptTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hipa_deploy.generate.tokenizer.tokenizer_problem", lambda _: "read again")
    longer = PromptTokenizer(tmp_path / "tokenizer.json", 10)
    assert longer(["red apple pear red"]).tolist() == [[0, 2, 3, 4, 1, 0, 2, 1, 1, 1]]
    with pytest.raises(HipaError, match="the model reads 5"):
        tokenizer(["red apple pear red"])


def test_not_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(HipaError, match="not a tokenizer"):
        PromptTokenizer(tmp_path / "tokenizer.json")


def test_a_tokenizer_without_a_length(tmp_path: Path) -> None:
    Tokenizer(models.WordLevel(WORDS, unk_token="</s>")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(HipaError, match="length"):
        PromptTokenizer(tmp_path / "tokenizer.json")

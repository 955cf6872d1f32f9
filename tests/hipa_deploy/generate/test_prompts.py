import time
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from hipa_deploy.errors import HipaError
from hipa_deploy.generate.prompts import (
    CACHED_PROMPTS,
    BakedPrompts,
    EncodedPrompt,
    EncodedPrompts,
    read_baked_prompts,
)
from hipa_deploy.generate.tokenizer import PromptTokenizer, PromptTooLongError
from hipa_deploy.tasks import size_numbers


def no_encoder(tokens: dict) -> dict:
    raise AssertionError("the text encoder ran")


def bake(folder: Path, prompts: list[str], contexts: int) -> BakedPrompts:
    (folder / "prompts.txt").write_text("\n".join(prompts) + "\n")
    np.save(
        folder / "contexts.npy", np.arange(contexts * 6, dtype=np.float16).reshape(contexts, 2, 3)
    )
    return BakedPrompts(folder / "prompts.txt", folder / "contexts.npy")


def test_baked_contexts_are_looked_up(tmp_path: Path) -> None:
    source = bake(tmp_path, ["a cat", "a dog"], 2)
    feed = source.feed(source.prepare(["a dog", "a cat", "a dog"], truncate=False), no_encoder)
    assert list(feed) == ["context"]
    context_BLD = feed["context"]
    assert context_BLD.dtype == np.float16
    assert context_BLD[:, 0, 0].tolist() == [6, 0, 6]


def test_another_prompt_is_refused_with_the_nearest(tmp_path: Path) -> None:
    source = bake(tmp_path, ["3d emoji of a cat", "3d emoji of a dog"], 2)
    with pytest.raises(
        HipaError,
        match=r"'3d emoji of a dig' is not one of this bundle's 2 baked prompts"
        r".*'3d emoji of a dog'",
    ):
        source.prepare(["3d emoji of a dig"], truncate=False)


def test_the_nearest_of_many_takes_no_seconds(tmp_path: Path) -> None:
    scenery = "with a tall tower, a long bridge and some old boats on a wide river, number"
    prompts = [f"a {number % 977} house {scenery} {number}" for number in range(20_000)]
    source = bake(tmp_path, [*prompts, "a lighthouse at night"], 20_001)
    started = time.process_time()
    with pytest.raises(HipaError, match="the nearest is 'a lighthouse at night'"):
        source.prepare(["a light house at night"], truncate=False)
    with pytest.raises(HipaError, match=r"the nearest is 'a 976 house .* number 17585'"):
        source.prepare([prompts[17_585].replace("tall", "high")], truncate=False)
    assert time.process_time() - started < 2  # 5 seconds if all were compared


def test_contexts_that_do_not_match(tmp_path: Path) -> None:
    with pytest.raises(HipaError, match="2 prompts, 3 contexts"):
        bake(tmp_path, ["a", "b"], 3)


@pytest.mark.parametrize(("content", "message"), [(b"", "is empty"), (b"\xff\n", "cannot be read")])
def test_damaged_files_of_a_bundle(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "prompts.txt").write_bytes(content)
    with pytest.raises(HipaError, match=message):
        read_baked_prompts(tmp_path / "prompts.txt")


def test_a_missing_file_of_a_bundle(tmp_path: Path) -> None:
    with pytest.raises(HipaError, match="cannot be read"):
        read_baked_prompts(tmp_path / "none.txt")


def test_white_space_makes_no_other_prompt(tmp_path: Path) -> None:
    """Bundles of version 0.1.0 may hold two lines that differ in blanks alone."""
    source = bake(tmp_path, ["a  cat", "a cat", "a dog "], 3)
    assert source.prepare(["a cat", " a\tcat", "a dog"], truncate=False) == [0, 0, 2]


def test_a_prompt_that_is_too_long_may_be_cut(tmp_path: Path) -> None:
    rust = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "red": 2}, unk_token="</s>"))
    rust.pre_tokenizer = pre_tokenizers.Whitespace()
    rust.post_processor = processors.TemplateProcessing(
        "<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    rust.enable_truncation(4)
    rust.enable_padding(length=4, pad_id=1, pad_token="</s>")
    source = EncodedPrompts(PromptTokenizer.of(rust.to_str(), "tokenizer"))
    with pytest.raises(PromptTooLongError, match="Shorten it, or pass --truncate") as caught:
        source.prepare(["red red red"], truncate=False)
    assert "--truncate" not in caught.value.problem
    assert source.prepare(["red red red"], truncate=True)[0].tokens_L.tolist() == [0, 2, 2, 1]


def test_contexts_are_remembered_and_forgotten() -> None:
    source = EncodedPrompts(None)  # type: ignore[arg-type]  # feed and keep need no tokenizer
    batches = [[EncodedPrompt(np.asarray([n]))] for n in range(CACHED_PROMPTS + 1)]
    for batch in batches[:-1]:
        assert list(source.feed(batch, no_encoder)) == ["tokens"]
        source.keep(batch, {"context": batch[0].tokens_L.astype(np.float32)})
    assert all(
        source.feed(batch, no_encoder)["context"] == batch[0].tokens_L for batch in batches[:-1]
    )
    source.keep(batches[-1], {"context": np.zeros((1, 1), np.float32)})  # pushes out the first
    assert list(source.feed(batches[0], no_encoder)) == ["tokens"]
    assert list(source.feed(batches[1], no_encoder)) == ["context"]


def test_weights_change_the_context_and_not_what_is_remembered() -> None:
    rust = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "red": 2, "pear": 3}, unk_token="</s>"))
    rust.pre_tokenizer = pre_tokenizers.Whitespace()
    rust.post_processor = processors.TemplateProcessing(
        "<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    rust.enable_truncation(4)
    rust.enable_padding(length=4, pad_id=1, pad_token="</s>")
    source = EncodedPrompts(PromptTokenizer.of(rust.to_str(), "tokenizer"))
    calls = []

    def encode(tokens: dict) -> dict:
        calls.append(tokens)
        context_BLD = tokens["tokens"][..., None] + np.asarray([1.0, 2.0])
        return {"context": context_BLD.astype(np.float16)}

    weighed = source.prepare(["(red:2) pear"], truncate=False, weights=True)
    assert weighed[0].tokens_L.tolist() == [0, 2, 3, 1]
    assert weighed[0].weights_L.tolist() == [1, 2, 1, 1]
    context = source.feed(weighed, encode)["context"]
    assert context.dtype == np.float16
    assert context[0, 1, 0] / context[0, 0, 0] == pytest.approx(2 * 3 / 1, rel=1e-3)

    # The same words without weights: what the encoder gave, and no second call of it.
    plain = source.prepare(["red pear"], truncate=False, weights=True)
    assert plain[0].weights_L is None
    np.testing.assert_array_equal(
        source.feed(plain, no_encoder)["context"], encode(calls[0])["context"]
    )
    assert source.prepare(["(red:2)"], truncate=True)[0].weights_L is None


def test_a_prompt_is_remembered_at_each_size() -> None:
    source = EncodedPrompts(None)  # type: ignore[arg-type]  # feed and keep need no tokenizer
    sizes = [np.asarray(size_numbers(*size)) for size in ((64, 64), (96, 64))]
    small, large = (EncodedPrompt(np.asarray([1, 2]), sizes_6=numbers_6) for numbers_6 in sizes)
    fed = source.feed([large], no_encoder)
    assert fed["sizes"].tolist() == [[96, 64, 0, 0, 96, 64]]
    source.keep([small], {"context": np.zeros((1, 2, 1), np.float32)})
    assert list(source.feed([small], no_encoder)) == ["context"]
    assert list(source.feed([large], no_encoder)) == ["tokens", "sizes"]


def test_a_closed_set_keeps_how_it_was_baked(tmp_path: Path) -> None:
    source = bake(tmp_path, ["a (cat:1.3)"], 1)
    assert source.reads_weights(None) is False
    with pytest.raises(HipaError, match="baked without prompt weights"):
        source.reads_weights(True)

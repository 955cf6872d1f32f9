"""The files of a bundle beside its stages."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hipa_deploy.disk.hashing import file_sha256
from hipa_deploy.errors import HipaError
from hipa_deploy.export.bundle_files import (
    file_hashes,
    tokenize,
    write_closed_set,
    write_references,
    write_tokenizer,
)
from hipa_deploy.export.model_parts import ModelParts
from hipa_deploy.export.references import References
from hipa_deploy.generate.prompt_files import read_numbered_prompts
from hipa_deploy.generate.prompts import BAKED_CONTEXTS, BAKED_PROMPTS


def test_the_tokenizer_pads_to_the_models_length(model_dir: Path, tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path, ModelParts.open(str(model_dir)).tokenizer(), "a pear")
    assert tokenizer(["a pear", "a red apple"]).shape == (2, 77)
    assert (tmp_path / "tokenizer/tokenizer.json").is_file()


def test_a_tokenizer_that_disagrees_is_refused(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Other:
        def __init__(self, path: Path) -> None: ...

        def __call__(self, prompts: list[str], *, truncate: bool) -> np.ndarray:
            return np.zeros((len(prompts), 77), np.int64)

    monkeypatch.setattr("hipa_deploy.export.bundle_files.PromptTokenizer", Other)
    with pytest.raises(HipaError, match="does not agree with transformers"):
        write_tokenizer(tmp_path, ModelParts.open(str(model_dir)).tokenizer(), "a pear")


def test_a_prompt_that_is_too_long_is_found_in_its_file(model_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.csv"
    path.write_text("id,caption\n1,a pear\n2," + "w" * 90 + "\n")
    tokenizer = write_tokenizer(tmp_path, ModelParts.open(str(model_dir)).tokenizer(), "a pear")
    places = read_numbered_prompts(path)
    with pytest.raises(HipaError, match=r"prompts\.csv, row 2: the prompt has 92 tokens") as caught:
        tokenize(tokenizer, list(places), path, places)
    assert str(caught.value).endswith("cut. Shorten it, or give --context-tokens 154.")


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", np.float16), ("fp32", np.float32)])
def test_a_closed_set_takes_the_place_of_the_tokenizer(
    tmp_path: Path, precision: str, dtype: type
) -> None:
    (tmp_path / "tokenizer").mkdir()
    contexts_NLD = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    stored_NLD = write_closed_set(tmp_path, ["a pear", "an äpfel"], contexts_NLD, precision)
    assert stored_NLD.dtype == dtype
    np.testing.assert_array_equal(np.load(tmp_path / BAKED_CONTEXTS), stored_NLD)
    assert (tmp_path / BAKED_PROMPTS).read_text(encoding="utf-8") == "a pear\nan äpfel\n"
    assert not (tmp_path / "tokenizer").exists()


def test_references_are_written_in_their_order(tmp_path: Path) -> None:
    tensors = {"tokens": np.arange(3), "noise": np.zeros(2, np.float32)}
    write_references(tmp_path, References("a pear", (0, 1), tensors))
    with np.load(tmp_path / "reference/tensors.npz") as stored:
        assert stored.files == ["tokens", "noise"]
        np.testing.assert_array_equal(stored["tokens"], tensors["tokens"])
    text = (tmp_path / "reference/prompts.json").read_text()
    assert json.loads(text) == {"prompts": ["a pear"], "seeds": [0, 1]}


def test_every_file_is_hashed(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    path = tmp_path / "unet/model.onnx"
    path.write_bytes(b"graph")
    assert file_hashes(tmp_path) == {"unet/model.onnx": file_sha256(path)}

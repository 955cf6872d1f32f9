"""One tokenizer for training, export and runtime, and what published folders look like."""

from __future__ import annotations

import html
import json
import shutil
import unicodedata
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import regex
from diffusers.loaders.textual_inversion import TextualInversionLoaderMixin
from hypothesis import given
from hypothesis import strategies as st
from transformers import AddedToken, CLIPTokenizer, CLIPTokenizerFast

from hipa_deploy.bundle.tokenizer_file import tokenizer_problem
from hipa_deploy.errors import HipaError
from hipa_deploy.generate.tokenizer import PromptTokenizer
from hipa_deploy.models.clip_tokenizer import (
    load_tokenizer,
    prompt_tokenizer,
    rust_tokenizer,
    save_tokenizer,
    words_of,
)
from hipa_deploy.models.configurations import write_config
from hipa_deploy.models.model_config import ModelConfig
from tests.tiny_model import make_model
from tests.usual_layout import find_as_written, store_as_4, store_as_5

TEXTS = [
    "",
    " ",
    "a red apple",
    "A  RED\tApple\nat night ",
    "it's the king's, they'll",
    "東京の夜景",
    "북극곰, 白熊",
    "👩\u200d👩\u200d👧 family",
    "\u200ba cat",
    "a\x00b\x07c",
    "café cafe\u0301 ﬁne ½",
    "\uff37\uff29\uff24\uff25 letters",
    "İstanbul ŒUVRE ÅNGSTRÖM",
    "<|endoftext|> in the text",
    "w" * 200,
]


@pytest.fixture(scope="module")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config("sd15", tmp_path_factory.mktemp("sd15") / "model")


@pytest.fixture
def copy(sd15: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sd15, tmp_path / "copy"))


def ids(tokenizer: CLIPTokenizerFast, text: str) -> list[int]:
    """As training calls transformers' tokenizer."""
    length = tokenizer.model_max_length
    tokens: Any = tokenizer([text], padding="max_length", max_length=length, truncation=True)
    row: list[int] = tokens.input_ids[0]
    return row


@pytest.mark.parametrize("text", TEXTS, ids=repr)
@pytest.mark.parametrize("name", ["sd15", "sd21-base"])
def test_training_and_runtime_give_the_same_ids(name: str, text: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(ModelConfig.read(write_config(name, tmp_path / name)))
    ours = prompt_tokenizer(tokenizer)([text], truncate=True)[0].tolist()
    assert ours == ids(tokenizer, text)
    assert len(ours) == 77


@given(text=st.text(max_size=120))
def test_any_text_has_the_same_ids(sd15: Path, text: str) -> None:
    tokenizer, ours = _loaded(sd15)
    assert ours([text], truncate=True)[0].tolist() == ids(tokenizer, text)


@cache
def _loaded(folder: Path) -> tuple[CLIPTokenizerFast, PromptTokenizer]:
    """Loaded once: hypothesis runs a test a hundred times."""
    tokenizer = load_tokenizer(ModelConfig.read(folder))
    return tokenizer, prompt_tokenizer(tokenizer)


class OpenAiTokenizer:
    """The algorithm of github.com/openai/CLIP, clip/simple_tokenizer.py, written from its text.

    ftfy repairs text there, which includes Unicode's form NFC. NFC alone stands here for it.
    """

    WORDS = regex.compile(
        r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+""",
        regex.IGNORECASE,
    )

    def __init__(self, folder: Path) -> None:
        self.vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
        self.ranks = {tuple(line.split()): rank for rank, line in enumerate(lines)}

    def encode(self, text: str) -> list[int]:
        text = html.unescape(html.unescape(unicodedata.normalize("NFC", text)))
        text = regex.sub(r"\s+", " ", text).strip().lower()
        found = []
        for word in self.WORDS.findall(text):
            letters = [self.letter(byte) for byte in word.encode()]
            letters[-1] += "</w>"
            found += [self.vocabulary[part] for part in self.merge(letters)]
        return found

    def merge(self, parts: list[str]) -> list[str]:
        """Join the pair that was learned first, everywhere, until no pair is left."""
        while True:
            pairs = [pair for pair in pairwise(parts) if pair in self.ranks]
            if not pairs:
                return parts
            best = min(pairs, key=self.ranks.__getitem__)
            joined: list[str] = []
            for part in parts:
                if joined and (joined[-1], part) == best:
                    joined[-1] += part
                else:
                    joined.append(part)
            parts = joined

    @staticmethod
    def letter(byte: int) -> str:
        """A byte that prints stands for itself, the others for U+0100 and on."""
        shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
        hidden = [value for value in range(256) if value not in shown]
        return chr(byte) if byte in shown else chr(256 + hidden.index(byte))


@pytest.mark.parametrize("text", [text for text in TEXTS if "<|" not in text], ids=repr)
def test_ids_are_those_of_openais_algorithm(sd15: Path, text: str) -> None:
    tokenizer, _ = _loaded(sd15)
    expected = OpenAiTokenizer(sd15 / "tokenizer").encode(text)
    assert tokenizer(text).input_ids[1:-1] == expected


def test_a_folder_of_vocabulary_and_merges_alone(copy: Path) -> None:
    """Without tokenizer_config.json the length is the text encoder's."""
    expected = ids(load_tokenizer(ModelConfig.read(copy)), "a red apple")
    (copy / "tokenizer/tokenizer_config.json").unlink()
    (copy / "tokenizer/special_tokens_map.json").unlink()
    tokenizer = load_tokenizer(ModelConfig.read(copy))
    assert tokenizer.model_max_length == 77
    assert ids(tokenizer, "a red apple") == expected


def test_a_folder_of_tokenizer_json_alone(copy: Path) -> None:
    slow = load_tokenizer(ModelConfig.read(copy))
    slow.save_pretrained(copy / "saved")
    shutil.rmtree(copy / "tokenizer")
    (copy / "tokenizer").mkdir()
    shutil.copy(copy / "saved/tokenizer.json", copy / "tokenizer/tokenizer.json")
    tokenizer = load_tokenizer(ModelConfig.read(copy))
    assert ids(tokenizer, "東京の夜景") == ids(slow, "東京の夜景")


@pytest.mark.parametrize(
    ("said", "positions", "length"), [(10**30, 77, 77), (512, 77, 77), (32, 77, 32), (77, 64, 64)]
)
def test_the_smaller_length_wins(copy: Path, said: int, positions: int, length: int) -> None:
    edit(copy / "tokenizer/tokenizer_config.json", model_max_length=said)
    edit(copy / "text_encoder/config.json", max_position_embeddings=positions)
    tokenizer = load_tokenizer(ModelConfig.read(copy))
    assert tokenizer.model_max_length == length
    assert prompt_tokenizer(tokenizer)(["a pear"]).shape == (1, length)


def test_stable_diffusion_2_pads_with_token_0(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(ModelConfig.read(write_config("sd21-base", tmp_path / "m")))
    assert prompt_tokenizer(tokenizer)([""])[0].tolist() == [49406, 49407, *[0] * 75]


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_no_files(copy: Path) -> None:
    (copy / "tokenizer/vocab.json").unlink()
    with pytest.raises(HipaError, match=r"vocab\.json and merges\.txt"):
        load_tokenizer(ModelConfig.read(copy))


def test_a_tokenizer_of_another_kind(copy: Path) -> None:
    """Its pre-tokenizer is not CLIP's: transformers raises a TypeError of ten lines."""
    saved = load_tokenizer(ModelConfig.read(copy))
    saved.save_pretrained(copy / "tokenizer")
    edit(copy / "tokenizer/tokenizer.json", pre_tokenizer={"type": "Whitespace"})
    with pytest.raises(HipaError, match="cannot be loaded as CLIP's fast tokenizer") as caught:
        load_tokenizer(ModelConfig.read(copy))
    assert "\n" not in str(caught.value)


def test_no_padding_token(copy: Path) -> None:
    edit(copy / "tokenizer/special_tokens_map.json", pad_token=None)
    edit(copy / "tokenizer/tokenizer_config.json", pad_token=None)
    with pytest.raises(HipaError, match="no padding token"):
        load_tokenizer(ModelConfig.read(copy))


def test_more_tokens_than_the_text_encoder_has(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "tiny")
    edit(folder / "text_encoder/config.json", vocab_size=500)
    with pytest.raises(HipaError, match="514 tokens, the text encoder 500"):
        load_tokenizer(ModelConfig.read(folder))


# As diffusers adds them: three vectors of one word, two of another, and words of one vector, of
# which one begins the other.
ADDED = ("<Cat>", "<Cat>_1", "<Cat>_2", "EasyBad", "EasyBad_1", "bad_Hands", "bad_Hands5", "Ünï")
PROMPTS = [
    "a photo of <Cat> in red",
    "<Cat>",
    "a<Cat>s, <Cat>!",
    "no <cat> and no <CAT> here",
    "one <Cat>_1 alone, one<Cat>_2.",
    "EasyBad, easybad, EASYBAD",
    "bad_Hands bad_Hands5 bad_hands",
    "bad_Hands55",
    "Ünï ünï ÜNÏ",
    "plain words",
    "",
]


def add_words(
    folder: Path, words: tuple[str | AddedToken, ...], part: str = "tokenizer"
) -> CLIPTokenizer:
    """Save a model's tokenizer with the words of embeddings, as a pipeline of diffusers does."""
    slow = CLIPTokenizer.from_pretrained(folder, subfolder=part)
    find_as_written(slow)
    slow.add_tokens(list(words))
    shutil.rmtree(folder / part)
    slow.save_pretrained(folder / part)
    store_as_4(folder)
    encoder = part.replace("tokenizer", "text_encoder")
    edit(folder / encoder / "config.json", vocab_size=len(slow))
    return slow


@pytest.mark.parametrize("text", PROMPTS, ids=repr)
def test_words_that_a_folder_was_saved_with_are_those_of_diffusers(copy: Path, text: str) -> None:
    slow = add_words(copy, ADDED)
    converted = TextualInversionLoaderMixin().maybe_convert_prompt(text, slow)
    expected = slow(converted, padding="max_length", max_length=77).input_ids
    tokenizer = load_tokenizer(ModelConfig.read(copy))
    assert ids(tokenizer, text) == expected
    # The file alone knows the words: what a bundle has.
    assert prompt_tokenizer(tokenizer)([text])[0].tolist() == expected


def test_words_of_the_second_tokenizer(tmp_path: Path) -> None:
    folder = write_config("sdxl", tmp_path / "sdxl")
    add_words(folder, ADDED, "tokenizer_2")
    config = ModelConfig.read(folder)
    assert ids(load_tokenizer(config, "tokenizer_2"), "<Cat>")[1:4] == [49408, 49409, 49410]
    assert words_of(load_tokenizer(config)) == {}


def test_words_in_a_tokenizer_json(copy: Path) -> None:
    """The fast tokenizer's own file, with the words as anybody adds them and as ours has them."""
    fast = CLIPTokenizerFast.from_pretrained(copy, subfolder="tokenizer")
    fast.add_tokens(list(ADDED))
    fast.save_pretrained(copy / "tokenizer")
    edit(copy / "text_encoder/config.json", vocab_size=len(fast))
    first = load_tokenizer(ModelConfig.read(copy))
    assert ids(first, "<Cat> <cat>")[1:4] == [49408, 49409, 49410]
    first.save_pretrained(copy / "tokenizer")
    (copy / "tokenizer/added_tokens.json").unlink(missing_ok=True)
    again = load_tokenizer(ModelConfig.read(copy))
    assert words_of(again) == words_of(first)
    assert [ids(again, text) for text in PROMPTS] == [ids(first, text) for text in PROMPTS]


FLAGGED = (
    AddedToken("<Cat>", normalized=False),
    AddedToken("<Cat>_1", normalized=False),
    AddedToken("<Dog>", normalized=True, lstrip=True, rstrip=True),
    AddedToken("<Owl>", normalized=False, lstrip=True),
    AddedToken("<Elk>", normalized=False, rstrip=True),
)


@pytest.mark.parametrize("saved_by", ["slow", "fast"])
def test_words_that_are_found_before_the_text_is_normalized(copy: Path, saved_by: str) -> None:
    """``AddedToken`` has flags of where a word is found, and of the white space around it."""
    fast = CLIPTokenizerFast.from_pretrained(copy, subfolder="tokenizer")
    slow = add_words(copy, FLAGGED)
    if saved_by == "fast":
        fast.add_tokens(list(FLAGGED))
        fast.save_pretrained(copy / "tokenizer")
        saved = json.loads((copy / "tokenizer/tokenizer.json").read_text(encoding="utf-8"))
        assert not saved["added_tokens"][-1]["normalized"]
    tokenizer = load_tokenizer(ModelConfig.read(copy))
    for text in ("a <Cat> b", "a  <Dog>  b", "a  <Owl>  b<Elk>  c", "<Cat><Dog>x<Owl>", "<cat>"):
        converted = TextualInversionLoaderMixin().maybe_convert_prompt(text, slow)
        expected = slow(converted, padding="max_length", max_length=77).input_ids
        assert ids(tokenizer, text) == expected
        assert prompt_tokenizer(tokenizer)([text])[0].tolist() == expected


# What CLIPTokenizerFast of transformers 4.57.6 makes of vocab.json and merges.txt.
SPECIAL = {
    "single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": True,
}  # fmt: skip
BUILT = {
    "truncation": None,
    "padding": None,
    "normalizer": {
        "type": "Sequence",
        "normalizers": [
            {"type": "NFC"},
            {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
            {"type": "Lowercase"},
        ],
    },
    "pre_tokenizer": {
        "type": "Sequence",
        "pretokenizers": [
            {
                "type": "Split",
                "pattern": {
                    "Regex": r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""
                },
                "behavior": "Removed",
                "invert": True,
            },
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
             "use_regex": True},
        ],
    },
    "post_processor": {
        "type": "RobertaProcessing",
        "sep": ["<|endoftext|>", 49407],
        "cls": ["<|startoftext|>", 49406],
        "trim_offsets": False,
        "add_prefix_space": False,
    },
    "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True,
                "use_regex": True},
    "model": {
        "type": "BPE", "dropout": None, "unk_token": "<|endoftext|>",
        "continuing_subword_prefix": "", "end_of_word_suffix": "</w>", "fuse_unk": False,
        "byte_fallback": False, "ignore_merges": False,
    },
}  # fmt: skip
START = {"id": 49406, "content": "<|startoftext|>", **SPECIAL}
END = {"id": 49407, "content": "<|endoftext|>", **SPECIAL}
PAD = {"id": 0, "content": "!", **SPECIAL, "normalized": False}


@pytest.mark.parametrize(
    ("name", "part", "tokens"),
    [("sd15", "tokenizer", [START, END]), ("sdxl", "tokenizer_2", [PAD, START, END])],
)
def test_what_is_built_of_vocabulary_and_merges(
    tmp_path: Path, name: str, part: str, tokens: list[dict[str, Any]]
) -> None:
    """A bundle has it, so that it is the same whatever version of transformers exported it."""
    folder = write_config(name, tmp_path / name)
    built = load_tokenizer(ModelConfig.read(folder), part).backend_tokenizer.to_str()
    content = json.loads(built)
    model = content["model"]
    vocabulary = json.loads((folder / part / "vocab.json").read_text(encoding="utf-8"))
    assert model.pop("vocab") == vocabulary
    assert [" ".join(pair) for pair in model.pop("merges")] == (
        (folder / part / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    )
    assert content["added_tokens"] == tokens
    assert {key: content[key] for key in BUILT} == BUILT


@pytest.mark.parametrize("normalized", [True, False])
def test_special_tokens_in_capitals(copy: Path, normalized: bool) -> None:
    """A file may say whether they are found before lower-casing; if none does, after."""
    words = ("<|startoftext|>", "<|endoftext|>")
    if not normalized:
        tokens = {}
        for key, word in zip(("bos_token", "eos_token"), words, strict=True):
            tokens[key] = {"content": word, **SPECIAL, "normalized": False}
            del tokens[key]["special"]
        edit(copy / "tokenizer/special_tokens_map.json", unk_token=tokens["eos_token"], **tokens)
    tokenizer = load_tokenizer(ModelConfig.read(copy))
    numbers = ids(tokenizer, "a <|ENDOFTEXT|> b")
    assert numbers[:2] == [49406, 320]
    assert (numbers[2:5] == [49407, 321, 49407]) is normalized


@pytest.mark.parametrize("store", [store_as_4, store_as_5])
def test_both_layouts_of_a_folder_give_one_tokenizer(
    copy: Path, sd15: Path, store: Callable
) -> None:
    store(copy)
    assert (copy / "tokenizer/vocab.json").exists() is (store is store_as_4)
    tokenizer = load_tokenizer(ModelConfig.read(copy))
    expected = load_tokenizer(ModelConfig.read(sd15))
    assert [ids(tokenizer, text) for text in TEXTS] == [ids(expected, text) for text in TEXTS]


def test_a_tokenizer_for_each_version_is_refused(copy: Path) -> None:
    edit(copy / "tokenizer/tokenizer_config.json", fast_tokenizer_files=["tokenizer.4.0.0.json"])
    with pytest.raises(HipaError, match=r"each version of transformers .*tokenizer\.json alone"):
        load_tokenizer(ModelConfig.read(copy))


def test_every_version_can_read_what_is_saved(copy: Path) -> None:
    """The slow tokenizer of version 4 reads vocabulary, merges and added tokens."""
    add_words(copy, ADDED)
    tokenizer = load_tokenizer(ModelConfig.read(copy))
    expected = [ids(tokenizer, text) for text in PROMPTS]
    shutil.rmtree(copy / "tokenizer")
    (copy / "tokenizer").mkdir()
    save_tokenizer(tokenizer, copy / "tokenizer")
    names = {path.name for path in (copy / "tokenizer").iterdir()}
    assert names >= {"vocab.json", "merges.txt", "added_tokens.json", "tokenizer.json"}
    assert len(json.loads((copy / "tokenizer/added_tokens.json").read_text())) == len(ADDED)
    again = load_tokenizer(ModelConfig.read(copy))
    assert [ids(again, text) for text in PROMPTS] == expected


def test_a_word_of_too_many_vectors(copy: Path) -> None:
    add_words(copy, ("<x>", *(f"<x>_{number}" for number in range(1, 76))))
    with pytest.raises(HipaError, match=r"words of embeddings that a bundle cannot have: .* 76 "):
        load_tokenizer(ModelConfig.read(copy))
    (copy / "tokenizer/added_tokens.json").unlink()
    edit(copy / "tokenizer/tokenizer_config.json", added_tokens_decoder={})
    add_words(copy, ("<x>", *(f"<x>_{number}" for number in range(1, 75))))
    text = rust_tokenizer(load_tokenizer(ModelConfig.read(copy))).to_str()
    assert tokenizer_problem(text) is None

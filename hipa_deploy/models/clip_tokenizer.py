"""The tokenizer of a diffusers folder: the one reader for training, evaluation and export.

transformers has two tokenizers of CLIP, and they give different ids. The slow one
(``CLIPTokenizer``), without the package ftfy, puts spaces around Chinese and Japanese characters
and drops control characters, U+200B and the joiners of emoji. The fast one (``CLIPTokenizerFast``)
keeps them, as OpenAI's own does apart from ftfy's repairs
(https://github.com/openai/CLIP/blob/main/clip/simple_tokenizer.py). A bundle runs the fast one's
Rust part, so training reads the fast one too.

An embedding of textual inversion gives a prompt a new word. One word may have several vectors.
diffusers then has the tokens TOKEN, TOKEN_1, TOKEN_2, and its ``maybe_convert_prompt`` writes all
of them where a prompt has TOKEN. Here the tokenizer does so itself: a rule of its normalizer
replaces the word by the tokens of its vectors, whose names are characters of Unicode's private use.
So ``tokenizer.json`` alone reads a prompt rightly.

Version 4 of transformers takes ``tokenizer.json`` as it is. Version 5 takes vocabulary and merges
from it, and builds the rest anew: the rules of words are lost. Of ``vocab.json`` and
``merges.txt``, both build the same but for the pattern that splits a text, and for whether the
special tokens are found in capitals too. So what was loaded is corrected here to version 4's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hipa_deploy.bundle.tokenizer_file import (
    MAX_TOKENIZER,
    PRIVATE,
    tokenizer_problem,
    without_words,
)
from hipa_deploy.disk.reading import check_file, read_text
from hipa_deploy.errors import HipaError, as_line
from hipa_deploy.generate.tokenizer import PromptTokenizer
from hipa_deploy.models.model_config import ModelConfig
from hipa_deploy.models.weights.part_config import read_config

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import CLIPTokenizerFast

SETTINGS = "tokenizer_config.json"
WHOLE = "tokenizer.json"
ADDED = "added_tokens.json"
SPECIAL = "special_tokens_map.json"
BY_VERSION = "fast_tokenizer_files"
# Of CLIPConverter in transformers 4. Special tokens are found before a text is split, so version 5,
# which has them in the pattern too, gives the same numbers.
WORDS = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


def load_tokenizer(config: ModelConfig, part: str = "tokenizer") -> CLIPTokenizerFast:
    """The tokenizer of a model, in its Rust form, with a length that the text encoder can read.

    The folder may have ``tokenizer.json``, or ``vocab.json`` and ``merges.txt``, from which it is
    made. Its length is the smaller of ``model_max_length`` and the text encoder's number of
    positions: published folders leave the former out, or give 10**30.

    A folder that was saved with embeddings has their words among its added tokens. They are found
    as diffusers finds them: exactly as they are written, and a word of several vectors is all of
    them. One difference remains: where TOKEN and TOKEN_1 stand in one prompt, diffusers reads
    TOKEN_1 as all of TOKEN's vectors and more, and here it is its one vector.

    Args:
        config: of the model.
        part: 'tokenizer', or 'tokenizer_2' of a model with two text encoders.

    Raises:
        HipaError: the files are missing or damaged, cannot be read as a fast tokenizer, have no
            padding token, have more tokens than the text encoder, or have too many added words; or
            which of them is read would depend on the version of transformers.

    """
    from transformers import CLIPTokenizerFast

    folder = config.folder / part
    encoder = config.text_parts[part.replace("tokenizer", "text_encoder")]
    _check_files(folder)
    with as_line(
        f"{folder} cannot be loaded as CLIP's fast tokenizer",
        "Expected tokenizer.json, or vocab.json and merges.txt. Copy the model again.",
    ):
        tokenizer = CLIPTokenizerFast.from_pretrained(
            config.folder, subfolder=part, local_files_only=True
        )
        _correct_backend(tokenizer, folder)
    if tokenizer.pad_token_id is None:
        raise HipaError(
            f"{folder} has no padding token. Expected pad_token in tokenizer_config.json: "
            '"<|endoftext|>" for Stable Diffusion 1.x, "!" for 2.x.'
        )

    # The embedding of a token beyond the table would be an index error in the middle of a training.
    rows = int(encoder["vocab_size"])
    if len(tokenizer) > rows:
        raise HipaError(
            f"{folder} has {len(tokenizer)} tokens, the text encoder {rows}. "
            "Expected both from the same model. Copy the model again."
        )
    positions = int(encoder["max_position_embeddings"])
    tokenizer.model_max_length = min(int(tokenizer.model_max_length), positions)
    _use_added_words(tokenizer, folder)
    return tokenizer


def _correct_backend(tokenizer: CLIPTokenizerFast, folder: Path) -> None:
    """Give a tokenizer the Rust part that transformers 4 reads from ``folder``, in place.

    Args:
        tokenizer: loaded from ``folder``, by any version of transformers.
        folder: of the tokenizer.

    Raises:
        HipaError: which file is read would depend on the version of transformers.
        ValueError: tokenizer.json is no tokenizer of CLIP.

    """
    settings = read_config(folder, SETTINGS) if (folder / SETTINGS).is_file() else {}
    if settings.get(BY_VERSION):
        raise HipaError(
            f"{folder}: {SETTINGS} names a tokenizer for each version of transformers "
            f"({BY_VERSION}). Expected {WHOLE} alone. Remove that key in a copy of the folder."
        )
    if (folder / WHOLE).is_file():
        _take_file(tokenizer, folder / WHOLE)
    else:
        _build_as_before(tokenizer, _stated_flags(folder, settings))


def _take_file(tokenizer: CLIPTokenizerFast, path: Path) -> None:
    """Replace the Rust part by that of a file, with the tokens that were added on loading."""
    from tokenizers import Tokenizer, pre_tokenizers

    own: Any = tokenizer.backend_tokenizer
    whole: Any = Tokenizer.from_file(str(path))
    if not isinstance(whole.pre_tokenizer, pre_tokenizers.Sequence):
        raise ValueError("its pre_tokenizer is not CLIP's")
    added = own.get_added_tokens_decoder()
    # In the order of their numbers: a token that the file lacks gets the next number.
    whole.add_tokens([added[number] for number in sorted(added)])
    own.__setstate__(whole.to_str().encode())


def _build_as_before(tokenizer: CLIPTokenizerFast, stated: Mapping[str, bool]) -> None:
    """Correct what was built of vocabulary and merges, by what the files say of tokens."""
    from tokenizers import Regex, pre_tokenizers

    words = pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True)
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own: Any = tokenizer.backend_tokenizer
    own.pre_tokenizer = pre_tokenizers.Sequence([words, letters])

    # Version 4 looks for these after lower-casing, unless a file says otherwise.
    special = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token}
    content = json.loads(own.to_str())
    changed = False
    for token in content["added_tokens"]:
        if token["special"] and token["content"] in special:
            normalized = stated.get(token["content"], True)
            changed = changed or token["normalized"] != normalized
            token["normalized"] = normalized
    # A token that is added once more with another flag is stored with it, and found without it.
    if changed:
        own.__setstate__(json.dumps(content).encode())


def _stated_flags(folder: Path, settings: Mapping[str, Any]) -> dict[str, bool]:
    """Which tokens the files say are looked for after a text is normalized, or before."""
    values = [*settings.values()]
    if "added_tokens_decoder" in settings:
        values += settings["added_tokens_decoder"].values()
    elif (folder / SPECIAL).is_file():
        values += read_config(folder, SPECIAL).values()
    stated = {}
    for value in values:
        if isinstance(value, dict) and "content" in value:
            stated[str(value["content"])] = bool(value.get("normalized", False))
    return stated


def save_tokenizer(tokenizer: CLIPTokenizerFast, folder: Path) -> None:
    """Write all files of a tokenizer, so that every version of transformers can read them.

    Version 5 writes ``tokenizer.json`` alone. The slow tokenizer of version 4 reads the others.

    Args:
        tokenizer: from ``load_tokenizer``.
        folder: where to write; it exists.

    """
    tokenizer.save_pretrained(folder)
    rust: Any = tokenizer.backend_tokenizer
    rust.model.save(str(folder))  # vocab.json and merges.txt
    vocabulary = rust.get_vocab(with_added_tokens=False)
    every = rust.get_vocab(with_added_tokens=True)
    added = {token: number for token, number in every.items() if token not in vocabulary}
    if added:
        text = json.dumps(dict(sorted(added.items(), key=lambda item: item[1])), indent=2)
        (folder / ADDED).write_text(text + "\n", encoding="utf-8")


def words_of(tokenizer: CLIPTokenizerFast) -> dict[str, str]:
    """The words of embeddings that a tokenizer has, and what each is replaced by: vectors' names.

    Example:
        >>> words_of(load_tokenizer(ModelConfig.read(Path("stable-diffusion-v1-5"))))
        {}

    """
    normalizer: Any = tokenizer.backend_tokenizer.normalizer
    rules: list[dict[str, Any]] = []
    if normalizer is not None:
        without_words(json.loads(normalizer.__getstate__()), rules)
    return {rule["pattern"]["String"]: rule["content"] for rule in rules}


def set_words(tokenizer: CLIPTokenizerFast, words: Mapping[str, str]) -> None:
    """Replace the words of embeddings in a tokenizer, in place.

    Args:
        tokenizer: it has added tokens of the names.
        words: as ``words_of`` has them; they are all that the tokenizer then has.

    """
    from tokenizers import normalizers

    rust: Any = tokenizer.backend_tokenizer
    # A rule takes every place where its word stands: TOKEN begins TOKEN_1, and 'bad' 'bad_hands'.
    # All rules come before lower-casing: a word may have capitals.
    steps: list[Any] = []
    for word in sorted(words, key=len, reverse=True):
        rule = {"type": "Replace", "pattern": {"String": word}, "content": words[word]}
        steps.append(rule)
    if rust.normalizer:
        usual = without_words(json.loads(rust.normalizer.__getstate__()), [])
        steps += usual["normalizers"] if usual["type"] == "Sequence" else [usual]
    whole: Any = normalizers.Sequence([])
    whole.__setstate__(json.dumps({"type": "Sequence", "normalizers": steps}).encode())
    rust.normalizer = whole


def unused_names(vocabulary: Iterable[str], count: int) -> list[str]:
    """Names for ``count`` vectors that no token of a vocabulary has."""
    used = [ord(word) for word in vocabulary if len(word) == 1 and ord(word) in PRIVATE]
    first = max(used, default=PRIVATE.start - 1) + 1
    return [chr(first + number) for number in range(count)]


def _use_added_words(tokenizer: CLIPTokenizerFast, folder: Path) -> None:
    """Let rules find the words that a folder's tokenizer has beside its vocabulary, in place.

    The library would look for them after lower-casing, and would take the first vector alone.

    Raises:
        HipaError: they are more, or longer, than a bundle may have.

    """
    words = _added_words(tokenizer)
    if not words:
        return
    names = dict(zip(words, unused_names(tokenizer.get_vocab(), len(words)), strict=True))
    replacements = words_of(tokenizer)
    for word in words:
        replacements[word] = "".join(names[vector] for vector in _vectors_of(word, names))

    # A token cannot be renamed, and its number is the row of the text encoder. So the tokenizer is
    # read once more from its own text, with the names in the words' places.
    rust: Any = tokenizer.backend_tokenizer
    content = json.loads(rust.to_str())
    for token in content["added_tokens"]:
        if token["content"] in names:
            token["content"] = names[token["content"]]
            # The name is in the text only once the normalizer has put it there. What is stripped
            # around a word is white space, which the splitting into words drops in any case.
            token.update(normalized=True, lstrip=False, rstrip=False)
    rust.__setstate__(json.dumps(content).encode())
    set_words(tokenizer, replacements)
    problem = tokenizer_problem(rust.to_str())
    if problem:
        raise HipaError(
            f"{folder} has words of embeddings that a bundle cannot have: {problem}. Use the model "
            "without them, and give those that you need with --embedding."
        )


def _added_words(tokenizer: CLIPTokenizerFast) -> list[str]:
    """The words that somebody added to a tokenizer; the order is that of their numbers."""
    rust: Any = tokenizer.backend_tokenizer
    words = []
    for _, token in sorted(rust.get_added_tokens_decoder().items()):
        # Those with private characters have their rules already.
        is_plain = not any(ord(letter) in PRIVATE for letter in token.content)
        if is_plain and not token.special and not token.single_word:
            words.append(token.content)
    if words:
        vocabulary = rust.get_vocab(with_added_tokens=False)
        words = [word for word in words if word not in vocabulary]
    return words


def _vectors_of(word: str, added: Mapping[str, str]) -> list[str]:
    """The tokens of a word's vectors, as diffusers looks for them: WORD, WORD_1, WORD_2."""
    found = [word]
    while f"{word}_{len(found)}" in added:
        found.append(f"{word}_{len(found)}")
    return found


def _check_files(folder: Path) -> None:
    """Check every file that transformers may read, before its library in Rust believes it.

    Raises:
        HipaError: no folder, a file that is too large or no regular one, or a tokenizer.json that
            asks for too much.

    """
    if not folder.is_dir():
        raise HipaError(f"{folder} does not exist. Expected a tokenizer. Copy the model again.")
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".txt"):
            check_file(path, MAX_TOKENIZER, "Copy the model again.")
        # transformers reads tokenizer.VERSION.json as well, where the configuration says so.
        if path.suffix == ".json" and path.name.startswith("tokenizer."):
            problem = tokenizer_problem(read_text(path, max_bytes=MAX_TOKENIZER))
            if problem:
                raise HipaError(f"{path} is not accepted: {problem}. Copy the model again.")


def rust_tokenizer(tokenizer: CLIPTokenizerFast) -> Tokenizer:
    """The Rust part, with length and padding inside: what a bundle's ``tokenizer.json`` holds."""
    rust: Any = tokenizer.backend_tokenizer
    length = tokenizer.model_max_length
    rust.enable_truncation(length)
    rust.enable_padding(length=length, pad_id=tokenizer.pad_token_id, pad_token=tokenizer.pad_token)
    return rust


def prompt_tokenizer(
    tokenizer: CLIPTokenizerFast, context_tokens: int | None = None
) -> PromptTokenizer:
    """The tokenizer as the runtime has it: the same code, from the same object.

    Args:
        tokenizer: from ``load_tokenizer``.
        context_tokens: of a context; None is one chunk.

    Raises:
        HipaError: ``context_tokens`` do not fit the text encoder.

    """
    text = rust_tokenizer(tokenizer).to_str()
    return PromptTokenizer.of(text, tokenizer.name_or_path, context_tokens)


def text_sizes(config: ModelConfig) -> tuple[int, int]:
    """Tokens that a model's text encoder reads at once, and its layers, for ``choose_text``.

    They are those of ``load_tokenizer``, from the files alone: nothing is imported for them.

    Raises:
        HipaError: a file cannot be read.

    """
    tokens = int(config.text_encoder["max_position_embeddings"])
    if (config.folder / "tokenizer" / "tokenizer_config.json").is_file():
        settings = read_config(config.folder, "tokenizer/tokenizer_config.json")
        length = settings.get("model_max_length")
        if isinstance(length, int | float) and length >= 1:
            tokens = int(min(length, tokens))
    return tokens, config.text_layers

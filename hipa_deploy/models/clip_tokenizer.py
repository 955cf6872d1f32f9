"""The tokenizer of a diffusers folder: the one reader for training, evaluation and export.

transformers has two tokenizers of CLIP, and they give different ids. The slow one
(``CLIPTokenizer``), without the package ftfy, puts spaces around Chinese and Japanese characters
and drops control characters, U+200B and the joiners of emoji. The fast one (``CLIPTokenizerFast``)
keeps them, as OpenAI's own does apart from ftfy's repairs
(https://github.com/openai/CLIP/blob/main/clip/simple_tokenizer.py). A bundle runs the fast one's
Rust part, so training reads the fast one too.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hipa_deploy.bundle.tokenizer_file import MAX_TOKENIZER, tokenizer_problem
from hipa_deploy.disk.reading import check_file, read_text
from hipa_deploy.errors import HipaError, as_line
from hipa_deploy.generate.tokenizer import PromptTokenizer
from hipa_deploy.models.model_config import ModelConfig
from hipa_deploy.models.weights.part_config import read_config

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import CLIPTokenizerFast


def load_tokenizer(config: ModelConfig, part: str = "tokenizer") -> CLIPTokenizerFast:
    """The tokenizer of a model, in its Rust form, with a length that the text encoder can read.

    The folder may have ``tokenizer.json``, or ``vocab.json`` and ``merges.txt``, from which it is
    made. Its length is the smaller of ``model_max_length`` and the text encoder's number of
    positions: published folders leave the former out, or give 10**30.

    Args:
        config: of the model.
        part: 'tokenizer', or 'tokenizer_2' of a model with two text encoders.

    Raises:
        HipaError: the files are missing or damaged, cannot be read as a fast tokenizer, have no
            padding token, or have more tokens than the text encoder.

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
    return tokenizer


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

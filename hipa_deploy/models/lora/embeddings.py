"""Textual inversion embeddings: new words of a tokenizer, with rows of their own (Gal et al. 2022).

The formats: diffusers' ``learned_embeds`` (.safetensors or .bin, {token: vectors}), and those of
AUTOMATIC1111 (.pt with ``string_to_param``, .safetensors with ``emb_params``). For the two text
encoders of SDXL one file has ``clip_l`` and ``clip_g``, as kohya's scripts and diffusers' advanced
ones write it; or each encoder has a file of one of the other formats, as of diffusers'
textual_inversion_sdxl.py.

One word may have several vectors. How a tokenizer reads such a word:
``hipa_deploy.models.clip_tokenizer``.

Shape suffixes: N vectors, D width of the text encoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hipa_deploy.bundle.manifest import EmbeddingInfo
from hipa_deploy.disk.hashing import file_sha256
from hipa_deploy.errors import HipaError
from hipa_deploy.models.clip_tokenizer import set_words, unused_names, words_of
from hipa_deploy.models.kind import SECOND
from hipa_deploy.models.lora.early_lora import SDXL_KEYS, is_for_both
from hipa_deploy.models.lora.tensor_file import finite, load_pickled, read_tensors
from hipa_deploy.models.style import EmbeddingChoice
from hipa_deploy.models.weights.weight_file import PICKLED, SAFETENSORS

if TYPE_CHECKING:
    from transformers import CLIPTokenizerFast, PreTrainedModel

FIRST = "text_encoder"
MOST_LETTERS = 200
MOST_VECTORS = 75  # a prompt of 77 tokens, without its first and last


@dataclass(frozen=True)
class Embedding:
    """An embedding, read.

    Attributes:
        path: its file.
        sha256: of the file.
        token: the word that stands for it in a prompt.
        vectors_ND: float32.
        part: the text encoder that it is for.

    """

    path: Path
    sha256: str
    token: str
    vectors_ND: Tensor
    part: str = FIRST

    @property
    def tokens(self) -> tuple[str, ...]:
        """A word for each vector, as diffusers names them: TOKEN, TOKEN_1, TOKEN_2."""
        more = [f"{self.token}_{number}" for number in range(1, len(self.vectors_ND))]
        return (self.token, *more)

    @property
    def info(self) -> EmbeddingInfo:
        """What a manifest says of it."""
        return EmbeddingInfo(
            name=self.path.name,
            sha256=self.sha256,
            token=self.token,
            vectors=len(self.vectors_ND),
        )


def read_embedding(chosen: EmbeddingChoice, width: int) -> Embedding:
    """Read the file of an embedding.

    Args:
        chosen: the file, and the token if the user gave one. Otherwise it is the file's own, or for
            a file of AUTOMATIC1111 the file's name without its ending, as that program has it.
        width: D of the model's text encoder.

    Raises:
        HipaError: a file that cannot be read, is no embedding or one for another model.

    Example:
        >>> read_embedding(EmbeddingChoice(Path("learned_embeds.safetensors")), 768).token
        '<cat-toy>'

    """
    path = chosen.path
    content = _content(path)
    if isinstance(content, Mapping) and set(SDXL_KEYS) & set(content):
        raise HipaError(
            f"{path} is an embedding for SDXL, with vectors for two text encoders. "
            "Expected one for SD 1.x or 2.x, as the model is."
        )
    own_token, vectors = _vectors(path, content)
    vectors_ND = _as_rows(path, vectors)
    if vectors_ND.shape[1] != width:
        raise HipaError(
            f"{path} holds vectors of width {vectors_ND.shape[1]}, the model's text encoder has "
            f"{width}. Use an embedding of this model's family: 768 is SD 1.x, 1024 is SD 2.x."
        )
    return Embedding(path, file_sha256(path), _token(chosen, own_token), vectors_ND)


def read_pair_embeddings(
    choices: Sequence[EmbeddingChoice], widths: Sequence[int]
) -> list[Embedding]:
    """Read the embeddings of a model with two text encoders, as SDXL is.

    Args:
        choices: the files, and their tokens as ``read_embedding`` takes them.
        widths: of the two encoders.

    Returns:
        Two for every token, one for each encoder.

    Raises:
        HipaError: as ``read_embedding``; or a token has vectors for one encoder alone, or not as
            many for one as for the other.

    Example:
        >>> pair = read_pair_embeddings([EmbeddingChoice(Path("cat.safetensors"))], (768, 1280))
        >>> [embedding.part for embedding in pair]
        ['text_encoder', 'text_encoder_2']

    """
    found: list[Embedding] = []
    for chosen in choices:
        found += _read_for_pair(chosen, widths)
    for embedding in found:
        _check_other_half(embedding, found)
    return found


def _check_other_half(embedding: Embedding, found: Sequence[Embedding]) -> None:
    """Raise HipaError unless the other encoder has as many vectors of the same token."""
    counts = {}
    for other in found:
        if other.token == embedding.token:
            counts[other.part] = len(other.vectors_ND)
    if len(counts) == 1:
        raise HipaError(
            f"{embedding.path} has vectors of {embedding.token!r} for {embedding.part} alone, "
            "and the model has two text encoders, as SDXL has. Expected a file with clip_l and "
            "clip_g; or give the file for the other encoder too, with the same token."
        )
    if counts[FIRST] != counts[SECOND]:
        raise HipaError(
            f"{embedding.path}: {embedding.token!r} has {counts[FIRST]} vectors for {FIRST} and "
            f"{counts[SECOND]} for {SECOND}. Expected as many for both."
        )


def _read_for_pair(chosen: EmbeddingChoice, widths: Sequence[int]) -> list[Embedding]:
    """What one file has for two text encoders: vectors for both, or for the one of their width."""
    path = chosen.path
    content = _content(path)
    by_width = dict(zip((FIRST, SECOND), widths, strict=True))
    found: dict[str, Tensor] = {}
    own_token = None
    if isinstance(content, Mapping) and is_for_both(path, content):
        for key, part in SDXL_KEYS.items():
            found[part] = _as_rows(path, content[key])
    else:
        own_token, vectors = _vectors(path, content)
        vectors_ND = _as_rows(path, vectors)
        fitting = [part for part, width in by_width.items() if width == vectors_ND.shape[1]]
        if len(fitting) > 1:
            raise HipaError(
                f"{path}: both text encoders are {widths[0]} wide, and the file does not say which "
                "one it is for. Expected a file with clip_l and clip_g."
            )
        found[fitting[0] if fitting else FIRST] = vectors_ND
    for part, vectors_ND in found.items():
        if vectors_ND.shape[1] != by_width[part]:
            raise HipaError(
                f"{path} holds vectors of width {vectors_ND.shape[1]}, and the model's text "
                f"encoders have {widths[0]} and {widths[1]}. Use an embedding of this model's "
                "family: SDXL's are 768 (clip_l) and 1280 (clip_g)."
            )
    token = _token(chosen, own_token)
    sha256 = file_sha256(path)
    return [Embedding(path, sha256, token, rows_ND, part) for part, rows_ND in found.items()]


def _content(path: Path) -> Any:
    """What an embedding's file holds."""
    ending = path.suffix.lower()
    if ending not in (SAFETENSORS, *PICKLED):
        endings = ", ".join((SAFETENSORS, *PICKLED))
        raise HipaError(f"{path} is no embedding file. Expected one that ends in: {endings}.")
    return read_tensors(path)[0] if ending == SAFETENSORS else load_pickled(path)


def _as_rows(path: Path, vectors: Any) -> Tensor:
    """Vectors float32 [N, D]."""
    if not isinstance(vectors, Tensor):
        raise HipaError(f"{path} holds a {type(vectors).__name__}. Expected an embedding.")
    vectors_ND = finite(path, "the embedding", vectors)
    if vectors_ND.dim() == 1:
        vectors_ND = vectors_ND[None]
    if vectors_ND.dim() != 2 or not 1 <= len(vectors_ND) <= MOST_VECTORS:
        raise HipaError(
            f"{path} holds an embedding of shape {list(vectors_ND.shape)}. "
            f"Expected 1 to {MOST_VECTORS} vectors."
        )
    return vectors_ND


def _token(chosen: EmbeddingChoice, own: str | None) -> str:
    """The word for an embedding: the user's, the file's own, or the file's name."""
    path = chosen.path
    token = (chosen.token or own or path.stem).strip()
    if not token or not token.isprintable() or len(token) > MOST_LETTERS:
        raise HipaError(
            f"{path}: {token!r} is no token. Expected 1 to {MOST_LETTERS} printable letters. "
            f"Give one after a colon: {path}:<word>."
        )
    return token


def _vectors(path: Path, content: Any) -> tuple[str | None, Tensor]:
    """The token that a file names, if it does, and its vectors."""
    if isinstance(content, Tensor):
        return None, content
    if not isinstance(content, Mapping):
        raise HipaError(f"{path} holds a {type(content).__name__}. Expected an embedding.")
    if "string_to_param" in content:
        params = content["string_to_param"]
        named = dict(params.items()) if hasattr(params, "items") else {}
        return None, _only(path, named)[1]
    if "emb_params" in content:
        return None, _only(path, {"emb_params": content["emb_params"]})[1]
    return _only(path, content)


def _only(path: Path, content: Mapping[str, Any]) -> tuple[str, Tensor]:
    """The one tensor of a mapping, and its name."""
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    if len(tensors) != 1 or len(tensors) != len(content):
        names = ", ".join(map(str, list(content)[:3])) or "nothing"
        raise HipaError(
            f"{path} holds {names}. Expected one embedding: {{token: vectors}} of diffusers, or "
            "string_to_param or emb_params of AUTOMATIC1111."
        )
    return next(iter(tensors.items()))


def add_tokens(tokenizer: CLIPTokenizerFast, embeddings: Sequence[Embedding]) -> list[list[int]]:
    """Add embeddings' tokens to ``tokenizer``, in place.

    A prompt's word is replaced exactly as it is written, upper and lower case included, wherever it
    stands. Where one word begins another, the longer one is found, whatever their order, and
    whether they are new or the model's own.

    Returns:
        For each embedding the id of each vector: the rows that the text encoder needs.

    Raises:
        HipaError: one of the tokens is a word of the tokenizer already.

    """
    from tokenizers import AddedToken

    vocabulary = tokenizer.get_vocab()
    words = words_of(tokenizer)
    for embedding in embeddings:
        for token in embedding.tokens:
            is_taken = token in vocabulary or token in words
            if is_taken or f"{token.lower()}</w>" in vocabulary:
                raise HipaError(
                    f"--embedding {embedding.path}: {token!r} is a word of the model already. "
                    f"Give another token after a colon: {_other_token(embedding, words)}."
                )

    rust: Any = tokenizer.backend_tokenizer
    every = sum(len(embedding.vectors_ND) for embedding in embeddings)
    unused = iter(unused_names(vocabulary, every))
    ids = []
    for embedding in embeddings:
        names = list(islice(unused, len(embedding.vectors_ND)))
        # Normalized, because they are looked for after the rules.
        rust.add_tokens([AddedToken(name, normalized=True, special=False) for name in names])
        # TOKEN is all vectors, TOKEN_1 the second alone, as in diffusers.
        words |= dict(zip(embedding.tokens[1:], names[1:], strict=True))
        words[embedding.token] = "".join(names)
        ids.append([rust.token_to_id(name) for name in names])
    set_words(tokenizer, words)
    return ids


def _other_token(embedding: Embedding, taken: Mapping[str, str]) -> str:
    """What to write for an embedding whose token is taken: its file and another token."""
    plain = embedding.token.replace("<", "").replace(">", "")
    token = f"<{plain}-2>" if f"<{plain}>" in taken else f"<{plain}>"
    return f"{embedding.path}:{token}"


@torch.no_grad()
def add_rows(encoder: PreTrainedModel, embedding: Embedding, ids: list[int]) -> None:
    """Give the tokens ``ids`` the vectors of ``embedding``, in place."""
    old: Any = encoder.get_input_embeddings()
    rows = max(len(old.weight), max(ids) + 1)
    table = nn.Embedding(
        rows, old.weight.shape[1], device=old.weight.device, dtype=old.weight.dtype
    )
    table.weight.zero_()
    table.weight[: len(old.weight)] = old.weight
    table.weight[ids] = embedding.vectors_ND.to(table.weight)
    table.requires_grad_(old.weight.requires_grad)
    encoder.set_input_embeddings(table)
    encoder.config.vocab_size = rows

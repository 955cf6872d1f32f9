"""A folder as transformers 4 stores it, and as version 5 does, whichever of them is installed.

Published models are stored as version 4 does. Version 5.6 and newer name the weights of
CLIPTextModel without 'text_model', and store a tokenizer as ``tokenizer.json`` alone.
"""

from __future__ import annotations

import json
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from packaging.version import Version
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer

PREFIX = "text_model."
INNER = ("embeddings.", "encoder.", "final_layer_norm.")


def store_as_4(folder: Path) -> Path:
    """Change a saved pipeline to what version 4 stores, in place."""
    for encoder in folder.glob("text_encoder*/model.safetensors"):
        weights = load_file(encoder)
        named = {}
        for name, weight in weights.items():
            named[PREFIX + name if name.startswith(INNER) else name] = weight.clone()
        save_file(named, encoder, metadata={"format": "pt"})
    for whole in folder.glob("tokenizer*/tokenizer.json"):
        if not (whole.parent / "vocab.json").exists():
            _split(whole)
    return folder


def _split(whole: Path) -> None:
    """Write the files of the slow tokenizer in place of ``tokenizer.json``."""
    rust = Tokenizer.from_file(str(whole))
    rust.model.save(str(whole.parent))
    known = rust.get_vocab(with_added_tokens=False)
    flags = {}
    added = {}
    for number, token in sorted(rust.get_added_tokens_decoder().items()):
        flags[str(number)] = {
            "content": token.content,
            "lstrip": token.lstrip,
            "normalized": token.normalized or token.special,
            "rstrip": token.rstrip,
            "single_word": token.single_word,
            "special": token.special,
        }
        if token.content not in known:
            added[token.content] = number
    path = whole.with_name("tokenizer_config.json")
    settings = json.loads(path.read_text()) | {"added_tokens_decoder": flags}
    path.write_text(json.dumps(settings))
    if added:
        whole.with_name("added_tokens.json").write_text(json.dumps(added))
    whole.unlink()


def store_as_5(folder: Path) -> Path:
    """Change a saved pipeline to what version 5 stores, in place."""
    from transformers import CLIPTokenizerFast

    for encoder in folder.glob("text_encoder/model.safetensors"):
        weights = load_file(encoder)
        bare = {name.removeprefix(PREFIX): weight.clone() for name, weight in weights.items()}
        save_file(bare, encoder, metadata={"format": "pt"})
    for part in folder.glob("tokenizer*"):
        if (part / "tokenizer.json").exists():
            continue
        tokenizer = CLIPTokenizerFast.from_pretrained(part)
        settings = {
            "backend": "tokenizers",
            "bos_token": tokenizer.bos_token,
            "eos_token": tokenizer.eos_token,
            "model_max_length": tokenizer.model_max_length,
            "pad_token": tokenizer.pad_token,
            "tokenizer_class": "CLIPTokenizer",
            "unk_token": tokenizer.unk_token,
        }
        for path in part.iterdir():
            path.unlink()
        tokenizer.backend_tokenizer.save(str(part / "tokenizer.json"))
        (part / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def find_as_written(tokenizer: Any) -> None:
    """Let a tokenizer find the words that are added to it exactly as they are written, in place.

    The slow tokenizer of version 4 does, and so diffusers does beside it. That of version 5 looks
    for them after lower-casing.
    """
    if not tokenizer.is_fast:
        return
    add = tokenizer.add_tokens

    def add_exact(words: Any, **settings: Any) -> int:
        words = [words] if isinstance(words, str | AddedToken) else words
        exact = []
        for word in words:
            exact.append(AddedToken(word, normalized=False) if isinstance(word, str) else word)
        return add(exact, **settings)

    tokenizer.add_tokens = add_exact


def transformers_takes_peft() -> bool:
    """Whether the installed transformers accepts the installed peft for its own models.

    transformers 5.24 wants peft 0.22, which is newer than what could be installed with it. The
    product gives transformers' models no adapters: it merges.
    """
    integration = import_module("transformers.integrations.peft")
    return Version(version("peft")) >= Version(getattr(integration, "MIN_PEFT_VERSION", "0"))

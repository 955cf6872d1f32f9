"""The LoRAs and embeddings that a user adds to a base model: ``--lora`` and ``--embedding``.

What is read here is the request alone. ``hipa_deploy.models.lora`` reads the files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hipa_deploy.bundle.manifest import EmbeddingInfo, LoraInfo
from hipa_deploy.disk.text_paths import take_text_paths
from hipa_deploy.errors import HipaError
from hipa_deploy.record import Record


@dataclass(frozen=True)
class LoraChoice:
    """One ``--lora``. The path may be text.

    Attributes:
        path: a file or a folder.
        scale: how strongly to merge it; 1.0 is as it was trained.

    """

    path: Path
    scale: float = 1.0

    def __post_init__(self) -> None:
        take_text_paths(self)


@dataclass(frozen=True)
class EmbeddingChoice:
    """One ``--embedding``. The path may be text.

    Attributes:
        path: a file.
        token: the word that stands for the embedding in a prompt; None is the file's own.

    """

    path: Path
    token: str | None = None

    def __post_init__(self) -> None:
        take_text_paths(self)


@dataclass(frozen=True)
class Style:
    """What is added to a base model before anything else is made of it.

    Attributes:
        loras: merged in this order into the UNet and the text encoder.
        embeddings: new words of the tokenizer and the text encoder.

    Example:
        >>> Style(loras=(LoraChoice(Path("style.safetensors"), 0.8),))
        Style(loras=(LoraChoice(path=PosixPath('style.safetensors'), scale=0.8),), embeddings=())

    """

    loras: tuple[LoraChoice, ...] = ()
    embeddings: tuple[EmbeddingChoice, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.loras or self.embeddings)


class StyleInfo(Record):
    """What files say of a style: it goes into manifests, and into the keys of caches.

    Attributes:
        loras: in the order in which they are merged.
        embeddings: in the order of their options.

    """

    loras: tuple[LoraInfo, ...] = ()
    embeddings: tuple[EmbeddingInfo, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.loras or self.embeddings)


def parse_style(loras: Sequence[str] | None, embeddings: Sequence[str] | None) -> Style:
    """The style that the values of ``--lora`` and ``--embedding`` ask for.

    Raises:
        HipaError: a path that does not exist, a scale that is no finite number, an empty token.

    Example:
        >>> parse_style(["style.safetensors:0.8"], None).loras[0].scale
        0.8

    """
    return Style(
        loras=tuple(parse_lora(text) for text in loras or ()),
        embeddings=tuple(parse_embedding(text) for text in embeddings or ()),
    )


def parse_lora(text: str) -> LoraChoice:
    """``FILE_OR_FOLDER[:SCALE]``. Only a number after the last colon is a scale.

    So a path may hold colons itself, as ``C:\\\\loras\\\\style.safetensors`` does.

    Raises:
        HipaError: the path does not exist, or the scale is not finite.

    """
    whole = Path(text)
    if text and whole.exists():
        return LoraChoice(whole)
    path, _, number = text.rpartition(":")
    scale = _number(number) if path else None
    if scale is None:
        path, scale = text, 1.0
    if not path or not Path(path).exists():
        raise HipaError(
            f"--lora {text}: {path or 'the path'} does not exist. Expected a LoRA's file or "
            "folder, and after a colon how strongly to merge it: style.safetensors:0.8."
        )
    if not math.isfinite(scale):
        raise HipaError(f"--lora {text}: the scale is not finite. Expected one such as 0.8.")
    return LoraChoice(Path(path), scale)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def parse_embedding(text: str) -> EmbeddingChoice:
    """``FILE[:TOKEN]``. The file is the longest part before a colon that exists.

    Raises:
        HipaError: there is no such file, or the token is empty.

    """
    if text and Path(text).is_file():
        return EmbeddingChoice(Path(text))
    colons = [place for place, letter in enumerate(text) if letter == ":"]
    for place in reversed(colons):
        path = Path(text[:place])
        if not path.is_file():
            continue
        token = text[place + 1 :].strip()
        if not token:
            raise HipaError(f"--embedding {text}: the token is empty. Give one, or no colon.")
        return EmbeddingChoice(path, token)
    raise HipaError(
        f"--embedding {text} does not exist. Expected a file of an embedding, and after a colon "
        "the word for it in prompts: cat.safetensors:<cat>."
    )


def check_same_loras(adaptor: Path, trained: Sequence[LoraInfo], given: Sequence[LoraInfo]) -> None:
    """Check that an adaptor meets the LoRAs that it was trained on.

    An adaptor of the plain base may be joined by any LoRAs. One that was trained on a styled model
    needs that model: the same LoRAs first, in the same order and at the same scales.

    Args:
        adaptor: its folder, for the message.
        trained: as the adaptor's metadata has them.
        given: those that are merged before the adaptor.

    Raises:
        HipaError: they are others; the message says which to give.

    """
    expected = [(lora.sha256, lora.scale) for lora in trained]
    if [(lora.sha256, lora.scale) for lora in given[: len(expected)]] == expected:
        return
    options = " ".join(f"--lora {lora.name}:{lora.scale:g}" for lora in trained)
    got = ", ".join(f"{lora.name}:{lora.scale:g}" for lora in given) or "none"
    raise HipaError(
        f"adaptor {adaptor} was trained on the model with LoRAs; got {got}. Give the same files "
        f"in the same order before any others: {options}."
    )

"""A CLIP of transformers in a local folder: its files, and the model that they hold.

Imports torch and transformers only where the model is loaded, so that a request can be checked
before.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hipa_deploy.disk.hashing import files_sha256
from hipa_deploy.errors import HipaError, as_line

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

SCORER = "alignment.scorer"  # the key of a recipe
FETCH_CLIP = "Fetch one: hf download openai/clip-vit-base-patch32 --local-dir clip-vit-base-patch32"


def check_clip_folder(folder: Path, what: str, fetch: str) -> None:
    """Check that a folder looks like a CLIP of transformers.

    Args:
        folder: what was given.
        what: the option or key that it was given with.
        fetch: the command that fetches one.

    Raises:
        HipaError: it does not; the message holds the command.

    """
    if not (folder / "config.json").is_file() or not clip_weights(folder):
        raise HipaError(
            f"{what} {folder} is no folder of transformers' CLIP (config.json and weights). {fetch}"
        )


def clip_weights(folder: Path) -> list[Path]:
    """The files of weights that transformers reads from a CLIP's folder."""
    # open_clip's own file lies in the same repositories, and transformers does not read it.
    for pattern in ("model*.safetensors", "pytorch_model*.bin"):
        found = sorted(folder.glob(pattern))
        if found:
            return found
    return []


def clip_sha256(folder: Path) -> str:
    """Hash of a CLIP's configuration and weights."""
    return files_sha256(folder, [folder / "config.json", *clip_weights(folder)])


def clip_config(folder: Path, what: str, fetch: str) -> Any:
    """The CLIPConfig of a folder.

    Raises:
        HipaError: it has none of a CLIP.

    """
    from transformers import CLIPConfig

    with as_line(f"{what} {folder} cannot be loaded", fetch):
        return CLIPConfig.from_pretrained(folder, local_files_only=True)


@dataclass(frozen=True)
class ClipParts:
    """What a folder of a CLIP holds.

    Attributes:
        model: the CLIPModel, in float32 and in its evaluation mode.
        tokenizer: its CLIPTokenizer.
        processor: its CLIPImageProcessor.

    """

    model: Any
    tokenizer: Any
    processor: Any

    def tokens(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Ids and mask of texts, int64 [B, tokens]; what is too long is cut."""
        tokens = self.tokenizer(
            list(texts),
            padding="max_length",
            max_length=self.model.config.text_config.max_position_embeddings,
            truncation=True,
            return_tensors="pt",
        )
        return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}


def load_clip(folder: Path, what: str, fetch: str) -> ClipParts:
    """The model, tokenizer and preprocessing of a folder.

    Args:
        folder: a CLIP of transformers.
        what: the option or key that it was given with, for messages.
        fetch: the command that fetches one, for messages.

    Raises:
        HipaError: the folder cannot be loaded.

    """
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

    with as_line(f"{what} {folder} cannot be loaded", fetch):
        model = CLIPModel.from_pretrained(folder, local_files_only=True)
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        processor = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
    return ClipParts(model.float().eval(), tokenizer, processor)

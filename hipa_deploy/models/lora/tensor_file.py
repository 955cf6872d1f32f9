"""Read the tensors of a small weights file, of a LoRA or an embedding: finite, in float32."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hipa_deploy.errors import HipaError, first_line
from hipa_deploy.models.lora.find_lora import PEFT_CONFIG, SAFETENSORS


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The file's tensors in float32, and peft's configuration where the file or folder has one.

    Raises:
        HipaError: a file that cannot be read, that holds anything but tensors, or none, or some
            that are not finite; a configuration that cannot be read.

    """
    metadata: Mapping[str, str] = {}
    if file.suffix.lower() == SAFETENSORS:
        stored, metadata = _read_safetensors(file)
    else:
        stored = load_pickled(file)
    if not isinstance(stored, Mapping) or not stored:
        raise HipaError(f"{file} holds no tensors. Copy the file again.")

    tensors = {}
    for name, value in stored.items():
        if not isinstance(value, Tensor):
            raise HipaError(
                f"{file}: {name} is a {type(value).__name__}, no tensor. Expected a LoRA's weights "
                "and nothing else."
            )
        tensors[str(name)] = finite(file, str(name), value)
    return tensors, _peft_config(file, metadata)


def finite(file: Path, name: str, value: Tensor) -> Tensor:
    """``value`` in float32.

    Raises:
        HipaError: it holds NaN or infinity.

    """
    value = value.detach().float()
    if not torch.isfinite(value).all():
        raise HipaError(f"{file}: {name} holds NaN or infinity. Expected finite weights.")
    return value


def load_pickled(file: Path) -> Any:
    """What a pickled file holds, if it is tensors and plain containers: nothing of it is run.

    Raises:
        HipaError: the file is damaged, or holds objects that could run code.

    """
    # The first scripts of textual inversion saved a ParameterDict, which is a container only.
    allowed: list[Any] = [torch.nn.ParameterDict]
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise HipaError(
            f"{file} is damaged, or holds more than tensors, which could run code when it is read. "
            "Convert it to .safetensors where you trust it."
        ) from None
    # A cut archive, an empty file and one of another kind each raise a class of their own.
    except Exception as error:
        raise HipaError(f"{file} cannot be read: {first_line(error)}") from None


def _read_safetensors(file: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
            names = list(opened.keys())
            return {name: opened.get_tensor(name) for name in names}, metadata
    except (OSError, SafetensorError) as error:
        raise HipaError(f"{file} cannot be read: {first_line(error)}") from None


def _peft_config(file: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """LoraConfig's values: from the header, as diffusers writes them, or from peft's own file."""
    try:
        if "lora_adapter_metadata" in metadata:
            # diffusers puts the part's name before each key; one file has one configuration a part.
            return dict(json.loads(metadata["lora_adapter_metadata"]))
        beside = file.with_name(PEFT_CONFIG)
        if beside.is_file():
            return dict(json.loads(beside.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise HipaError(f"{file}: its configuration cannot be read ({error}).") from None
    return {}

"""Read the tensors of a small weights file, of a LoRA or an embedding: finite, in float32."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from hipa_deploy.disk.reading import MIB, parse_json, read_json, shown
from hipa_deploy.errors import HipaError, as_line, brief, first_line
from hipa_deploy.models.lora.find_lora import PEFT_CONFIG, has_peft_config
from hipa_deploy.models.lora.kinds import refuse_ip_adapter
from hipa_deploy.models.weights import pickled
from hipa_deploy.models.weights.weight_file import SAFETENSORS

MAX_BYTES = 16_384 * MIB  # of a file; a LoRA with whole matrices has as many as its model


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

    refuse_ip_adapter(file, [str(name) for name in stored])
    tensors = {}
    for name, value in stored.items():
        if not isinstance(value, Tensor):
            raise HipaError(
                f"{file}: {brief(name)} is a {type(value).__name__}, no tensor. "
                "Expected a LoRA's weights and nothing else."
            )
        tensors[str(name)] = finite(file, str(name), value)
    return tensors, _peft_config(file, metadata)


def finite(file: Path, name: str, value: Tensor) -> Tensor:
    """``value`` in float32.

    Raises:
        HipaError: it holds NaN or infinity, or complex numbers.

    """
    if value.is_complex():
        raise HipaError(f"{file}: {shown(name)} holds complex numbers. Expected weights.")
    value = value.detach().float()
    if not torch.isfinite(value).all():
        raise HipaError(f"{file}: {shown(name)} holds NaN or infinity. Expected finite weights.")
    return value


def load_pickled(file: Path) -> Any:
    """What a pickled file holds, if it is tensors and plain containers: nothing of it is run.

    Raises:
        HipaError: the file is damaged, too large, or holds objects that could run code.

    """
    # The first scripts of textual inversion saved a ParameterDict, which is a container only.
    return pickled.load_pickled(file, allowed=[torch.nn.ParameterDict], max_bytes=MAX_BYTES)


def _read_safetensors(file: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    pickled.check_stored(file, MAX_BYTES, "Copy the file again.")
    with (
        as_line(f"{file} cannot be read", "Copy the file again."),
        safe_open(file, "pt") as opened,
    ):
        metadata = opened.metadata() or {}
        names = list(opened.keys())
        return {name: opened.get_tensor(name) for name in names}, metadata


def _peft_config(file: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """LoraConfig's values: from the header, as diffusers writes them, or from peft's own file."""
    if "lora_adapter_metadata" in metadata:
        # diffusers puts the part's name before each key; one file has one configuration a part.
        try:
            config = parse_json(metadata["lora_adapter_metadata"])
        except ValueError as error:
            raise HipaError(
                f"{file}: its configuration cannot be read ({first_line(error)}). "
                "Copy or convert the file again."
            ) from None
    else:
        if not has_peft_config(file):
            return {}
        config = read_json(file.with_name(PEFT_CONFIG), remedy="Copy it again.")
    if not isinstance(config, dict):
        raise HipaError(f"{file}: its configuration is no table. Copy or convert the file again.")
    return config

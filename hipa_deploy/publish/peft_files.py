"""The files that peft reads beside diffusers' own: ``adapter_config.json`` and its weights.

diffusers names a weight ``unet.LAYER.lora_A.weight``. ``PeftModel`` wraps the UNet, and names the
same weight ``base_model.model.LAYER.lora_A.weight``. The values are the same bytes; the names
differ in length, so that one file cannot serve both.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hipa_deploy.disk.reading import parse_json
from hipa_deploy.errors import HipaError
from hipa_deploy.models.adaptor_folder import WEIGHTS, AdaptorMetadata
from hipa_deploy.models.weights.weight_file import LENGTH_BYTES, METADATA, read_layout

PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
DIFFUSERS_PREFIX = "unet."
PEFT_PREFIX = "base_model.model."
LORA_METADATA = "lora_adapter_metadata"  # diffusers' key of peft's configuration in the header


def write_peft_files(folder: Path, metadata: AdaptorMetadata, base_model: str | None) -> None:
    """Write peft's two files beside diffusers' weights, in the same folder.

    Args:
        folder: has ``pytorch_lora_weights.safetensors``.
        metadata: of the adaptor.
        base_model: the base model's id on the hub; None where it has none.

    Raises:
        HipaError: the weights are damaged, or are not a UNet's as hipa-train names them.

    Example:
        >>> write_peft_files(folder, read_metadata(folder), "stabilityai/stable-diffusion-2-1-base")
        >>> unet = PeftModel.from_pretrained(unet, folder)

    """
    source = folder / WEIGHTS
    read_layout(source)  # checks that the header fits the file
    with source.open("rb") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        header = json.loads(file.read(length))
        values = file.read()

    stored = header.pop(METADATA, {})
    renamed: dict[str, Any] = {METADATA: {"format": "pt"}}
    for name, entry in header.items():
        if not name.startswith(DIFFUSERS_PREFIX):
            raise HipaError(
                f"{source} has the weight {name!r}, which is no weight of a UNet. Expected an "
                "adaptor that hipa-train wrote."
            )
        renamed[PEFT_PREFIX + name.removeprefix(DIFFUSERS_PREFIX)] = entry

    # The values begin at a multiple of 8 bytes: the format fills its header up with spaces.
    text = json.dumps(renamed, separators=(",", ":")).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)
    (folder / PEFT_WEIGHTS).write_bytes(len(text).to_bytes(LENGTH_BYTES, "little") + text + values)

    config = _peft_config(source, stored, metadata)
    config["base_model_name_or_path"] = base_model
    config["inference_mode"] = True
    content = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (folder / PEFT_CONFIG).write_text(content, encoding="utf-8")


def _peft_config(source: Path, stored: dict[str, str], metadata: AdaptorMetadata) -> dict[str, Any]:
    """peft's LoraConfig: as diffusers stored it in the header, or made of the metadata."""
    if LORA_METADATA not in stored:
        return {
            "peft_type": "LORA",
            "r": metadata.rank,
            "lora_alpha": metadata.alpha,
            "target_modules": sorted(metadata.targets),
        }
    try:
        entries = parse_json(stored[LORA_METADATA])
    except ValueError:
        entries = None
    if not isinstance(entries, dict):
        raise HipaError(f"{source}: its configuration cannot be read. Copy the adaptor again.")
    config = {}
    for name, value in entries.items():
        if name.startswith(DIFFUSERS_PREFIX):
            config[name.removeprefix(DIFFUSERS_PREFIX)] = value
    return config

"""Read a LoRA file, in any layout, into the layers that it changes; nothing of it is left over.

A file that is half understood gives a wrong image without a word: an ``.alpha`` that is skipped
changes the strength, half a pair leaves a random matrix. So every tensor of the file must belong to
a layer of the model, and every layer must be whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hipa_deploy.errors import HipaError, first_line
from hipa_deploy.export.lora.formulas import kind_of, rank_of
from hipa_deploy.export.lora.names import LayerKey, ModuleNames, role_of
from hipa_deploy.hashing import file_sha256

# What the writers call the file in a folder.
FILE_NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
PEFT_CONFIG = "adapter_config.json"
SHOWN = 3  # names in a message


@dataclass(frozen=True)
class LoraLayer:
    """What a file says of one layer.

    Attributes:
        tensors: by role (``names.ROLES``), float32.
        scaling: what the change is multiplied by: alpha / rank, or what the format has in its
            place.
        rank: what alpha was divided by; None where the format has no rank.

    """

    tensors: Mapping[str, Tensor]
    scaling: float
    rank: int | None = None


@dataclass(frozen=True)
class LoraFile:
    """A LoRA, read whole.

    Attributes:
        path: the file.
        sha256: of the file.
        layers: what it changes, by layer.

    """

    path: Path
    sha256: str
    layers: Mapping[LayerKey, LoraLayer] = field(repr=False)

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of the pipeline that it changes: 'unet', 'text_encoder' or both."""
        return tuple(dict.fromkeys(key.part for key in self.layers))


def find_lora(path: Path) -> Path:
    """The file that ``path`` means: itself, or the one LoRA of a folder.

    Raises:
        HipaError: neither a file nor a folder with one.

    """
    if path.is_file():
        if path.suffix.lower() != ".safetensors":
            raise HipaError(
                f"{path} is no .safetensors file. Convert it: a pickled file can run code when it "
                "is read."
            )
        return path
    if not path.is_dir():
        raise HipaError(f"LoRA {path} does not exist. Expected a .safetensors file or its folder.")
    for name in FILE_NAMES:
        if (path / name).is_file():
            return path / name
    found = sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        if not found:
            raise HipaError(
                f"{path}: no {FILE_NAMES[0]} or other LoRA in it. Expected an adaptor folder, as "
                "hipa-train writes it, or a LoRA's .safetensors file."
            )
        names = ", ".join(file.name for file in found)
        raise HipaError(
            f"{path}: expected one LoRA in this folder, found {names}. Name the file itself."
        )
    return found[0]


def read_lora(path: Path, modules: ModuleNames) -> LoraFile:
    """Read the LoRA at ``path`` for a pipeline with these modules.

    Raises:
        HipaError: no LoRA; a damaged file; tensors that are not finite; tensors that no layer of
        the
            model takes; a layer that is not whole.

    """
    file = find_lora(path)
    tensors, config = _load(file)
    grouped = _by_layer(file, tensors, modules)
    layers = {}
    for key, roles in grouped.items():
        try:
            kind = kind_of(str(key), roles)
        except HipaError as error:
            raise HipaError(f"{file}: {error}") from None
        scaling = _scaling(key, kind, roles, config)
        layers[key] = LoraLayer(roles, scaling, rank_of(kind, roles))
    return LoraFile(file, file_sha256(file), layers)


def _load(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The file's tensors in float32, and peft's configuration where the file or folder has one."""
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name).float() for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise HipaError(f"{file} cannot be read: {first_line(error)}") from None
    if not tensors:
        raise HipaError(f"{file} holds no tensors. Copy the file again.")
    for name, value in tensors.items():
        if not torch.isfinite(value).all():
            raise HipaError(f"{file}: {name} holds NaN or infinity. Expected finite weights.")
    return tensors, _peft_config(file, metadata)


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


def _by_layer(
    file: Path, tensors: Mapping[str, Tensor], modules: ModuleNames
) -> dict[LayerKey, dict[str, Tensor]]:
    """The tensors by layer and role, after a check that each has a place."""
    grouped: dict[LayerKey, dict[str, Tensor]] = {}
    unknown = []
    foreign = []
    for name, value in tensors.items():
        split = role_of(name)
        if split is None:
            unknown.append(name)
            continue
        layer, role = split
        key = modules.find(layer)
        part = modules.part_of(layer)
        if part not in modules.parts:
            raise HipaError(
                f"{file} holds {layer}, a layer of the {part.replace('_', ' ')}. "
                f"Here a LoRA can change the {' and the '.join(modules.parts)} alone."
            )
        if key is None:
            foreign.append(layer)
            continue
        grouped.setdefault(key, {})[role] = value
    if unknown:
        raise HipaError(
            f"{file} holds {_some(unknown)}, which is no part of a LoRA that is known here. "
            "Expected diffusers, peft, kohya or LyCORIS."
        )
    if foreign:
        parts = " or ".join(modules.parts)
        raise HipaError(
            f"{file} does not fit this model: its {parts} has no layer {_some(foreign)}. "
            "Use the LoRA with the model family that it was trained on."
        )
    return grouped


def _some(names: list[str]) -> str:
    distinct = list(dict.fromkeys(names))
    more = f" ({len(distinct)} such)" if len(distinct) > 1 else ""
    return f"{distinct[0]}{more}"


def _scaling(
    key: LayerKey, kind: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> float:
    """What dW is multiplied by.

    A layer's own ``.alpha`` comes first, then peft's configuration with its patterns, then rank
    itself, which is the convention of a file that says nothing (diffusers and kohya alike).
    """
    settings = _of_part(config, key.part)
    rank = rank_of(kind, tensors)
    if rank is None and kind == "lokr" and "r" in settings:
        # peft divides by the rank that was asked for, also where both factors stayed whole.
        rank = _patterned(settings.get("rank_pattern"), key.module, settings["r"])
    if rank is None:  # a difference, or LyCORIS' LoKr with both factors whole: at full strength
        return 1.0
    if "alpha" in tensors:
        return float(tensors["alpha"]) / rank

    # LoraConfig calls it lora_alpha, LoHaConfig and LoKrConfig alpha.
    usual = settings.get("lora_alpha", settings.get("alpha"))
    alpha = _patterned(settings.get("alpha_pattern"), key.module, usual)
    if alpha is None:
        return 1.0
    if settings.get("use_rslora"):
        return float(alpha) / float(rank) ** 0.5
    return float(alpha) / rank


def _of_part(config: Mapping[str, Any], part: str) -> dict[str, Any]:
    """A part's configuration: diffusers writes 'unet.r', peft plain 'r'."""
    prefixed = {
        name.removeprefix(f"{part}."): value
        for name, value in config.items()
        if name.startswith(f"{part}.")
    }
    return prefixed or dict(config)


def _patterned(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """peft's rule: a pattern is a regular expression that the end of a module's name matches."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default

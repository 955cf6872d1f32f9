"""Read a LoRA, in any layout, into the layers that it changes; nothing of it is left over.

A file that is half understood gives a wrong image without a word: an ``.alpha`` that is skipped
changes the strength, half a pair leaves a random matrix. So every tensor of the file must belong to
a layer of the model, and every layer must be whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from hipa_deploy.errors import HipaError, as_line
from hipa_deploy.models.lora.find_lora import find_lora, lora_sha256
from hipa_deploy.models.lora.kinds import Shaped, kind_of, rank_of, refuse_ip_adapter
from hipa_deploy.models.lora.names import SECOND, LayerKey, ModuleNames, role_of
from hipa_deploy.models.lora.scaling import PeftSettings

if TYPE_CHECKING:
    from torch import Tensor

# Of each model family, the width of its text contexts.
FAMILIES = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL"}
SDXL_CONTEXT = 2048
MAX_SIDE = 65_536
AnyTensor = TypeVar("AnyTensor", bound=Shaped)
FAMILY = "Use the LoRA with the model family that it was trained on."


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
        path: the file, or the folder of several.
        sha256: of what was read.
        layers: what it changes, by layer.

    """

    path: Path
    sha256: str
    layers: Mapping[LayerKey, LoraLayer] = field(repr=False)

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of the pipeline that it changes: 'unet', 'text_encoder' or both."""
        return tuple(sorted({key.part for key in self.layers}, reverse=True))

    @property
    def rank(self) -> int | None:
        """The largest rank of its layers; None if no layer has a rank."""
        return max((layer.rank for layer in self.layers.values() if layer.rank), default=None)


def read_lora(path: Path, modules: ModuleNames) -> LoraFile:
    """Read the LoRA at ``path`` for a pipeline with these modules.

    Args:
        path: a file, or a folder that ``find_lora`` knows.
        modules: of the parts that the LoRA may change.

    Raises:
        HipaError: no LoRA; a damaged file; tensors that are not finite; tensors that no layer of
            the model takes, or that two names mean; a layer that is not whole.

    Example:
        >>> lora = read_lora(Path("style.safetensors"), module_names({"unet": unet}))
        >>> lora.parts
        ('unet',)

    """
    from hipa_deploy.models.lora.tensor_file import read_tensors

    files = find_lora(path)
    layers: dict[LayerKey, LoraLayer] = {}
    for file in files:
        tensors, config = read_tensors(file.path)
        settings = PeftSettings.of(file.path, config)
        for key, roles in by_layer(file.path, tensors, modules, file.part).items():
            if key in layers:
                raise HipaError(f"{path}: two files change {key}. Expected one for each part.")
            layers[key] = _layer(file.path, key, roles, settings)
    return LoraFile(files[0].path if len(files) == 1 else path, lora_sha256(files), layers)


def _layer(
    file: Path, key: LayerKey, roles: Mapping[str, Tensor], settings: PeftSettings
) -> LoraLayer:
    try:
        # A tensor of no dimensions where a matrix belongs, for one.
        with as_line(f"layer {key} cannot be read", "Copy or convert the file again."):
            _check_sizes(key, roles)
            kind = kind_of(str(key), roles)
            rank = rank_of(kind, roles)
            if rank == 0:
                raise HipaError(f"layer {key} has rank 0. Copy or convert the file again.")
            return LoraLayer(roles, settings.scaling(key, kind, rank, roles.get("alpha")), rank)
    except HipaError as error:
        raise HipaError(f"{file}: {error}") from None


def _check_sizes(key: LayerKey, roles: Mapping[str, Shaped]) -> None:
    """Refuse a side that no layer has: a product with it could need any amount of memory."""
    for role, value in roles.items():
        if max(value.shape, default=0) > MAX_SIDE:
            raise HipaError(
                f"layer {key} has a {role} of shape {list(value.shape)}. Expected at most "
                f"{MAX_SIDE} along each axis. Copy or convert the file again."
            )


def by_layer(
    file: Path, tensors: Mapping[str, AnyTensor], modules: ModuleNames, part: str | None
) -> dict[LayerKey, dict[str, AnyTensor]]:
    """The tensors by layer and role, after a check that each has a place.

    Args:
        file: for messages.
        tensors: by the names in the file: tensors, or what the file's header says of them.
        modules: of the parts that the LoRA may change.
        part: what the file is for, where its folder says so.

    """
    grouped: dict[LayerKey, dict[str, AnyTensor]] = {}
    unknown = []
    foreign: list[str] = []
    left_out: list[str] = []
    for name, value in tensors.items():
        split = role_of(name)
        if split is None:
            unknown.append(name)
            continue
        layer, role = split
        named = modules.part_of(layer) or part
        if named is not None and named not in modules.parts:
            raise HipaError(f"{file} holds {layer}, {_other_part(named, modules)}")
        family = modules.other_family(layer)
        if family is not None:
            raise HipaError(f"{file} is a LoRA for {family}, by the name of {layer}. {FAMILY}")
        _check_context(file, layer, role, value, modules)
        key = modules.find(f"{part}.{layer}" if modules.part_of(layer) is None and part else layer)
        if key is None:
            (left_out if modules.is_left_out(layer, part) else foreign).append(layer)
            continue
        roles = grouped.setdefault(key, {})
        if role in roles:
            raise HipaError(
                f"{file}: two tensors are the {role} of {key}, {name} the second. "
                "Expected one. Convert the file again."
            )
        roles[role] = value
    if unknown:
        refuse_ip_adapter(file, unknown)
        raise HipaError(
            f"{file} holds {_some(unknown)}, which is no part of a LoRA that is known here. "
            "Expected diffusers, peft, kohya or LyCORIS."
        )
    if not grouped:
        foreign += left_out
    if foreign:
        parts = " or ".join(part.replace("_", " ") for part in modules.parts)
        raise HipaError(
            f"{file} does not fit this model: its {parts} has no layer {_some(foreign)}. {FAMILY}"
        )
    return grouped


def _other_part(part: str, modules: ModuleNames) -> str:
    """What to say of a layer of a part that the LoRA may not change."""
    if part == SECOND and not modules.is_sdxl:
        return (
            "a layer of a second text encoder: this is a LoRA for SDXL. "
            "Expected one for SD 1.x or 2.x, as the model is."
        )
    allowed = " and the ".join(name.replace("_", " ") for name in modules.parts)
    text = f"a layer of the {part.replace('_', ' ')}. Here a LoRA can change the {allowed} alone."
    if part in ("text_encoder", SECOND):
        text += " Give it with --lora, which changes the text encoder too."
    return text


def check_family(file: Path, tensors: Mapping[str, Shaped], context_width: int) -> None:
    """Check that a LoRA is for models whose text contexts have a width.

    Args:
        file: for messages.
        tensors: what its header says of them, by name.
        context_width: of the model: 768 is SD 1.x, 1024 is SD 2.x, 2048 is SDXL.

    Raises:
        HipaError: it is another family's.

    """
    modules = ModuleNames({}, context_width)
    for name, value in tensors.items():
        split = role_of(name)
        if split is not None:
            _check_context(file, *split, value, modules)


def _check_context(file: Path, layer: str, role: str, value: Shaped, modules: ModuleNames) -> None:
    """Refuse another family's LoRAs by name: the width of its text contexts tells it."""
    is_key = layer.endswith(("attn2_to_k", "attn2.to_k", "attn2_to_v", "attn2.to_v"))
    if not is_key or role != "down" or not value.shape:
        return
    width = value.shape[-1]
    if width not in FAMILIES or width == modules.context_width:
        return
    # A LoRA for SDXL is known by its width alone; others fit a model whose width nobody knows.
    if modules.context_width is None and width != SDXL_CONTEXT:
        return
    if modules.is_sdxl:
        expected = "SDXL"
    else:
        expected = FAMILIES.get(modules.context_width or 0, "SD 1.x or 2.x")
    raise HipaError(
        f"{file} is a LoRA for {FAMILIES[width]}: {layer} takes text contexts {width} wide. "
        f"Expected one for {expected}, as the model is."
    )


def _some(names: list[str]) -> str:
    distinct = list(dict.fromkeys(names))
    more = f" ({len(distinct)} such)" if len(distinct) > 1 else ""
    return f"{distinct[0]}{more}"

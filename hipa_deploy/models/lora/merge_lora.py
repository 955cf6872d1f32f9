"""Merge a LoRA into the weights of a pipeline's parts, in place and in float32."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from hipa_deploy.errors import HipaError, as_line
from hipa_deploy.models.lora.formulas import weight_change, with_magnitude
from hipa_deploy.models.lora.kinds import kind_of
from hipa_deploy.models.lora.lora_file import LoraFile, LoraLayer
from hipa_deploy.models.lora.names import SECOND, LayerKey, ModuleNames
from hipa_deploy.models.text_context import text_module
from hipa_deploy.models.weights.load_part import TEXT_PREFIX

# What has a weight that a file may change: LyCORIS trains norm layers too, with a whole difference.
CHANGEABLE = (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm)


def module_names(parts: Mapping[str, nn.Module]) -> ModuleNames:
    """The layers that a LoRA may change: everything that has a weight, by its name in its part.

    A text encoder's layers have names with ``text_model.`` in every version of transformers.
    """
    names: dict[str, Iterable[str]] = {}
    context_width = None
    for part, model in parts.items():
        found = []
        prefix = TEXT_PREFIX if _is_bare_text(part, model) else ""
        for name, module in model.named_modules():
            if not isinstance(module, CHANGEABLE):
                continue
            found.append(prefix + name)
            if name.endswith("attn2.to_k") and isinstance(module, nn.Linear):
                context_width = module.in_features
        names[part] = found
    return ModuleNames(names, context_width)


@torch.no_grad()
def merge_lora(
    parts: Mapping[str, nn.Module], lora: LoraFile, scale: float = 1.0, option: str = "the scale"
) -> None:
    """Change the weights of ``parts`` ('unet', 'text_encoder') as ``lora`` says, times ``scale``.

    Every weight becomes W + scale * dW, with the dW of ``hipa_deploy.models.lora.formulas``. DoRA
    has no dW that a scale could multiply. There the weight becomes W + scale * (W' - W), with W'
    what the file alone makes of it (as ComfyUI does, comfy/weight_adapter).

    Args:
        parts: the models to change. Layers of other parts are left out.
        lora: what ``read_lora`` gave for these parts.
        scale: 1.0 merges the LoRA as it was trained, 0.0 changes nothing.
        option: what the user calls the scale, for messages.

    Raises:
        HipaError: a scale that is not finite, tensors that do not fit a layer, or a weight that
            would not be finite. Then no weight was changed.

    Example:
        >>> parts = {"unet": unet}
        >>> merge_lora(parts, read_lora(Path("style.safetensors"), module_names(parts)), 0.8)

    """
    check_scale(scale)

    # First compute every layer and keep none, so that one that does not fit leaves the model as it
    # was. All new weights at once would take as much memory as the model does.
    deque(_changed_layers(parts, lora, scale, option), maxlen=0)
    for changes in _changed_layers(parts, lora, scale, option):
        for parameter, value in changes:
            parameter.copy_(value)


def _changed_layers(
    parts: Mapping[str, nn.Module], lora: LoraFile, scale: float, option: str
) -> Iterator[list[tuple[nn.Parameter, Tensor]]]:
    """The parameters of each layer with their new values, one layer at a time."""
    for key, layer in lora.layers.items():
        if key.part not in parts:
            continue
        module = _module(parts[key.part], key)
        try:
            with as_line(f"layer {key} cannot be merged", "Copy or convert the file again."):
                changes = _changed(key, layer, module, scale, option)
        except HipaError as error:
            raise HipaError(f"{lora.path}: {error}") from None
        yield changes


def _is_bare_text(part: str, model: nn.Module) -> bool:
    """Whether a part is a text encoder whose own names lack ``text_model.``."""
    return part in ("text_encoder", SECOND) and text_module(model) is model


def _module(model: nn.Module, key: LayerKey) -> nn.Module:
    """The layer that a key names."""
    name = key.module
    if _is_bare_text(key.part, model):
        name = name.removeprefix(TEXT_PREFIX)
    return model.get_submodule(name)


def check_scale(scale: float) -> None:
    """Raise HipaError unless ``scale`` is a finite number."""
    if not math.isfinite(scale):
        raise HipaError(
            f"LoRA scale {scale} is not a number. Expected a finite value, 1.0 as trained."
        )


def _changed(
    key: LayerKey, layer: LoraLayer, module: nn.Module, scale: float, option: str
) -> list[tuple[nn.Parameter, Tensor]]:
    """The layer's parameters with their new values."""
    values = []
    if kind_of(str(key), layer.tensors) != "bias":
        values.append(_changed_weight(key, layer, module, scale))
    bias_change = _bias_change(layer)
    if bias_change is not None:
        bias = module.bias
        if not isinstance(bias, nn.Parameter):
            raise HipaError(
                f"layer {key}: the file changes its bias, and the model's layer has none."
            )
        if bias.shape != bias_change.shape:
            raise HipaError(
                f"layer {key}: the file changes {len(bias_change)} biases, "
                f"the model has {len(bias)}."
            )
        values.append((bias, bias.float() + scale * bias_change))
    for _, value in values:
        if not value.is_meta and not torch.isfinite(value).all():
            raise HipaError(f"layer {key}: merging makes it infinite. Lower {option} ({scale}).")
    return values


def _changed_weight(
    key: LayerKey, layer: LoraLayer, module: nn.Module, scale: float
) -> tuple[nn.Parameter, Tensor]:
    weight: nn.Parameter = module.weight  # type: ignore[assignment]
    base = weight.float()
    if {"magnitude", "dora_scale"} & set(layer.tensors):
        changed = base + weight_change(str(key), layer.tensors, base, layer.scaling)
        merged = with_magnitude(changed, layer.tensors)
        return weight, base + scale * (merged - base) if scale != 1 else merged
    return weight, base + weight_change(str(key), layer.tensors, base, layer.scaling * scale)


def _bias_change(layer: LoraLayer) -> Tensor | None:
    if "bias" in layer.tensors:  # peft scales it as the weight's change
        return layer.tensors["bias"] * layer.scaling
    return layer.tensors.get("bias_difference")  # LyCORIS stores the change itself

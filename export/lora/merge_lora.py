"""Merge a LoRA into the weights of a pipeline's parts, in place and in float32."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from hipa_deploy.errors import HipaError
from hipa_deploy.export.lora.formulas import weight_change, with_magnitude
from hipa_deploy.export.lora.lora_file import LoraFile, LoraLayer
from hipa_deploy.export.lora.names import LayerKey, ModuleNames


def module_names(parts: Mapping[str, nn.Module]) -> ModuleNames:
    """The layers that a LoRA may change: everything that has a weight, by its name in its part."""
    names: dict[str, Iterable[str]] = {}
    for part, model in parts.items():
        names[part] = [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d)
        ]
    return ModuleNames(names)


@torch.no_grad()
def merge_lora(parts: Mapping[str, nn.Module], lora: LoraFile, scale: float = 1.0) -> None:
    """Change the weights of ``parts`` ('unet', 'text_encoder') as ``lora`` says, times ``scale``.

    Every weight becomes W + scale * (W' - W), with W' what the file alone would make of it: the
    formulas are in ``hipa_deploy.export.lora.formulas``.

    Raises:
        HipaError: a scale that is not finite, tensors that do not fit a layer, or a weight that
            would not be finite. Then no weight was changed.

    """
    if not math.isfinite(scale):
        raise HipaError(
            f"LoRA scale {scale} is not a number. Expected a finite value, 1.0 as trained."
        )

    # First compute all, so that a layer that does not fit leaves the model as it was.
    weights: list[tuple[nn.Parameter, Tensor]] = []
    for key, layer in lora.layers.items():
        if key.part not in parts:
            continue
        module = parts[key.part].get_submodule(key.module)
        try:
            weights += _changed(key, layer, module, scale)
        except HipaError as error:
            raise HipaError(f"{lora.path}: {error}") from None
    for parameter, value in weights:
        parameter.copy_(value)


def _changed(
    key: LayerKey, layer: LoraLayer, module: nn.Module, scale: float
) -> list[tuple[nn.Parameter, Tensor]]:
    """The layer's parameters with their new values."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    base = weight.float()
    changed = base + weight_change(str(key), layer.tensors, base, layer.scaling)
    merged = with_magnitude(changed, layer.tensors)
    values = [(weight, base + scale * (merged - base) if scale != 1 else merged)]

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
        if not torch.isfinite(value).all():
            raise HipaError(f"layer {key}: merging makes it infinite. Lower the scale ({scale}).")
    return values  # type: ignore[return-value]


def _bias_change(layer: LoraLayer) -> Tensor | None:
    if "bias" in layer.tensors:  # peft scales it as the weight's change
        return layer.tensors["bias"] * layer.scaling
    return layer.tensors.get("bias_difference")  # LyCORIS stores the change itself

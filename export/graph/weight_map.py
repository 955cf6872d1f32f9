"""Trace every weight of an exported graph, by value, to the parameter of the model that it is.

torch's exporter keeps the names of many parameters. It loses those that it lays out anew: matrices
of linear layers are transposed, scales and shifts of group norms become [C, 1, 1]. And it merges
small weights that are equal into one. So each weight is compared, bit for bit, with the parameters
of the layers that use it.

A 'place' is a parameter's name in the diffusers folder, as 'unet.conv_in.weight'.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from hipa_deploy.bundle.adaptor_swap import Fold, MappedWeight, WeightLayout, WeightMap
from hipa_deploy.export.graph.conditioning import Conditioning
from hipa_deploy.export.graph.fold import NoTimeEmbedding, StepBias
from hipa_deploy.export.graph.modules import OneStepDecoder, OneStepEncoder, place_of
from hipa_deploy.export.graph.upsample import UpsampledConv

_SCOPES = "pkg.torch.onnx.name_scopes"
# In the order of upsample.PARITIES.
UPSAMPLINGS: tuple[Fold, ...] = (
    "upsampling 00",
    "upsampling 01",
    "upsampling 10",
    "upsampling 11",
)


def _as_it_is(value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
    return value if value.shape == shape else None


def _transposed(value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
    return value.T if value.ndim == 2 and value.shape[::-1] == shape else None


def _reshaped(value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
    return value.reshape(shape) if value.size == np.prod(shape) else None


# Each lays a parameter out in a shape, or gives None if it cannot. In the order they are tried: a
# square matrix that is symmetric counts as it is.
LAYOUTS: dict[WeightLayout, Callable[[np.ndarray, tuple[int, ...]], np.ndarray | None]] = {
    "as it is": _as_it_is,
    "transposed": _transposed,
    "reshaped": _reshaped,
}


def trace_weights(model: Any, module: nn.Module) -> WeightMap:
    """The places of all weights of an exported graph.

    A weight that is no parameter of the module is a constant of the graph: shapes, scales, masks.

    Args:
        model: an ``onnx_ir.Model`` that still has the exporter's metadata.
        module: the stage that it was exported from.

    """
    tensors = dict(_tensors(module))
    origins = dict(_replaced(module))
    folds = dict(_folds(module))
    for name, (_, fold) in origins.items():
        if fold:
            folds[name] = fold

    layers: dict[str, list[str]] = defaultdict(list)
    for name in tensors:
        layers[name.rpartition(".")[0]].append(name)

    # The timestep's biases hold the projection of its embedding, which an adaptor changes too.
    adaptable = _adaptable(module)
    for name, fold in folds.items():
        if fold in ("timestep", "timesteps") and place_of(module, name).startswith("unet."):
            adaptable.add(name)

    weights: dict[str, MappedWeight] = {}
    constants: list[str] = []
    for name, value in model.graph.initializers.items():
        sources: tuple[str, ...] = ()
        layout: WeightLayout = "as it is"
        if value.dtype.is_floating_point():
            sources, layout = _find(value, tensors, layers)
        if not sources:
            constants.append(name)
            continue
        places: list[str] = []
        for source in sources:
            original, _ = origins.get(source, (source, None))
            place = place_of(module, original)
            if place not in places:
                places.append(place)
        weights[name] = MappedWeight(
            places=tuple(places),
            layout=layout,
            fold=folds.get(sources[0]),
            adaptable=not adaptable.isdisjoint(sources),
        )
    return WeightMap(weights=weights, constants=tuple(constants))


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, buffers, and tensors that are plain attributes, by name."""
    yield from module.named_parameters()
    yield from module.named_buffers()
    for prefix, part in module.named_modules():
        for name, value in vars(part).items():
            if isinstance(value, Tensor) and name in getattr(part, "places", (name,)):
                yield f"{prefix}.{name}".lstrip("."), value


def _folds(module: nn.Module) -> Iterator[tuple[str, Fold]]:
    """Tensors that ``fold_timestep``, ``fold_encoder_output`` or ``fold_decoder_input`` changed."""
    for prefix, part in module.named_modules():
        dot = f"{prefix}." if prefix else ""
        # At one timestep the fold is in the biases; a table of several has a module of its own.
        if isinstance(part, UNet2DConditionModel | ControlNetModel) and isinstance(
            part.time_embedding, NoTimeEmbedding
        ):
            for name, block in part.named_modules():
                if isinstance(block, ResnetBlock2D):
                    yield f"{dot}{name}.conv1.bias", "timestep"
        # All that depends on the timestep alone, which is added in the text stage of SDXL.
        if isinstance(part, Conditioning):
            yield f"{dot}time_1SD", "timestep"
        if isinstance(part, OneStepEncoder):
            yield f"{dot}encoder.conv_out.weight", "encoder output"
            yield f"{dot}encoder.conv_out.bias", "encoder output"
        if isinstance(part, OneStepDecoder):
            yield f"{dot}decoder.conv_in.weight", "decoder input"
            yield f"{dot}offset", "decoder input"


def _replaced(module: nn.Module) -> Iterator[tuple[str, tuple[str, Fold | None]]]:
    """Parameters of modules that a fold put in, with the parameter that each comes from."""
    yield from _upsampled(module)
    for prefix, part in module.named_modules():
        if isinstance(part, StepBias):
            yield f"{prefix}.bias_KC", (f"{prefix.rpartition('.')[0]}.conv1.bias", "timesteps")


def _upsampled(module: nn.Module) -> Iterator[tuple[str, tuple[str, Fold | None]]]:
    """Parameters that ``fold_upsampling`` made, with the convolution's parameter of each.

    The fold names the parity of row and column, by which a kernel's weights were summed.
    """
    for prefix, part in module.named_modules():
        if not isinstance(part, UpsampledConv):
            continue
        parent, _, name = prefix.rpartition(".")
        # In a Sequential the convolution came after the upsampling, else it was inside of it.
        if isinstance(module.get_submodule(parent), nn.Sequential):
            conv = f"{parent}.{int(name) + 1}"
        else:
            conv = f"{prefix}.conv"
        for index, parity in enumerate(UPSAMPLINGS):
            yield f"{prefix}.parities.{index}.weight", (f"{conv}.weight", parity)
            yield f"{prefix}.parities.{index}.bias", (f"{conv}.bias", None)


def _adaptable(module: nn.Module) -> set[str]:
    """The weights that an adaptor can change: of the UNet's linear layers and convolutions."""
    names = set()
    for prefix, unet in module.named_modules():
        if not isinstance(unet, UNet2DConditionModel):
            continue
        for name, layer in unet.named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                names.add(f"{prefix}.{name}.weight".lstrip("."))
    return names


def _find(
    value: Any, tensors: dict[str, Tensor], layers: dict[str, list[str]]
) -> tuple[tuple[str, ...], WeightLayout]:
    """Names of the module's tensors that an initializer holds, and their layout.

    Args:
        value: the initializer, an ``onnx_ir.Value``.
        tensors: the module's, by name.
        layers: names of each layer's tensors, by the layer's name.

    Returns:
        No names if it holds none of them.

    """
    array = value.const_value.numpy()
    found: list[str] = []
    if value.name in tensors and _layout(tensors[value.name], array) == "as it is":
        found.append(value.name)

    # Then the layers that use it, each of which may hold an equal weight.
    for node in value.consumers():
        names = _names_near(node, layers)
        if any(name in found for name in names):
            continue
        matching = [name for name in names if _layout(tensors[name], array) is not None]
        found += _narrowed(matching, node)

    # An embedding of all positions is used beside its layer. A single number or a constant array
    # would match by chance.
    if not found and array.size > 1 and np.ptp(array) > 0:
        found = [name for name, tensor in tensors.items() if _layout(tensor, array) is not None]
    layout = _layout(tensors[found[0]], array) if found else None
    return tuple(found), layout or "as it is"


def _names_near(node: Any, layers: dict[str, list[str]]) -> list[str]:
    """Tensors of the innermost module around ``node`` that has any of its own."""
    scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
    # The last scope is the node itself.
    for scope in reversed(scopes[:-1]):
        if scope in layers:
            return layers[scope]
    return []


def _narrowed(names: list[str], node: Any) -> list[str]:
    """Of a layer's weight and bias that are equal, the one that ``node`` uses as such."""
    if len(names) < 2:
        return names
    role = "bias" if node.op_type == "Add" else "weight"
    narrowed = [name for name in names if name.endswith(role)]
    return narrowed or names


def _layout(tensor: Tensor, array: np.ndarray) -> WeightLayout | None:
    """The layout under which ``tensor`` is ``array``, bit for bit; None if it is not."""
    if tensor.numel() != array.size or str(tensor.dtype).removeprefix("torch.") != str(array.dtype):
        return None
    value = tensor.detach().numpy()
    for name, lay_out in LAYOUTS.items():
        laid = lay_out(value, array.shape)
        if laid is not None and np.array_equal(laid, array):
            return name
    return None

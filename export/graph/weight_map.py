"""Trace every weight of an exported graph to the parameter of the model that it is, by value.

torch's exporter keeps the names of many parameters and loses those it lays out anew (the matrices of linear layers
are transposed, scales and shifts of group norms become [C, 1, 1]); and it merges small equal weights into one. So
each weight is compared with the parameters of the layers that use it, bit for bit.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from hipa_deploy.bundle.adaptor_swap import Fold, MappedWeight, WeightLayout, WeightMap
from hipa_deploy.export.graph.fold import NoTimeEmbedding, StepBias
from hipa_deploy.export.graph.modules import OneStepDecoder, OneStepEncoder, place_of
from hipa_deploy.export.graph.upsample import UpsampledConv

_SCOPES = "pkg.torch.onnx.name_scopes"
UPSAMPLINGS: tuple[Fold, ...] = (
    "upsampling 00",
    "upsampling 01",
    "upsampling 10",
    "upsampling 11",
)  # as PARITIES
# In the order they are tried: a square matrix that is symmetric counts as it is.
LAYOUTS: dict[WeightLayout, Callable[[np.ndarray, tuple[int, ...]], np.ndarray | None]] = {
    "as it is": lambda value, shape: value if value.shape == shape else None,
    "transposed": lambda value, shape: (
        value.T if value.ndim == 2 and value.shape[::-1] == shape else None
    ),
    "reshaped": lambda value, shape: value.reshape(shape) if value.size == np.prod(shape) else None,
}


def trace_weights(model: Any, module: nn.Module) -> WeightMap:
    """The map of ``model``, an ``onnx_ir.Model`` of ``module`` that still has the exporter's metadata.

    A weight that is no parameter of the module is a constant of the graph: shapes, scales, masks.
    """
    tensors, folds, origins = dict(_tensors(module)), dict(_folds(module)), dict(_replaced(module))
    folds |= {name: fold for name, (_, fold) in origins.items() if fold}
    layers: dict[str, list[str]] = defaultdict(list)
    for name in tensors:
        layers[name.rpartition(".")[0]].append(name)
    adaptable = _adaptable(module) | {
        name for name, fold in folds.items() if fold in ("timestep", "timesteps")
    }
    weights, constants = {}, []
    for name, value in model.graph.initializers.items():
        found, layout = (
            _find(value, tensors, layers) if value.dtype.is_floating_point() else ((), "as it is")
        )
        if not found:
            constants.append(name)
            continue
        weights[name] = MappedWeight(
            places=tuple(
                dict.fromkeys(
                    place_of(module, origins.get(name, (name, None))[0]) for name in found
                )
            ),
            layout=layout,
            fold=folds.get(found[0]),
            adaptable=any(source in adaptable for source in found),
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
    """What ``fold_timestep``, ``fold_encoder_output`` and ``fold_decoder_input`` have changed."""
    for prefix, part in module.named_modules():
        dot = f"{prefix}." if prefix else ""
        if isinstance(part, UNet2DConditionModel) and isinstance(
            part.time_embedding, NoTimeEmbedding
        ):
            blocks = (
                name for name, block in part.named_modules() if isinstance(block, ResnetBlock2D)
            )
            yield from ((f"{dot}{name}.conv1.bias", "timestep") for name in blocks)
        if isinstance(part, OneStepEncoder):
            yield from (
                (f"{dot}encoder.conv_out.{name}", "encoder output") for name in ("weight", "bias")
            )
        if isinstance(part, OneStepDecoder):
            yield from (
                (f"{dot}{name}", "decoder input") for name in ("decoder.conv_in.weight", "offset")
            )


def _replaced(module: nn.Module) -> Iterator[tuple[str, tuple[str, Fold | None]]]:
    """Parameters of modules that a fold put in, and what they come from."""
    yield from _upsampled(module)
    for prefix, part in module.named_modules():
        if isinstance(part, StepBias):
            yield f"{prefix}.bias_KC", (f"{prefix.rpartition('.')[0]}.conv1.bias", "timesteps")


def _upsampled(module: nn.Module) -> Iterator[tuple[str, tuple[str, Fold | None]]]:
    """Parameters that ``fold_upsampling`` made: the convolution's that each comes from, and the parity of its sums."""
    for prefix, part in module.named_modules():
        if not isinstance(part, UpsampledConv):
            continue
        parent, _, name = prefix.rpartition(".")
        follows = isinstance(
            module.get_submodule(parent), nn.Sequential
        )  # if not, it was inside the upsampling
        conv = f"{parent}.{int(name) + 1}" if follows else f"{prefix}.conv"
        for index, parity in enumerate(UPSAMPLINGS):
            yield f"{prefix}.parities.{index}.weight", (f"{conv}.weight", parity)
            yield f"{prefix}.parities.{index}.bias", (f"{conv}.bias", None)


def _adaptable(module: nn.Module) -> set[str]:
    """The weights that a low-rank adaptor can change: those of the UNet's linear layers and convolutions."""
    return {
        f"{prefix}.{name}.weight".lstrip(".")
        for prefix, unet in module.named_modules()
        if isinstance(unet, UNet2DConditionModel)
        for name, layer in unet.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    }


def _find(
    value: Any, tensors: dict[str, Tensor], layers: dict[str, list[str]]
) -> tuple[tuple[str, ...], WeightLayout]:
    """Names of the tensors that an initializer holds, and their layout; none if it holds none of them."""
    array = value.const_value.numpy()
    named = value.name in tensors and _layout(tensors[value.name], array) == "as it is"
    own = [value.name] if named else []
    for node in value.consumers():
        names = _names_near(node, layers)
        matching = [
            name for name in names if name not in own and _layout(tensors[name], array) is not None
        ]
        own += _narrowed(matching, node) if not any(name in own for name in names) else []
    if (
        not own and array.size > 1 and np.ptp(array) > 0
    ):  # an embedding of all positions is used beside its layer
        own = [name for name, tensor in tensors.items() if _layout(tensor, array) is not None]
    return tuple(own), (_layout(tensors[own[0]], array) if own else None) or "as it is"


def _names_near(node: Any, layers: dict[str, list[str]]) -> list[str]:
    """Tensors of the innermost module around ``node`` that has any of its own."""
    scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
    return next((layers[scope] for scope in reversed(scopes[:-1]) if scope in layers), [])


def _narrowed(names: list[str], node: Any) -> list[str]:
    """Of a layer's weight and bias that are equal, the one that ``node`` uses as such."""
    if len(names) < 2:
        return names
    role = "bias" if node.op_type == "Add" else "weight"
    return [name for name in names if name.endswith(role)] or names


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

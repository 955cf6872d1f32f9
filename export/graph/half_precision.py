"""FP16 where it is faithful, FP32 where it is not.

An 'island' is a part of a stage that stays in float32 inside a float16 graph. A 'layer' here is a
module that owns parameters: a convolution, a linear layer, a norm, an embedding. Layers cast their
inputs to their own type; between layers PyTorch's promotion carries float32 values through residual
additions until the next layer in float16. So a layer is an island if a value that does not fit
float16 goes into it, comes out of it, or is one of its weights; no other layer needs to be one.

Islands are found in two ways. ``Ranges`` watches a run in float32 for values that float16 cannot
hold. Where that is not enough, ``fewest_islands`` emulates float16 and tries the layers that are
hurt most by its rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

HALF_MAX = 65504.0
HEADROOM = 0.9  # other prompts and seeds reach a little further than the reference
MAX_PRUNED = 16  # each costs one run of the stage
PROJECTIONS = ("to_q", "to_k", "to_v")


def layers_of(module: nn.Module) -> dict[str, nn.Module]:
    """The modules with parameters of their own, by name."""
    return {name: part for name, part in module.named_modules() if _owns_parameters(part)}


def _owns_parameters(module: nn.Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None


@dataclass
class Ranges:
    """The largest magnitude that went into or came out of every module while this watched.

    Example:
        >>> with torch.no_grad(), Ranges().watching() as ranges:
        ...     unet(sample_BCHW, 999, context_BLD)
        >>> ranges.by_name(unet)["conv_in"]
        3.71

    """

    _largest: dict[nn.Module, float] = field(default_factory=dict)
    # Outputs of to_q and to_k since their attention began; None until they are called.
    _projected: dict[nn.Module, Tensor | None] = field(default_factory=dict)

    @contextmanager
    def watching(self) -> Iterator[Ranges]:
        """Record every module call inside the block."""
        hooks = (
            torch.nn.modules.module.register_module_forward_pre_hook(self._expect),
            torch.nn.modules.module.register_module_forward_hook(self._record),
        )
        try:
            yield self
        finally:
            for hook in hooks:
                hook.remove()

    def by_name(self, module: nn.Module) -> dict[str, float]:
        """The recorded magnitudes of ``module``'s layers and attentions, by their names in it."""
        named: dict[str, float] = {}
        for name, part in module.named_modules():
            if part in self._largest:
                named[name] = self._largest[part]
        return named

    def _expect(self, module: nn.Module, _: Any) -> None:
        """An attention begins: keep what its projections for query and key give."""
        if isinstance(module, Attention):
            self._projected |= {module.to_q: None, module.to_k: None}

    def _record(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        # The scores of an attention are no module's output, so they are computed once more here.
        if isinstance(module, Attention):
            self._keep(module, largest_score(module, self._projected))
        elif _owns_parameters(module):
            for value in (*inputs, output):
                if isinstance(value, Tensor) and value.is_floating_point():
                    self._keep(module, largest(value))
            if module in self._projected:
                self._projected[module] = output

    def _keep(self, module: nn.Module, value: float) -> None:
        self._largest[module] = max(self._largest.get(module, 0.0), value)


def islands_by_range(module: nn.Module, reached: Mapping[str, float]) -> tuple[str, ...]:
    """Names of the parts of ``module`` that float16 cannot hold.

    Args:
        module: a stage's module in float32; its weights count too.
        reached: the largest magnitude at each layer and attention, by name. A layer that a fold put
            in has none: its weights alone tell.

    """
    limit = HEADROOM * HALF_MAX
    found = []
    for name, layer in layers_of(module).items():
        largest_weight = max(largest(weight) for weight in layer.parameters(recurse=False))
        if max(largest_weight, reached.get(name, 0.0)) > limit:
            found.append(name)
    for name, part in module.named_modules():
        if isinstance(part, Attention) and reached.get(name, 0.0) > limit:
            found.append(name)
    return whole_attentions(found)


def largest(value: Tensor) -> float:
    """max |x| without a copy; NaN counts as infinite."""
    low, high = torch.aminmax(value)
    reach = max(-low.item(), high.item())
    is_nan = reach != reach
    return float("inf") if is_nan else reach


def largest_score(attention: Attention, projected: dict[nn.Module, Any]) -> float:
    """max |q k^T| scale of the attention's last call, or an upper bound that is small enough.

    Args:
        attention: the module whose call has just ended.
        projected: outputs [B, L, D] of its to_q and to_k, which are taken out.

    """
    query_BLD = projected.pop(attention.to_q)
    key_BLD = projected.pop(attention.to_k)
    query_BHLD = query_BLD.unflatten(-1, (attention.heads, -1)).transpose(1, 2)
    key_BHLD = key_BLD.unflatten(-1, (attention.heads, -1)).transpose(1, 2)

    # Cauchy-Schwarz: |q k| <= |q| |k|. Norms are cheap, and nearly always small enough.
    bound = float(query_BHLD.norm(dim=-1).max() * key_BHLD.norm(dim=-1).max() * attention.scale)
    if bound <= HEADROOM * HALF_MAX:
        return bound

    # One head at a time: at 64 x 64 latents the scores of a single head take 64 MiB.
    heads = zip(query_BHLD.flatten(0, 1), key_BHLD.flatten(0, 1), strict=True)
    return max(largest(query_LD @ key_LD.T) for query_LD, key_LD in heads) * attention.scale


def whole_attentions(names: list[str]) -> tuple[str, ...]:
    """The names, sorted and distinct, with the whole attention for any of its projections.

    Query, key and value meet in one product, so an island among them is the whole attention.

    Example:
        >>> whole_attentions(["attn1.to_q", "attn1.to_k", "conv_in"])
        ('attn1', 'conv_in')

    """
    widened = set()
    for name in names:
        parent, _, last = name.rpartition(".")
        widened.add(parent if last in PROJECTIONS else name)

    # What lies inside of another island is in float32 with it.
    outermost = []
    for name in widened:
        others = tuple(widened - {name})
        if not _is_inside(name, others):
            outermost.append(name)
    return tuple(sorted(outermost))


def to_half(module: nn.Module, islands: tuple[str, ...] = ()) -> nn.Module:
    """Convert in place to float16, except for the islands. Without islands no cast is added.

    Args:
        module: a stage's module.
        islands: names of the parts that stay in float32.

    """
    for name, weight in (*module.named_parameters(), *module.named_buffers()):
        if weight.is_floating_point() and not _is_inside(name, islands):
            weight.data = weight.data.half()

    # Two precisions meet at the border of an island, so that every layer casts what it gets.
    if islands:
        for layer in layers_of(module).values():
            layer.register_forward_pre_hook(_cast_inputs)
    return module


def _is_inside(name: str, islands: tuple[str, ...]) -> bool:
    return any(name == island or name.startswith(f"{island}.") for island in islands)


def _cast_inputs(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Cast floating-point inputs to the type of the layer's weights."""
    dtype = next(layer.parameters(recurse=False)).dtype
    cast = []
    for value in inputs:
        is_float = isinstance(value, Tensor) and value.is_floating_point()
        cast.append(value.to(dtype) if is_float else value)
    return tuple(cast)


class Rounding:
    """A float32 module run as if in float16.

    Weights, inputs and outputs of every layer are rounded to float16; the arithmetic inside of a
    layer is float32, as it is on a GPU that accumulates in float32.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.layers = layers_of(module)

    @torch.no_grad()
    def __call__(self, inputs: tuple[Tensor, ...], islands: tuple[str, ...] = ()) -> Tensor:
        """The module's output with every layer rounded, except for the ``islands``."""
        rounded: dict[str, nn.Module] = {}
        for name, layer in self.layers.items():
            if not _is_inside(name, islands):
                rounded[name] = layer

        # A layer's weights are rounded while it runs: never is there a copy of all of them.
        exact: dict[nn.Parameter, Tensor] = {}

        def enter(layer: nn.Module, x: tuple[Any, ...]) -> tuple[Any, ...]:
            for weight in layer.parameters(recurse=False):
                exact[weight] = weight.data
                weight.data = _round(weight.data)
            return tuple(map(_round, x))

        def leave(layer: nn.Module, _: tuple[Any, ...], y: Any) -> Any:
            for weight in layer.parameters(recurse=False):
                weight.data = exact.pop(weight)
            return _round(y)

        hooks = []
        for layer in rounded.values():
            hooks.append(layer.register_forward_pre_hook(enter))
            hooks.append(layer.register_forward_hook(leave))

        # Whatever happens inside, the module is left as it was.
        try:
            output: Tensor = self.module(*inputs)
            return output
        finally:
            for hook in hooks:
                hook.remove()
            for weight, value in exact.items():
                weight.data = value

    @torch.no_grad()
    def sensitive(self, inputs: tuple[Tensor, ...]) -> list[str]:
        """Layer names, the one that rounding hurts most first.

        The measure is the error of the layer's own output over what varies in it, on exact inputs.
        """
        errors: dict[str, float] = {}

        def measure(name: str, layer: nn.Module, x: tuple[Any, ...], exact: Tensor) -> None:
            state = {key: _round(value) for key, value in layer.named_parameters(recurse=False)}
            # The class's forward: to call the layer itself would call this hook again.
            forward = type(layer).forward
            with torch.nn.utils.stateless._reparametrize_module(layer, state):
                got = _round(forward(layer, *map(_round, x)))
            norm = float(_varying(exact).norm())
            error = float((got - exact).norm()) / norm if norm else 0.0
            errors[name] = max(errors.get(name, 0.0), error)

        hooks = []
        for name, layer in self.layers.items():
            # name=name: a closure would see the last name of the loop in every hook.
            hooks.append(
                layer.register_forward_hook(lambda m, x, y, name=name: measure(name, m, x, y))
            )
        try:
            self.module(*inputs)
        finally:
            for hook in hooks:
                hook.remove()
        return sorted(errors, key=lambda name: -errors[name])


def _varying(value: Tensor) -> Tensor:
    """``value`` less its mean over positions: [B, C, H, W] or [B, L, D].

    A constant rounds badly, and the next norm takes it out again: it says nothing.
    """
    positions = {4: (2, 3), 3: (1,)}.get(value.ndim)
    return value - value.mean(positions, keepdim=True) if positions else value


def _round(value: Any) -> Any:
    """A floating-point tensor rounded to float16, in its own type; anything else as it is."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.half().to(value.dtype)
    return value


def fewest_islands(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    faithful: Callable[[Tensor], bool],
    islands: tuple[str, ...],
) -> tuple[str, ...]:
    """Islands with which ``module`` is faithful in emulated float16.

    The layers that rounding hurts most are tried in growing number (1, 2, 4, ...). Then every one
    that is not needed is taken out again. If nothing less is faithful, all layers are returned.

    Args:
        module: a stage's module in float32.
        inputs: what its forward takes.
        faithful: judges an output.
        islands: those that the ranges demand; they are always among the result.

    """
    emulate = Rounding(module)

    def is_faithful(chosen: list[str]) -> bool:
        return faithful(emulate(inputs, whole_attentions([*islands, *chosen])))

    ranked = emulate.sensitive(inputs)
    count = 1
    while count < len(ranked) and not is_faithful(ranked[:count]):
        count *= 2
    chosen = ranked[:count]

    # The least sensitive first: they are the likeliest to be there only because count doubled.
    for name in reversed(chosen[: min(len(chosen), MAX_PRUNED)]):
        fewer = [other for other in chosen if other != name]
        if is_faithful(fewer):
            chosen = fewer
    return whole_attentions([*islands, *chosen])

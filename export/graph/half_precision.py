"""FP16 where it is faithful, FP32 where it is not: which layers of a stage must stay in float32, found by running it.

A layer here is a module that owns parameters (convolution, linear, norm, embedding). Layers cast their inputs to
their own type; between layers PyTorch's promotion carries float32 values through residual additions until the next
layer in float16. So a layer is an island when a value that does not fit float16 goes into it, comes out of it, or
is one of its weights, and no other layer need be one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
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
    return {
        name: part
        for name, part in module.named_modules()
        if any(True for _ in part.parameters(recurse=False))
    }


@dataclass
class Ranges:
    """The largest magnitude that went into or came out of every module while this watched."""

    largest: dict[nn.Module, float] = field(default_factory=dict)
    _projected: dict[nn.Module, Tensor | None] = field(
        default_factory=dict
    )  # outputs of to_q and to_k, until used

    @contextmanager
    def watching(self) -> Iterator[Ranges]:
        """Record every module call inside the block."""
        handles = (
            torch.nn.modules.module.register_module_forward_pre_hook(self._expect),
            torch.nn.modules.module.register_module_forward_hook(self._record),
        )
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _expect(self, module: nn.Module, _: Any) -> None:
        if isinstance(module, Attention):
            self._projected |= {module.to_q: None, module.to_k: None}

    def _record(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(module, Attention):
            self._keep(module, largest_score(module, self._projected))
        elif any(True for _ in module.parameters(recurse=False)):
            for value in (*inputs, output):
                if isinstance(value, Tensor) and value.is_floating_point():
                    self._keep(module, largest(value))
            if module in self._projected:
                self._projected[module] = output

    def _keep(self, module: nn.Module, value: float) -> None:
        self.largest[module] = max(self.largest.get(module, 0.0), value)

    def islands(self, module: nn.Module) -> tuple[str, ...]:
        """Names of the parts of ``module`` that float16 cannot hold."""
        limit = HEADROOM * HALF_MAX
        found = [name for name, layer in layers_of(module).items() if self._reach(layer) > limit]
        found += [
            name
            for name, part in module.named_modules()
            if isinstance(part, Attention) and self.largest.get(part, 0.0) > limit
        ]
        return whole_attentions(found)

    def _reach(self, layer: nn.Module) -> float:
        weights = max(largest(weight) for weight in layer.parameters(recurse=False))
        return max(weights, self.largest.get(layer, 0.0))


def largest(value: Tensor) -> float:
    """max |x|, without a copy; NaN counts as infinite."""
    low, high = torch.aminmax(value)
    reach = max(-low.item(), high.item())
    return reach if reach == reach else float("inf")


def largest_score(attention: Attention, projected: dict[nn.Module, Any]) -> float:
    """max |q k^T| scale of the attention's last call; the Cauchy-Schwarz bound where that is small enough already."""
    query_BLD, key_BLD = projected.pop(attention.to_q), projected.pop(attention.to_k)
    query, key = (
        x.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for x in (query_BLD, key_BLD)
    )
    bound = float(query.norm(dim=-1).max() * key.norm(dim=-1).max() * attention.scale)
    if bound <= HEADROOM * HALF_MAX:
        return bound
    heads = zip(
        query.flatten(0, 1), key.flatten(0, 1), strict=True
    )  # one at a time: a score matrix is large
    return max(largest(q @ k.T) for q, k in heads) * attention.scale


def whole_attentions(names: list[str]) -> tuple[str, ...]:
    """Query, key and value meet in one product, so an island among them is the whole attention; sorted, distinct."""
    widened = {
        name.rsplit(".", 1)[0] if name.split(".")[-1] in PROJECTIONS else name for name in names
    }
    return tuple(sorted(n for n in widened if not _inside(n, tuple(widened - {n}))))


def to_half(module: nn.Module, islands: tuple[str, ...] = ()) -> nn.Module:
    """Convert in place: float16, except the named parts. Without islands the module gets no cast at all."""
    for name, weight in (*module.named_parameters(), *module.named_buffers()):
        if weight.is_floating_point() and not _inside(name, islands):
            weight.data = weight.data.half()
    for layer in layers_of(module).values() if islands else ():
        layer.register_forward_pre_hook(_cast_inputs)
    return module


def _inside(name: str, islands: tuple[str, ...]) -> bool:
    return any(name == island or name.startswith(f"{island}.") for island in islands)


def _cast_inputs(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    dtype = next(layer.parameters(recurse=False)).dtype
    return tuple(
        x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs
    )


class Rounding:
    """A float32 module run as if in float16: weights, inputs and outputs of every layer are rounded to it."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.layers = layers_of(module)

    @torch.no_grad()
    def __call__(self, inputs: tuple[Tensor, ...], islands: tuple[str, ...] = ()) -> Tensor:
        """The module's output with every layer rounded but the ``islands``."""
        rounded = {n: m for n, m in self.layers.items() if not _inside(n, islands)}
        kept = {n: copy.deepcopy(m.state_dict()) for n, m in rounded.items()}
        handles = []
        for layer in rounded.values():
            for weight in layer.parameters(recurse=False):
                weight.copy_(_round(weight))
            handles.append(layer.register_forward_pre_hook(lambda _, x: tuple(map(_round, x))))
            handles.append(layer.register_forward_hook(lambda _, __, y: _round(y)))
        try:
            return self.module(*inputs)
        finally:
            for handle in handles:
                handle.remove()
            for name, state in kept.items():
                rounded[name].load_state_dict(state)

    @torch.no_grad()
    def sensitive(self, inputs: tuple[Tensor, ...]) -> list[str]:
        """Layer names, the one that rounding hurts most first: error of its own output over what varies in it."""
        errors: dict[str, float] = {}

        def measure(name: str, layer: nn.Module, x: tuple[Any, ...], exact: Tensor) -> None:
            state = {k: _round(v) for k, v in layer.named_parameters(recurse=False)}
            rounded = type(layer).forward  # not layer(): that would come back here
            with torch.nn.utils.stateless._reparametrize_module(layer, state):
                got = _round(rounded(layer, *map(_round, x)))
            norm = float(_varying(exact).norm())
            errors[name] = max(
                errors.get(name, 0.0), float((got - exact).norm()) / norm if norm else 0.0
            )

        handles = [
            layer.register_forward_hook(lambda m, x, y, name=name: measure(name, m, x, y))
            for name, layer in self.layers.items()
        ]
        try:
            self.module(*inputs)
        finally:
            for handle in handles:
                handle.remove()
        return sorted(errors, key=lambda name: -errors[name])


def _varying(value: Tensor) -> Tensor:
    """Less its mean over positions: [B, C, H, W] or [B, L, D]. A constant rounds badly and says nothing."""
    positions = {4: (2, 3), 3: (1,)}.get(value.ndim)
    return value - value.mean(positions, keepdim=True) if positions else value


def _round(value: Any) -> Any:
    return (
        value.half().to(value.dtype)
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
    )


def fewest_islands(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    faithful: Callable[[Tensor], bool],
    islands: tuple[str, ...],
) -> tuple[str, ...]:
    """Islands that make ``module`` faithful in emulated float16, added to those that the ranges demand.

    ``faithful(output)`` judges. The layers that rounding hurts most are tried in growing number (1, 2, 4, …), then
    every one that is not needed is taken out again. All of them are returned when nothing less does.
    """
    emulate = Rounding(module)

    def good(chosen: list[str]) -> bool:
        return faithful(emulate(inputs, whole_attentions([*islands, *chosen])))

    ranked, count = emulate.sensitive(inputs), 1
    while count < len(ranked) and not good(ranked[:count]):
        count *= 2
    chosen = ranked[:count]
    for name in reversed(chosen[: min(len(chosen), MAX_PRUNED)]):
        fewer = [other for other in chosen if other != name]
        if good(fewer):
            chosen = fewer
    return whole_attentions([*islands, *chosen])

"""Operations and memory of a call on fake tensors, which have shapes and no values."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count


def _cpu_attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _cpu_attention_backward_flops(
    grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any
) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


# torch's flop_counter (2.13) knows the attention kernels of GPUs only, and would count those of
# the CPU as nothing.
_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        _cpu_attention_backward_flops
    ),
}


def count_call(call: Callable[[], None], resident: Iterable[nn.Module]) -> tuple[int, int]:
    """Count the operations of a call, and the most bytes that live at once in it.

    The same call gives the same counts, whatever else the process has done.

    Args:
        call: What is counted, on fake tensors.
        resident: Modules whose weights live throughout.

    Returns:
        Floating-point operations in convolutions and matrix products, and bytes.

    """
    live = _LiveBytes(*resident)
    flops = FlopCounterMode(display=False, custom_mapping=_ATTENTION)
    flops.mod_tracker = _WholeCall()  # type: ignore[assignment]  # it needs only these members
    with live, flops:
        call()
    return flops.get_total_flops(), live.peak


class _WholeCall(AbstractContextManager):
    """Takes the place of FlopCounterMode's tracker of modules.

    The tracker's hooks make cycles with autograd's nodes. These hold memory until Python collects
    its garbage, so that a peak would depend on when that happens.
    """

    parents = frozenset({"Global"})  # FlopCounterMode's name of everything

    def __exit__(self, *exception: object) -> None:
        pass


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that live; PyTorch frees one when its last tensor goes.

    Attributes:
        now: Bytes that live at present.
        peak: The most bytes that lived at once.

    """

    def __init__(self, *resident: nn.Module) -> None:
        super().__init__()
        self._alive: set[int] = set()
        self.now = 0
        self.peak = 0
        for module in resident:
            for tensor in (*module.parameters(), *module.buffers()):
                self._add(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        return out

    def _add(self, tensor: Tensor) -> None:
        # Views share their base's storage, which counts once: the C++ object's address tells.
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        self._alive.add(key)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)

        # The size is bound here, because the storage is gone when the finalizer runs.
        weakref.finalize(storage, self._remove, key, storage.nbytes())

    def _remove(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size

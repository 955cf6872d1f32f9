"""One file of weights: .safetensors, or one that torch has pickled (.bin, .ckpt, .pt, .pth).

A pickled file can hold instructions that run code when it is loaded. It is read with
``torch.load(weights_only=True)`` alone, which builds tensors and refuses everything else.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hipa_deploy.errors import HipaError, as_line
from hipa_deploy.models.weights.pickled import MAX_PICKLED, check_stored, load_pickled

if TYPE_CHECKING:
    from torch import Tensor

SAFETENSORS = ".safetensors"
PICKLED = (".bin", ".ckpt", ".pt", ".pth")
# What diffusers and peft call a LoRA's file in a folder; the first that is there counts.
LORA_FILES = (
    "pytorch_lora_weights.safetensors",
    "adapter_model.safetensors",
    "pytorch_lora_weights.bin",
    "adapter_model.bin",
)
MAX_WEIGHTS = MAX_PICKLED  # bytes
AGAIN = "Copy it again."
LENGTH_BYTES = 8  # of the header's length, at the start of a .safetensors file
METADATA = "__metadata__"  # the one entry of the header that is no tensor


class TensorLayout(NamedTuple):
    """Where a tensor lies in a .safetensors file.

    Attributes:
        dtype: the name of its type in the format: F32, F16, BF16, F64, I64 and so on.
        shape: its shape.
        start: the first of its bytes, from the file's beginning.
        end: the byte after its last.

    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def is_pickled(path: Path) -> bool:
    """Whether torch has pickled the file, by its ending in small or capital letters.

    Raises:
        HipaError: the ending is that of no file of weights.

    """
    ending = path.suffix.lower()
    if ending in PICKLED:
        return True
    if ending != SAFETENSORS:
        raise HipaError(
            f"{path} is a {path.suffix or 'nameless'} file. Expected weights in a file that ends "
            f"in {SAFETENSORS}, or in {', '.join(PICKLED)}."
        )
    return False


def read_layout(path: Path) -> dict[str, TensorLayout]:
    """Read names, types, shapes and places of all tensors of a .safetensors file.

    Only the file's header is read (https://github.com/huggingface/safetensors#format).

    Raises:
        HipaError: the file is missing, damaged or no regular file, or is a Git LFS pointer.

    """
    from safetensors import safe_open

    check_stored(path, MAX_WEIGHTS, AGAIN)
    with as_line(f"{path} is damaged", AGAIN):
        # The library checks that the header fits the file, so its values can be used below.
        with safe_open(path, "numpy"):
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(LENGTH_BYTES), "little")
            header = json.loads(file.read(length))

    data = LENGTH_BYTES + length
    layout: dict[str, TensorLayout] = {}
    for name, entry in header.items():
        if name != METADATA:
            start, end = entry["data_offsets"]
            shape = tuple(entry["shape"])
            layout[name] = TensorLayout(entry["dtype"], shape, data + start, data + end)
    return layout


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Return all tensors of a file, on the CPU, as they are stored.

    The values are read from the disk when they are used, where the format allows that.

    Raises:
        HipaError: the file is damaged, holds something else than tensors, or is a Git LFS pointer.

    """
    check_stored(path, MAX_WEIGHTS, AGAIN)
    if is_pickled(path):
        return _load_pickled(path)
    from safetensors.torch import load_file

    with as_line(f"{path} is damaged", AGAIN):
        return dict(load_file(path))


def each_tensor(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of a file with its name, on the CPU, as it is stored.

    Tensors in half precision of a .safetensors file are read one by one, into memory of their own.
    They are for conversion: of a file that is mapped, every page that was read stays in memory
    while any of its tensors is in use.

    Raises:
        HipaError: as ``load_tensors``.

    Example:
        >>> dict(each_tensor(Path("model.fp16.safetensors")))["logit_scale"].dtype
        torch.float16

    """
    import torch

    types = {"F16": torch.float16, "BF16": torch.bfloat16}
    layouts = {} if is_pickled(path) else read_layout(path)
    halves: set[str] = set()
    with path.open("rb") as file:
        for name, layout in layouts.items():
            size = layout.end - layout.start
            if layout.dtype not in types or not size:
                continue
            halves.add(name)
            content = bytearray(size)
            file.seek(layout.start)
            file.readinto(content)
            values = torch.frombuffer(content, dtype=types[layout.dtype])
            yield name, values.reshape(layout.shape)
    if halves and len(halves) == len(layouts):
        return

    tensors = load_tensors(path)
    for name in list(tensors):
        stored = tensors.pop(name)
        if name not in halves:
            yield name, stored


def _load_pickled(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file that torch has pickled."""
    import torch

    content = load_pickled(path, mapped=True)
    # A training tool stores the weights beside its own state.
    while isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    tensors: dict[str, Tensor] = {}
    entries: dict[Any, Any] = content if isinstance(content, dict) else {}
    for name, value in entries.items():
        if isinstance(name, str) and isinstance(value, torch.Tensor):
            tensors[name] = value.detach()
    if not tensors:
        raise HipaError(f"{path} holds no weights by name. Expected a model's state_dict.")
    return tensors

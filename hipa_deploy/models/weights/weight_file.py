"""One file of weights: .safetensors, or one that torch has pickled (.bin, .ckpt, .pt, .pth).

A pickled file can hold instructions that run code when it is loaded. It is read with
``torch.load(weights_only=True)`` alone, which builds tensors and refuses everything else.
"""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hipa_deploy.errors import HipaError, first_line

if TYPE_CHECKING:
    from torch import Tensor

SAFETENSORS = ".safetensors"
PICKLED = (".bin", ".ckpt", ".pt", ".pth")
LENGTH_BYTES = 8  # of the header's length, at the start of a .safetensors file
METADATA = "__metadata__"  # the one entry of the header that is no tensor
# Modules whose classes a checkpoint may name: they are not imported.
TRAINING_TOOLS = ("pytorch_lightning.", "lightning.")
# A clone of a repository without Git LFS has this text in place of each large file.
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


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
        HipaError: the file is damaged, or is a Git LFS pointer.

    """
    from safetensors import SafetensorError, safe_open

    _refuse_pointer(path)
    try:
        # The library checks that the header fits the file, so its values can be used below.
        with safe_open(path, "numpy"):
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(LENGTH_BYTES), "little")
            header = json.loads(file.read(length))
    except (OSError, SafetensorError) as error:
        raise _damaged(path, first_line(error)) from None

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
    _refuse_pointer(path)
    if is_pickled(path):
        return _load_pickled(path)
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise _damaged(path, first_line(error)) from None


def _load_pickled(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file that torch has pickled."""
    import torch

    try:
        # Files of before torch 1.6 are no zip archives, and cannot be read piece by piece.
        lazily = zipfile.is_zipfile(path)
        with torch.serialization.safe_globals(_inert_classes(path) if lazily else []):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=lazily)
    # An unreadable file raises errors of every kind. Those of a forbidden one advise to read it
    # with its code, in many lines: that advice is not passed on.
    except Exception as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        if found:
            raise HipaError(
                f"{path} holds more than weights: {found[1]}. That can run code, so the file is "
                "not loaded. Use the model's .safetensors file."
            ) from None
        raise _damaged(path, "torch cannot read it as weights") from None

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


class _Inert:
    """Stands for a class of a training tool: it takes anything and does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass


def _inert_classes(path: Path) -> list[Any]:
    """What torch may build in place of PyTorch Lightning's classes, whose state is not needed.

    The published .ckpt files of SD 1.x were saved by a training of Lightning, and name its classes
    beside the weights. No code of Lightning is imported for them.
    """
    import torch

    inert: list[Any] = []
    for name in torch.serialization.get_unsafe_globals_in_checkpoint(path):
        if name.startswith(TRAINING_TOOLS):
            inert.append((_Inert, name))
    return inert


def _refuse_pointer(path: Path) -> None:
    """Raise HipaError if the file is Git LFS's stand-in for the weights."""
    try:
        with path.open("rb") as file:
            start = file.read(len(LFS_POINTER))
    except OSError as error:
        raise HipaError(f"{path} cannot be read: {first_line(error)}") from None
    if start == LFS_POINTER:
        raise HipaError(
            f"{path} is a Git LFS pointer, not the weights. Run in that folder: git lfs pull"
        )


def _damaged(path: Path, why: str) -> HipaError:
    return HipaError(f"{path} is damaged: {why}. Copy it again.")

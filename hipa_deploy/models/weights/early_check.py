"""What a .safetensors file shows without torch: whether it is whole, and its numbers finite.

A command checks its files so before it imports torch or loads a model. What only torch can read is
checked later.
"""

from __future__ import annotations

import math
import mmap
from pathlib import Path

import numpy as np

from hipa_deploy.errors import HipaError
from hipa_deploy.models.weights.weight_file import SAFETENSORS, TensorLayout, read_layout
from hipa_deploy.models.weights.weight_files import current_name, find_weights

# The values of larger files are checked when they are loaded: to read them takes seconds.
QUICK_BYTES = 256 << 20
FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}
CHUNK = 1 << 20  # elements


def check_tensors(path: Path) -> dict[str, TensorLayout]:
    """Check the header of a .safetensors file, and of a small file that every number is finite.

    Returns:
        What the header says of each tensor, by name.

    Raises:
        HipaError: the file is damaged, holds no tensors, or holds NaN or infinity.

    """
    layouts = read_layout(path)
    if not layouts:
        raise HipaError(f"{path} holds no tensors. Copy the file again.")
    if path.stat().st_size <= QUICK_BYTES:
        _check_finite(path, layouts)
    return layouts


def known_shapes(folder: Path) -> dict[str, tuple[int, ...]] | None:
    """The shape of each weight of a model's part, by its current name.

    None where the files are not .safetensors: torch alone can read them.

    Raises:
        HipaError: the folder has no weights, or a file is damaged.

    """
    shapes = {}
    for path in find_weights(folder):
        if path.suffix.lower() != SAFETENSORS:
            return None
        for name, layout in read_layout(path).items():
            shapes[current_name(name)] = layout.shape
    return shapes


def _check_finite(path: Path, layouts: dict[str, TensorLayout]) -> None:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for name, layout in layouts.items():
            if not _is_finite(content, layout):
                raise HipaError(f"{path}: {name} holds NaN or infinity. Expected finite weights.")


def _is_finite(content: mmap.mmap, layout: TensorLayout) -> bool:
    if layout.dtype == "BF16":
        dtype = np.dtype("<u2")
    elif layout.dtype in FLOATS:
        dtype = np.dtype(FLOATS[layout.dtype])
    else:  # integers are always finite, and what is not known is refused when it is loaded
        return True
    count = math.prod(layout.shape)
    for start in range(0, count, CHUNK):
        # An array of its own for each chunk: the map cannot be closed while one refers to it.
        size = min(CHUNK, count - start)
        values = np.frombuffer(content, dtype, size, layout.start + start * dtype.itemsize)
        if not _finite(values, layout.dtype).all():
            return False
    return True


def _finite(values: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "BF16":
        # The exponent, bits 7 to 14, is all ones for NaN and infinity.
        return (values & 0x7F80) != 0x7F80
    return np.isfinite(values)

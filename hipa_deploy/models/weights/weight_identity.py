"""Identity of a part's weights: a hash of the tensors that are loaded, whatever files hold them.

One model has one identity as a folder, in shards, as .bin, as a folder of links, and as the
conversion of a single file. Further precisions or variants beside the loaded weights do not count.

The hash is SHA-256 over one line a tensor, sorted by name:

    NAME HEIGHTxWIDTH SHA-256-OF-ITS-VALUES-AS-LITTLE-ENDIAN-FLOAT32

Values count in float32, which holds every smaller format exactly: a float16 file and the same
values in float32 are one model. A model that was rounded to float16 is another than before.

Version 0.1.0 hashed the files. An adaptor, a decoder or a bundle with its hash goes on being
accepted for the folder that it was made with.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hipa_deploy.disk.hashing import files_sha256
from hipa_deploy.errors import HipaError
from hipa_deploy.models.weights.weight_file import (
    SAFETENSORS,
    TensorLayout,
    is_pickled,
    load_tensors,
    read_layout,
)
from hipa_deploy.models.weights.weight_files import current_name, find_weights

if TYPE_CHECKING:
    from torch import Tensor

# Says how the hash was made. Another way of making it gets another number.
PREFIX = "tensors-v1:"
# Element types of the files, little-endian. bfloat16 is no type of numpy: see _widened.
FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
# The numbers of CLIP's positions, which a module computes itself. They are no weights, although
# files that were cast as a whole hold them as floats.
COMPUTED = "position_ids"
TORCH_NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
CHUNK = 1 << 20  # elements that are widened at once
MOST_THREADS = 8


def weights_identity(folder: Path) -> str:
    """Return the identity of the weights that are loaded from a part's folder.

    Args:
        folder: of one part, such as a model's unet.

    Raises:
        HipaError: the folder has no weights, a file is damaged, or its numbers are of a type that
            no model is loaded from.

    Example:
        >>> weights_identity(Path("stable-diffusion-v1-5/unet"))[:16]
        'tensors-v1:9c38a'

    """
    lines: dict[str, str] = {}
    for path in find_weights(folder):
        lines |= _pickled_lines(path) if is_pickled(path) else _safetensors_lines(path)
    digest = hashlib.sha256()
    for name in sorted(lines):
        digest.update(f"{name} {lines[name]}\n".encode())
    return PREFIX + digest.hexdigest()


def check_types(folder: Path) -> None:
    """Check that the weights in a part's folder have an identity, by the headers of the files.

    What only torch can read is checked when the identity is made.

    Args:
        folder: of one part, such as a model's unet.

    Raises:
        HipaError: the folder has no weights, a file is damaged, or its numbers are of a type that
            no model is loaded from.

    """
    for path in find_weights(folder):
        if is_pickled(path):
            continue
        for name, layout in read_layout(path).items():
            if not name.endswith(COMPUTED):
                _check_type(path, name, layout.dtype)


def has_identity(folder: Path, recorded: str) -> bool:
    """Whether the weights in a part's folder are those that an artefact was made with.

    Args:
        folder: of one part, such as a model's unet.
        recorded: the hash in the artefact: an identity, or one of version 0.1.0 over the files.

    Raises:
        HipaError: as for ``weights_identity``; or a later version made the hash.

    """
    if recorded.startswith(PREFIX):
        return recorded == weights_identity(folder)
    if ":" in recorded:
        raise HipaError(
            f"the weights' hash {recorded[:24]}… is of a later version of hipa-deploy. "
            "Install that version."
        )
    # 0.1.0 hashed every .safetensors file of the folder. A download by id has the loaded ones only.
    every = sorted(path for path in folder.rglob(f"*{SAFETENSORS}") if path.is_file())
    return recorded in (loaded_files_sha256(folder), files_sha256(folder, every))


def hint_of_0_1_0(recorded: str) -> str:
    """Return a sentence for a message about a hash that does not fit, where 0.1.0 made the hash."""
    if ":" in recorded:
        return ""
    return " Version 0.1.0 made it, which knows a model by its files: use the same folder as then."


def loaded_files_sha256(folder: Path) -> str:
    """Return the hash that 0.1.0 made of a part's folder with no other files than the loaded ones.

    Raises:
        HipaError: the folder has no weights.

    """
    return files_sha256(folder, find_weights(folder))


def _safetensors_lines(path: Path) -> dict[str, str]:
    """Return shape and hash of every tensor of a .safetensors file, by name."""
    layouts: dict[str, TensorLayout] = {}
    for name, layout in read_layout(path).items():
        if not name.endswith(COMPUTED):
            layouts[name] = layout
            _check_type(path, name, layout.dtype)

    lines: dict[str, str] = {}
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        # hashlib and numpy release Python's lock, so threads share the work.
        threads = min(MOST_THREADS, os.cpu_count() or 1)
        with ThreadPoolExecutor(threads) as pool:
            hashes = pool.map(partial(_layout_sha256, content), layouts.values())
            for (name, layout), value in zip(layouts.items(), hashes, strict=True):
                lines[current_name(name)] = f"{_shape_text(layout.shape)} {value}"
    return lines


def _layout_sha256(content: mmap.mmap, layout: TensorLayout) -> str:
    """Return the hash of one tensor's values in float32."""
    digest = hashlib.sha256()
    count = math.prod(layout.shape)
    for start in range(0, count, CHUNK):
        # An array of its own for each chunk: the map cannot be closed while one refers to it.
        size = min(CHUNK, count - start)
        dtype = np.dtype(FLOATS[layout.dtype])
        values = np.frombuffer(content, dtype, size, layout.start + start * dtype.itemsize)
        digest.update(_widened(values, layout.dtype).data)
    return digest.hexdigest()


def _widened(values: np.ndarray, dtype: str) -> np.ndarray:
    """Return values in float32, little-endian."""
    if dtype == "BF16":
        # bfloat16 is the upper half of a float32.
        return values.astype("<u4") << 16
    return values.astype("<f4", copy=False)


def _pickled_lines(path: Path) -> dict[str, str]:
    """Return shape and hash of every tensor of a file that torch has pickled, by name."""
    lines: dict[str, str] = {}
    for name, tensor in load_tensors(path).items():
        if not name.endswith(COMPUTED):
            dtype = str(tensor.dtype).removeprefix("torch.")
            _check_type(path, name, TORCH_NAMES.get(dtype, dtype))
            shape = _shape_text(tuple(tensor.shape))
            lines[current_name(name)] = f"{shape} {_tensor_sha256(tensor)}"
    return lines


def _tensor_sha256(tensor: Tensor) -> str:
    """Return the hash of one tensor's values in float32."""
    values = tensor.float().contiguous().numpy().astype("<f4", copy=False)
    return hashlib.sha256(values.data).hexdigest()


def _shape_text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "1"


def _check_type(path: Path, name: str, dtype: str) -> None:
    """Raise HipaError for numbers of a type that no model is loaded from, such as float8."""
    if dtype not in FLOATS:
        raise HipaError(
            f"{path}: weight {name} is stored as {dtype}. Expected {', '.join(FLOATS)}. "
            "Use the model's file in one of these."
        )

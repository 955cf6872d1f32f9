"""Where the weights lie in an ONNX file, read without the onnx package.

Swapping an adaptor needs to know no more of a graph than this.

The few fields that lead to a weight are read, and all others are skipped. Their numbers are those
of onnx.proto.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hipa_deploy.bundle.protobuf import Span, as_span, fields, integers, spans, text
from hipa_deploy.disk.reading import inside, shown
from hipa_deploy.errors import HipaError

_DTYPES = {
    1: "float32",
    2: "uint8",
    3: "int8",
    6: "int32",
    7: "int64",
    9: "bool",
    10: "float16",
    11: "float64",
}
# Fields: ModelProto.graph, GraphProto.initializer, and of TensorProto the others.
_MODEL_GRAPH = 7
_GRAPH_INITIALIZER = 5
_DIMS = 1
_DATA_TYPE = 2
_NAME = 8
_RAW_DATA = 9
_EXTERNAL = 13


class WeightFile:
    """A file of weights, mapped once for all of them while an array of one of them lives.

    Each mapping takes a number of an open file. A UNet has hundreds or thousands of weights, and
    systems give a process 1,024 such numbers as they come.

    Args:
        path: of the file.

    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mapped: weakref.ref[np.memmap] | None = None

    def mapped(self) -> np.memmap:
        """Its bytes, uint8; they cannot be written."""
        mapped = self._mapped() if self._mapped is not None else None
        if mapped is None:
            mapped = np.memmap(self.path, np.uint8, "r")
            self._mapped = weakref.ref(mapped)
        return mapped


@dataclass(frozen=True)
class Initializer:
    """A weight: ``nbytes`` bytes at ``offset`` of a file, little endian, row by row."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: WeightFile
    offset: int
    nbytes: int

    @property
    def path(self) -> Path:
        """Of the file."""
        return self.file.path

    @property
    def header(self) -> tuple[np.dtype, tuple[int, ...]]:
        """Dtype and shape."""
        return np.dtype(self.dtype), self.shape

    def read(self) -> np.ndarray:
        """The values, mapped from the file: nothing is copied, and the array cannot be written."""
        if not self.nbytes:
            return np.zeros(self.shape, self.dtype)
        return np.ndarray(self.shape, self.dtype, self.file.mapped(), self.offset)


def read_initializers(path: Path) -> dict[str, Initializer]:
    """The initializers of the ONNX file at ``path`` by name, in its order.

    Weights in external data are included.

    Raises:
        HipaError: not an ONNX file, a truncated one, or one with weights in a form that torch's
            exporter does not write.

    """
    found = []
    files: dict[Path, WeightFile] = {}
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            for graph in spans(data, (0, len(data)), _MODEL_GRAPH):
                for span in spans(data, graph, _GRAPH_INITIALIZER):
                    found.append(_initializer(data, span, path, files))
    except (IndexError, KeyError, ValueError, TypeError) as error:
        raise HipaError(
            f"{path} is not an ONNX file that can be read ({error!r}). Export the bundle again."
        ) from None
    return {weight.name: weight for weight in found}


def _initializer(data: Any, span: Span, path: Path, files: dict[Path, WeightFile]) -> Initializer:
    """The TensorProto at ``span``; a file that ``files`` lacks is added."""
    single: dict[int, Any] = {}
    dims: list[int] = []
    external: dict[str, str] = {}
    for field, value in fields(data, span):
        single[field] = value
        if field == _DIMS:
            dims += integers(data, value)
        if field == _EXTERNAL:
            key, entry = _entry(data, as_span(value))
            external[key] = entry

    dtype = _DTYPES[single[_DATA_TYPE]]
    name = text(data, single[_NAME])
    size = math.prod(dims) * np.dtype(dtype).itemsize

    # Values lie in another file, or in this one, or nowhere if there are none.
    where = path
    start = length = 0
    if external:
        where = inside(path.parent, external["location"])
        start = int(external.get("offset", 0))
        length = int(external.get("length", size))
    elif size:
        start, end = single[_RAW_DATA]
        length = end - start
    if length != size:
        raise ValueError(f"{name}: {length} bytes, expected {size}")
    if size and not 0 <= start <= where.stat().st_size - size:
        raise ValueError(f"{name}: its {size} bytes do not lie in {where.name}")
    file = files.setdefault(where, WeightFile(where))
    return Initializer(name, dtype, tuple(dims), file, start, size)


def _entry(data: Any, span: Span) -> tuple[str, str]:
    """A StringStringEntryProto: key = 1, value = 2."""
    parts = {field: text(data, value) for field, value in fields(data, span)}
    return parts[1], parts[2]


def skeleton_sha256(path: Path, weights: Mapping[str, Initializer]) -> str:
    """SHA-256 of everything in the graph's file but the values of ``weights``.

    It is equal for equal graphs, whatever weights they hold.
    """
    inside = [weight for weight in weights.values() if weight.path == path and weight.nbytes]
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for weight in sorted(inside, key=lambda weight: weight.offset):
            digest.update(file.read(weight.offset - file.tell()))
            file.seek(weight.nbytes, 1)  # relative to here: past the values
        digest.update(file.read())
    return digest.hexdigest()


def with_values(
    path: Path, values: Mapping[str, np.ndarray]
) -> tuple[bytes, dict[str, np.ndarray]]:
    """The graph's file with ``values`` in place of its own.

    Returns:
        The file's new content, and those of ``values`` that lie in external data instead.

    Raises:
        HipaError: a value for no weight of the graph, or of another dtype or shape.

    """
    weights = read_initializers(path)
    check_values(path, weights, values)
    content = bytearray(path.read_bytes())
    external = {}
    for name, value in values.items():
        weight = weights[name]
        row_by_row = np.ascontiguousarray(value)
        if weight.path == path:
            content[weight.offset : weight.offset + weight.nbytes] = row_by_row.tobytes()
        else:
            external[name] = row_by_row
    return bytes(content), external


def no_weight(path: Path, name: str) -> HipaError:
    """The error for a value of no weight of the graph at ``path``."""
    return HipaError(
        f"{path} has no weight {shown(name)}. Export the adaptor for this bundle again."
    )


def check_values(
    path: Path, weights: Mapping[str, Initializer], values: Mapping[str, np.ndarray]
) -> None:
    """Check that every value is for a weight of the graph at ``path``, in its dtype and shape.

    Raises:
        HipaError: one is not; the message names it.

    """
    for name, value in values.items():
        weight = weights.get(name)
        if weight is None:
            raise no_weight(path, name)
        if value.dtype != weight.dtype or value.shape != weight.shape:
            want = f"{weight.dtype} {list(weight.shape)}"
            got = f"{value.dtype} {list(value.shape)}"
            raise HipaError(
                f"{path}: weight {name} is {want}, got {got}. "
                "Export the adaptor for this bundle again."
            )

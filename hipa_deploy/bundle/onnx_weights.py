"""Where the weights lie in an ONNX file: what swapping an adaptor needs to know, without the onnx package.

ONNX is protobuf, and protobuf is tagged fields, so the few that lead to a weight are read and the rest is passed over
(onnx.proto: ModelProto.graph = 7, GraphProto.initializer = 5; of TensorProto dims = 1, data_type = 2, name = 8,
raw_data = 9, external_data = 13).
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

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
_MODEL_GRAPH, _GRAPH_INITIALIZER, _DIMS, _DATA_TYPE, _NAME, _RAW_DATA, _EXTERNAL = (
    7,
    5,
    1,
    2,
    8,
    9,
    13,
)
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

Span = tuple[int, int]  # start and end in the file


@dataclass(frozen=True)
class Initializer:
    """A weight of ``shape`` and ``dtype``: ``nbytes`` bytes at ``offset`` of ``path``, little endian, row by row."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int

    def read(self) -> np.ndarray:
        """The values, mapped from the file: nothing is copied, and the array cannot be written."""
        if not self.nbytes:
            return np.zeros(self.shape, self.dtype)
        return np.memmap(self.path, self.dtype, "r", self.offset, self.shape or (1,)).reshape(
            self.shape
        )


def read_initializers(path: Path) -> dict[str, Initializer]:
    """The initializers of the ONNX file at ``path`` by name, in its order, external data included.

    Raises:
        HipaError: not an ONNX file, truncated, or with weights in a form that torch's exporter does not write.

    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            graphs = [
                span for field, span in _fields(data, (0, len(data))) if field == _MODEL_GRAPH
            ]
            spans = [
                s
                for graph in graphs
                for field, s in _fields(data, graph)
                if field == _GRAPH_INITIALIZER
            ]
            found = [_initializer(data, span, path) for span in spans]
    except (IndexError, KeyError, ValueError, TypeError) as error:
        raise HipaError(
            f"{path} is not an ONNX file that can be read ({error!r}). Export the bundle again."
        ) from None
    return {weight.name: weight for weight in found}


def _fields(data: Any, span: Span) -> Iterator[tuple[int, Any]]:
    """Fields of a message as (number, value): an integer, or the span of a length-delimited one."""
    at, end = span
    while at < end:
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == _VARINT:
            value, at = _varint(data, at)
            yield tag >> 3, value
        elif kind == _BYTES:
            size, at = _varint(data, at)
            yield tag >> 3, (at, at + size)
            at += size
        elif kind in (_FIXED32, _FIXED64):
            at += 4 if kind == _FIXED32 else 8
        else:
            raise ValueError(f"wire type {kind}")
    if at != end:
        raise ValueError("truncated")


def _varint(data: Any, at: int) -> tuple[int, int]:
    """An integer of seven bits a byte, the lowest first, and where the next field begins."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
        shift += 7


def _initializer(data: Any, span: Span, path: Path) -> Initializer:
    fields = list(_fields(data, span))
    single = dict(fields)
    dims = tuple(n for field, value in fields if field == _DIMS for n in _integers(data, value))
    dtype, name = _DTYPES[single[_DATA_TYPE]], bytes(data[slice(*single[_NAME])]).decode()
    size = int(np.prod(dims, dtype=np.int64)) * np.dtype(dtype).itemsize
    entries = dict(_entry(data, value) for field, value in fields if field == _EXTERNAL)
    if entries:
        where = path.parent / entries["location"]
        start, length = int(entries.get("offset", 0)), int(entries.get("length", size))
    else:
        where = path
        start, end = single[_RAW_DATA] if size else (0, 0)
        length = end - start
    if length != size:
        raise ValueError(f"{name}: {length} bytes, expected {size}")
    return Initializer(name, dtype, dims, where, start, size)


def _integers(data: Any, value: int | Span) -> list[int]:
    """Repeated integers, one a field or packed into one field."""
    if isinstance(value, int):
        return [value]
    (at, end), numbers = value, []
    while at < end:
        number, at = _varint(data, at)
        numbers.append(number)
    return numbers


def _entry(data: Any, span: Span) -> tuple[str, str]:
    """A StringStringEntryProto: key = 1, value = 2."""
    parts = {field: bytes(data[slice(*value)]).decode() for field, value in _fields(data, span)}
    return parts[1], parts[2]


def skeleton_sha256(path: Path, weights: Mapping[str, Initializer]) -> str:
    """SHA-256 of everything in the graph's file but the values of ``weights``: equal for equal graphs."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for weight in sorted(
            (w for w in weights.values() if w.path == path and w.nbytes), key=lambda w: w.offset
        ):
            digest.update(file.read(weight.offset - file.tell()))
            file.seek(weight.nbytes, 1)
        digest.update(file.read())
    return digest.hexdigest()


def with_values(
    path: Path, values: Mapping[str, np.ndarray]
) -> tuple[bytes, dict[str, np.ndarray]]:
    """The graph's file with ``values`` in place of its own, and those of them that lie in external data instead.

    Raises:
        HipaError: a value for no weight of the graph, or of another dtype or shape.

    """
    weights, content, external = read_initializers(path), bytearray(path.read_bytes()), {}
    check_values(path, weights, values)
    for name, value in values.items():
        weight = weights[name]
        if weight.path == path:
            content[weight.offset : weight.offset + weight.nbytes] = np.ascontiguousarray(
                value
            ).tobytes()
        else:
            external[name] = np.ascontiguousarray(value)
    return bytes(content), external


def check_values(
    path: Path, weights: Mapping[str, Initializer], values: Mapping[str, np.ndarray]
) -> None:
    """Raise HipaError unless every value is for a weight of the graph at ``path``, in its dtype and shape."""
    for name, value in values.items():
        weight = weights.get(name)
        if weight is None:
            raise HipaError(
                f"{path} has no weight {name}. Export the adaptor for this bundle again."
            )
        if value.dtype != weight.dtype or value.shape != weight.shape:
            want, got = f"{weight.dtype} {list(weight.shape)}", f"{value.dtype} {list(value.shape)}"
            raise HipaError(
                f"{path}: weight {name} is {want}, got {got}. Export the adaptor for this bundle again."
            )

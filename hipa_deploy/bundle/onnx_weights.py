"""Where the weights lie in an ONNX file, read without the onnx package.

Swapping an adaptor needs to know no more of a graph than this.

ONNX is protobuf, and protobuf is tagged fields. So the few fields that lead to a weight are read,
and all others are skipped. Their numbers are those of onnx.proto.
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
# Fields: ModelProto.graph, GraphProto.initializer, and of TensorProto the others.
_MODEL_GRAPH = 7
_GRAPH_INITIALIZER = 5
_DIMS = 1
_DATA_TYPE = 2
_NAME = 8
_RAW_DATA = 9
_EXTERNAL = 13
# Wire types: how a field is stored (protobuf.dev/programming-guides/encoding).
_VARINT = 0
_FIXED64 = 1
_BYTES = 2
_FIXED32 = 5

Span = tuple[int, int]  # start and end in the file


@dataclass(frozen=True)
class Initializer:
    """A weight: ``nbytes`` bytes at ``offset`` of the file ``path``, little endian, row by row."""

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
        shape = self.shape or (1,)  # a mapping of no dimensions is not possible
        return np.memmap(self.path, self.dtype, "r", self.offset, shape).reshape(self.shape)


def read_initializers(path: Path) -> dict[str, Initializer]:
    """The initializers of the ONNX file at ``path`` by name, in its order.

    Weights in external data are included.

    Raises:
        HipaError: not an ONNX file, a truncated one, or one with weights in a form that torch's
            exporter does not write.

    """
    found = []
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            for graph in _spans(data, (0, len(data)), _MODEL_GRAPH):
                for span in _spans(data, graph, _GRAPH_INITIALIZER):
                    found.append(_initializer(data, span, path))
    except (IndexError, KeyError, ValueError, TypeError) as error:
        raise HipaError(
            f"{path} is not an ONNX file that can be read ({error!r}). Export the bundle again."
        ) from None
    return {weight.name: weight for weight in found}


def _spans(data: Any, span: Span, wanted: int) -> list[Span]:
    """Where the messages lie that field ``wanted`` of a message holds."""
    return [value for field, value in _fields(data, span) if field == wanted]


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
    """The TensorProto at ``span``."""
    single: dict[int, Any] = {}
    dims: list[int] = []
    external: dict[str, str] = {}
    for field, value in _fields(data, span):
        single[field] = value
        if field == _DIMS:
            dims += _integers(data, value)
        if field == _EXTERNAL:
            key, entry = _entry(data, value)
            external[key] = entry

    dtype = _DTYPES[single[_DATA_TYPE]]
    name = _text(data, single[_NAME])
    size = int(np.prod(dims, dtype=np.int64)) * np.dtype(dtype).itemsize

    # Values lie in another file, or in this one, or nowhere if there are none.
    where = path
    start = length = 0
    if external:
        where = path.parent / external["location"]
        start = int(external.get("offset", 0))
        length = int(external.get("length", size))
    elif size:
        start, end = single[_RAW_DATA]
        length = end - start
    if length != size:
        raise ValueError(f"{name}: {length} bytes, expected {size}")
    return Initializer(name, dtype, tuple(dims), where, start, size)


def _integers(data: Any, value: int | Span) -> list[int]:
    """Repeated integers, one a field or packed into one field."""
    if isinstance(value, int):
        return [value]
    at, end = value
    numbers = []
    while at < end:
        number, at = _varint(data, at)
        numbers.append(number)
    return numbers


def _entry(data: Any, span: Span) -> tuple[str, str]:
    """A StringStringEntryProto: key = 1, value = 2."""
    parts = {field: _text(data, value) for field, value in _fields(data, span)}
    return parts[1], parts[2]


def _text(data: Any, span: Span) -> str:
    start, end = span
    return bytes(data[start:end]).decode()


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
            raise HipaError(
                f"{path} has no weight {name}. Export the adaptor for this bundle again."
            )
        if value.dtype != weight.dtype or value.shape != weight.shape:
            want = f"{weight.dtype} {list(weight.shape)}"
            got = f"{value.dtype} {list(value.shape)}"
            raise HipaError(
                f"{path}: weight {name} is {want}, got {got}. "
                "Export the adaptor for this bundle again."
            )

"""What a stage's ONNX file refers to and may not contain, before a runtime loads it.

An ONNX file may keep weights in other files. A runtime reads these by itself, so they have to be
known beforehand: their hashes are to be checked too. And a graph may hold loops, which no limit
ends. The fields and their numbers are those of onnx.proto.
"""

from __future__ import annotations

import mmap
from pathlib import Path, PurePosixPath
from typing import Any

from hipa_deploy.bundle.protobuf import Span, as_span, fields, text
from hipa_deploy.errors import HipaError

# Where each kind of message holds others of interest, by field number.
_INSIDE: dict[str, dict[int, str]] = {
    "Model": {7: "Graph", 20: "TrainingInfo", 25: "Function"},
    "TrainingInfo": {1: "Graph", 2: "Graph"},
    "Function": {7: "Node", 11: "Attribute"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Node": {5: "Attribute"},
    "Attribute": {
        5: "Tensor",
        6: "Graph",
        10: "Tensor",
        11: "Graph",
        22: "SparseTensor",
        23: "SparseTensor",
    },
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Tensor": {13: "Entry"},
    "Entry": {},
}
_OP_TYPE = 4  # of a Node
_KEY = 1  # of an Entry
_VALUE = 2
_DEEPEST = 40  # messages within messages; an exported graph has 4
# Operators that may run for ever. No export writes them.
_ENDLESS = ("Loop", "Scan")


def external_files(path: Path) -> set[str]:
    """The files beside the ONNX file at ``path`` that hold weights of it, as it names them.

    Raises:
        HipaError: not an ONNX file, a truncated one, or one with a loop.

    """
    names: set[str] = set()
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _walk(data, (0, len(data)), "Model", names, depth=0)
    except (OSError, ValueError) as error:
        raise HipaError(
            f"{path} is not an ONNX file that can be used ({error}). Export the bundle again."
        ) from None
    return names


def _walk(data: Any, span: Span, kind: str, names: set[str], depth: int) -> None:
    """Add the files that the message at ``span`` names to ``names``."""
    if depth > _DEEPEST:
        raise ValueError("its graphs are nested too deep")
    inside = _INSIDE[kind]
    entry: dict[int, str] = {}
    for field, value in fields(data, span):
        if field in inside:
            _walk(data, as_span(value), inside[field], names, depth + 1)
        elif kind == "Node" and field == _OP_TYPE:
            _refuse_endless(text(data, value))
        elif kind == "Entry":
            entry[field] = text(data, value)
    if entry.get(_KEY) == "location":
        names.add(entry.get(_VALUE, ""))


def _refuse_endless(operator: str) -> None:
    if operator in _ENDLESS:
        raise ValueError(f"it has the operator {operator}, which no export writes")


def beside(onnx: str, location: str) -> str:
    """The name in the bundle of a file that the ONNX file ``onnx`` of the bundle names.

    Example:
        >>> beside("unet/model.onnx", "model.onnx.data")
        'unet/model.onnx.data'

    """
    return (PurePosixPath(onnx).parent / location).as_posix()
